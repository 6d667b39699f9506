"""The settings of the plugin for Kubernetes."""

from __future__ import annotations

import re

from attrs import frozen

from modelexpress_core.settings import env, names, seconds

__all__ = ["ConnectionSettings", "ReviewSettings", "StoreSettings"]

#: A namespace, a colon, and the name of a service account, as Kubernetes restricts them.
_ACCOUNT = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?:[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


def _accounts(text: str) -> tuple[str, ...]:
    accounts = names(text)
    for account in accounts:
        if not _ACCOUNT.fullmatch(account):
            reason = f"{account!r} is no service account; expected namespace:name"
            raise ValueError(reason)
    return accounts


def _staleness(text: str) -> float:
    value = seconds(text)
    if not 3 <= value <= 3600:
        reason = "expected 3 to 3600 seconds"
        raise ValueError(reason)
    return value


@frozen
class ConnectionSettings:
    """Where the API server is. A program that runs in a pod needs none of them."""

    kubeconfig: str | None = env(
        "KUBECONFIG",
        default=None,
        help="File with the address of the API server and credentials for it; unset: those of the pod, else of "
        "~/.kube/config.",
    )
    host: str | None = env(
        "KUBERNETES_SERVICE_HOST", default=None, help="Host of the API server; Kubernetes sets it in each container."
    )
    port: str | None = env(
        "KUBERNETES_SERVICE_PORT", default=None, help="Port of the API server; Kubernetes sets it in each container."
    )


@frozen
class StoreSettings:
    """How the metadata store works."""

    max_staleness_seconds: float = env(
        "MX_KUBERNETES_MAX_STALENESS_SECS",
        default=30.0,
        converter=_staleness,
        help="Calls are answered with UNAVAILABLE if the server has not heard from the API server for so long.",
    )
    heartbeat_timeout_seconds: float = env(
        "MX_HEARTBEAT_TIMEOUT_SECS",
        default=90.0,
        converter=seconds,
        help="A source becomes stale after this time without a heartbeat; heartbeats are written three times as often.",
    )


@frozen
class ReviewSettings:
    """Which callers the authenticator lets in."""

    audiences: tuple[str, ...] = env(
        "MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES",
        default=(),
        converter=names,
        help="Audiences, comma-separated; the token of a caller has one of them. The authenticator needs it.",
    )
    allowed: tuple[str, ...] = env(
        "MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS",
        default=(),
        converter=_accounts,
        help="Service accounts whose calls are answered: namespace:name, comma-separated. The authenticator needs it.",
    )
    cache_seconds: float = env(
        "MODEL_EXPRESS_SECURITY_CACHE_TTL_SECS",
        default=60.0,
        converter=seconds,
        help="How long an answer of the API server about a token is used: a token that is revoked is refused after it.",
    )
