"""The model cache of a server: each version of a model is downloaded once, verified, and kept within limits."""

from __future__ import annotations

from modelexpress_core.server.cache.cache import ModelCache
from modelexpress_core.server.cache.records import CachedFile
from modelexpress_core.server.cache.snapshots import CachedFileReader, Snapshot

__all__ = ["CachedFile", "CachedFileReader", "ModelCache", "Snapshot"]
