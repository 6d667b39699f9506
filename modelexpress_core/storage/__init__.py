"""The Storage protocol, and the storages that need nothing installed: ``file`` and ``memory``."""

from __future__ import annotations

from modelexpress_core.storage.protocol import ObjectInfo, RunStorage, Storage

__all__ = ["ObjectInfo", "RunStorage", "Storage"]
