"""The bulk channel: raw bytes over HTTP/1.1 on a port of their own, for readers that got a ticket over gRPC."""
