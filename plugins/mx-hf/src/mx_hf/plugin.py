"""What the plugin for the Hugging Face Hub offers; imports no SDK."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from mx_hf.settings import HfSettings, hf_settings

if TYPE_CHECKING:
    from modelexpress_core.contracts.storage import Storage
    from modelexpress_core.uri import ModelURI


def _open_hf(uri: ModelURI, settings: Mapping[str, str]) -> Storage:
    from mx_hf._storage import open_hf

    return open_hf(uri, settings)


@hookimpl
def mx_rewrite_uri(uri: ModelURI, environ: Mapping[str, str]) -> ModelURI | None:
    """The copy that huggingface_hub has downloaded, where HF_HUB_OFFLINE forbids requests."""
    if uri.scheme != "hf":
        return None
    settings = hf_settings(environ)
    if not settings.offline:
        return None
    from mx_hf._offline import downloaded

    return downloaded(uri, settings)


@hookimpl
def mx_register_storages() -> list[StorageProvider]:
    """``hf``."""
    return [
        # A request waits some tens of milliseconds for its first byte; a connection carries about this much meanwhile.
        StorageProvider(
            "mx-hf",
            ("hf",),
            _open_hf,
            capabilities=StorageCapabilities(
                patience=True,
                diagnosis=True,
                restriction=True,
                global_versions=True,
                concurrency=16,
                most_concurrency=64,
                request_cost_bytes=512 << 10,
            ),
            install_hint="modelexpress-core[hf]",
            settings=HfSettings,
        ),
    ]
