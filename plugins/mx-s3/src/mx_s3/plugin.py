"""What the S3 plugin offers; imports no SDK."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from mx_s3.settings import S3Settings

if TYPE_CHECKING:
    from modelexpress_core.contracts.storage import Storage
    from modelexpress_core.uri import ModelURI


def _open_s3(uri: ModelURI, settings: Mapping[str, str]) -> Storage:
    from mx_s3._storage import open_s3

    return open_s3(uri, settings)


@hookimpl
def mx_register_storages() -> list[StorageProvider]:
    """``s3``."""
    return [
        # A request waits some ten milliseconds for its first byte; a connection carries about this much in that time.
        StorageProvider(
            "mx-s3",
            ("s3",),
            _open_s3,
            capabilities=StorageCapabilities(
                patience=True,
                diagnosis=True,
                stat_digests=True,
                global_versions=True,
                concurrency=32,
                most_concurrency=128,
                request_cost_bytes=512 << 10,
            ),
            install_hint="modelexpress-core[s3]",
            settings=S3Settings,
        ),
    ]
