"""What the tests, the demo and the benchmarks start: real servers, and a network that misbehaves on request."""
