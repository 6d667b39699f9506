"""ModelExpress transport for ``grpc`` URIs: tensors of another worker, streamed over gRPC."""

from __future__ import annotations

__all__: list[str] = []
