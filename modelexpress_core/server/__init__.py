"""The control plane: a gRPC server that knows which worker holds which model."""
