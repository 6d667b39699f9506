"""What the GCS plugin offers; imports no SDK."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from mx_gcs.settings import GcsSettings

if TYPE_CHECKING:
    from modelexpress_core.contracts.storage import Storage
    from modelexpress_core.uri import ModelURI


def _open_gcs(uri: ModelURI, settings: Mapping[str, str]) -> Storage:
    from mx_gcs._storage import open_gcs

    return open_gcs(uri, settings)


@hookimpl
def mx_register_storages() -> list[StorageProvider]:
    """``gs``."""
    return [
        # A request waits some tens of milliseconds for its first byte; a connection carries about this much meanwhile.
        StorageProvider(
            "mx-gcs",
            ("gs",),
            _open_gcs,
            capabilities=StorageCapabilities(
                patience=True,
                diagnosis=True,
                global_versions=True,
                concurrency=32,
                most_concurrency=128,
                request_cost_bytes=512 << 10,
            ),
            install_hint="modelexpress-core[gcs]",
            settings=GcsSettings,
        ),
    ]
