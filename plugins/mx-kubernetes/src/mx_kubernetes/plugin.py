"""What the plugin for Kubernetes offers; imports no SDK."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import AuthenticatorProvider, MetadataStoreProvider
from mx_kubernetes.settings import ConnectionSettings, ReviewSettings, StoreSettings

if TYPE_CHECKING:
    from modelexpress_core.contracts.authenticator import Authenticator
    from modelexpress_core.contracts.metadata_store import MetadataStore
    from modelexpress_core.uri import ModelURI

_HINT = "modelexpress-core[kubernetes]"


def _open_kubernetes(uri: ModelURI, settings: Mapping[str, str]) -> MetadataStore:
    from mx_kubernetes._store import open_kubernetes

    return open_kubernetes(uri, settings)


def _open_reviews(settings: Mapping[str, str]) -> Authenticator:
    from mx_kubernetes._reviews import open_reviews

    return open_reviews(settings)


@hookimpl
def mx_register_metadata_stores() -> list[MetadataStoreProvider]:
    """``kubernetes``."""
    return [
        MetadataStoreProvider(
            "mx-kubernetes",
            ("kubernetes",),
            _open_kubernetes,
            install_hint=_HINT,
            settings=(ConnectionSettings, StoreSettings),
        )
    ]


@hookimpl
def mx_register_authenticators() -> list[AuthenticatorProvider]:
    """``kubernetes``."""
    return [
        AuthenticatorProvider(
            "kubernetes", _open_reviews, install_hint=_HINT, settings=(ConnectionSettings, ReviewSettings)
        )
    ]
