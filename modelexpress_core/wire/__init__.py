"""The wire protocol: messages (generated from the proto files here), services, channels. Imports gRPC and protobuf."""
