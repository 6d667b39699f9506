"""What the plugin offers; imports no native library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from mx_streamer.settings import AzureEngineSettings, GcsEngineSettings, StreamerSettings

if TYPE_CHECKING:
    from modelexpress_core.contracts.storage import Storage
    from modelexpress_core.uri import ModelURI


def _open_files(uri: ModelURI, settings: Mapping[str, str], regular: Storage) -> Storage:
    from mx_streamer._storage import open_files

    return open_files(uri, settings, regular)


def _open_s3(uri: ModelURI, settings: Mapping[str, str], regular: Storage) -> Storage:
    from mx_streamer._storage import open_s3

    return open_s3(uri, settings, regular)


def _open_gcs(uri: ModelURI, settings: Mapping[str, str], regular: Storage) -> Storage:
    from mx_streamer._storage import open_gcs

    return open_gcs(uri, settings, regular)


def _open_azure(uri: ModelURI, settings: Mapping[str, str], regular: Storage) -> Storage:
    from mx_streamer._storage import open_azure

    return open_azure(uri, settings, regular)


def _of_objects(*, stat_digests: bool = False) -> StorageCapabilities:
    return StorageCapabilities(
        read_batch=True,
        diagnosis=True,
        stat_digests=stat_digests,
        global_versions=True,
        concurrency=2,
        most_concurrency=4,
        request_cost_bytes=512 << 10,
    )


@hookimpl
def mx_register_storages() -> list[StorageProvider]:
    """Alternatives for ``file``, ``s3``, ``gs`` and ``az``."""
    # The engine has its own threads: one batch is read while the next is prepared, and more add nothing.
    return [
        StorageProvider(
            "mx-streamer",
            ("file",),
            _open_files,
            alternative=True,
            needs_regular=True,
            capabilities=StorageCapabilities(
                read_batch=True, recheck=True, concurrency=2, most_concurrency=4, request_cost_bytes=64 << 10
            ),
            install_hint="mx-streamer",
        ),
        StorageProvider(
            "mx-streamer",
            ("s3",),
            _open_s3,
            alternative=True,
            needs_regular=True,
            capabilities=_of_objects(stat_digests=True),
            install_hint="mx-streamer[s3]",
            settings=StreamerSettings,
        ),
        StorageProvider(
            "mx-streamer",
            ("gs",),
            _open_gcs,
            alternative=True,
            needs_regular=True,
            capabilities=_of_objects(),
            install_hint="mx-streamer[gcs]",
            settings=GcsEngineSettings,
        ),
        StorageProvider(
            "mx-streamer",
            ("az",),
            _open_azure,
            alternative=True,
            needs_regular=True,
            capabilities=_of_objects(),
            install_hint="mx-streamer[azure]",
            settings=AzureEngineSettings,
        ),
    ]
