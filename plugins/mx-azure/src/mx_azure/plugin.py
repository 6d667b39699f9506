"""What the Azure plugin offers; imports no SDK."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from mx_azure.settings import AZURE_HOST, CONTAINER, AzureSettings

if TYPE_CHECKING:
    from modelexpress_core.contracts.storage import Storage
    from modelexpress_core.uri import ModelURI

_SCHEMES = ("az", "azure", "abfs", "abfss")


def _open_azure(uri: ModelURI, settings: Mapping[str, str]) -> Storage:
    from mx_azure._storage import open_azure

    return open_azure(uri, settings)


@hookimpl
def mx_register_storages() -> list[StorageProvider]:
    """``az``, and the other schemes that tools use for Azure."""
    return [
        # A request waits some ten milliseconds for its first byte; a connection carries about this much in that time.
        StorageProvider(
            "mx-azure",
            _SCHEMES,
            _open_azure,
            capabilities=StorageCapabilities(
                patience=True,
                diagnosis=True,
                global_versions=True,
                concurrency=32,
                most_concurrency=128,
                request_cost_bytes=512 << 10,
            ),
            install_hint="modelexpress-core[azure]",
            settings=AzureSettings,
        ),
    ]


@hookimpl
def mx_rewrite_uri(uri: ModelURI) -> ModelURI | None:
    """Read the https URL of a blob, and a container before an at sign, as ``az://account.host/container/path``.

    ``https`` stays free for other plugins: only the hosts of Azure Blob Storage are rewritten. User information is
    hidden in messages, and so would be the container.
    """
    if not AZURE_HOST.fullmatch(uri.authority.lower()):
        return None
    if uri.scheme == "https" and not uri.userinfo:
        return type(uri)("az", uri.authority, uri.path, uri.query)
    if uri.scheme in _SCHEMES and CONTAINER.fullmatch(uri.userinfo):
        return type(uri)(uri.scheme, uri.authority, f"{uri.userinfo}/{uri.path}".rstrip("/"), uri.query)
    return None
