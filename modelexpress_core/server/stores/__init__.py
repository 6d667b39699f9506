"""Where a server keeps its metadata. The built-in stores are registered like those of any plugin."""

from __future__ import annotations

from modelexpress_core.server.stores.protocol import (
    Listing,
    MetadataStore,
    NotPublisherError,
    Reaped,
    SourceQuery,
    SourceRecord,
    SourceStatus,
    StoredSource,
    StoreUnavailableError,
)

__all__ = [
    "Listing",
    "MetadataStore",
    "NotPublisherError",
    "Reaped",
    "SourceQuery",
    "SourceRecord",
    "SourceStatus",
    "StoreUnavailableError",
    "StoredSource",
]
