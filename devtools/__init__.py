"""Tools for tests, demo and benchmarks: real servers, faulty networks, checkpoints, and checks of the repository."""
