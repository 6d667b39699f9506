"""The Azure plugin: ``az://container/path`` in Azure Blob Storage and in Azurite."""

from __future__ import annotations

__all__: list[str] = []
