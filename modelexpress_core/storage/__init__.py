"""The Storage protocol, and the storages that need nothing installed: ``file`` and ``memory``."""

from __future__ import annotations

from modelexpress_core.storage.protocol import (
    DiagnosableStorage,
    Endpoint,
    ObjectInfo,
    PatientStorage,
    RunStorage,
    Storage,
)

__all__ = ["DiagnosableStorage", "Endpoint", "ObjectInfo", "PatientStorage", "RunStorage", "Storage"]
