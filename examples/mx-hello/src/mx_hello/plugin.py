"""The hooks of the plugin. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import StorageCapabilities, StorageProvider

if TYPE_CHECKING:
    from modelexpress_core.contracts.storage import Storage
    from modelexpress_core.uri import ModelURI


def _open_hello(uri: ModelURI, _settings: Mapping[str, str]) -> Storage:
    from mx_hello._storage import HelloStorage

    return HelloStorage(uri.authority)


@hookimpl
def mx_register_storages() -> list[StorageProvider]:
    """Offer the storage for ``hello://``."""
    return [StorageProvider("mx-hello", ("hello",), _open_hello, capabilities=StorageCapabilities(patience=True))]
