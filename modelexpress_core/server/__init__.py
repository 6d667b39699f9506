"""The control plane: a gRPC server that keeps which worker holds which model."""
