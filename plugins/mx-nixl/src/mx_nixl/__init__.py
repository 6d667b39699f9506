"""ModelExpress transport for ``nixl`` URIs: tensors of another worker, read over NIXL."""

from __future__ import annotations

__all__: list[str] = []
