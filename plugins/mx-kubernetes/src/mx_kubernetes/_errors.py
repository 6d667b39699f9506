"""What a failed request to the API server of Kubernetes means, and what helps: one table."""

from __future__ import annotations

import json
from collections.abc import Mapping

__all__ = ["ApiError", "is_transient"]

_APPLY_CRDS = "apply the custom resource definitions: python -m mx_kubernetes crds | kubectl apply -f -"
_GRANT = "grant the server's service account what `python -m mx_kubernetes role` prints"
_TOO_LARGE = "publish fewer tensors at once, or raise the limit of etcd"

#: By HTTP status: the likely cause, and the next step.
_MEANINGS: Mapping[int, tuple[str, str]] = {
    0: ("the API server cannot be reached", "check the address of the API server, and network policies"),
    400: ("the API server does not understand the request", "check that it serves modelexpress.io/v1alpha1"),
    401: ("the API server does not accept the credentials", "check the service account's token, or the kubeconfig"),
    403: ("the credentials do not allow it", _GRANT),
    404: ("the API server does not know the resource or the namespace", _APPLY_CRDS),
    409: ("another server changed the object meanwhile", "try again"),
    410: ("the API server no longer has so old a version", "try again"),
    413: ("the object is too large", _TOO_LARGE),
    422: ("the object does not fit the custom resource definitions", _APPLY_CRDS),
    429: ("the API server is overloaded", "try again later; look at its priority levels"),
    500: ("the API server failed", "look at its log"),
    503: ("the API server is not ready", "wait for it, or look at its log"),
    504: ("etcd does not answer the API server in time", "look at the state of etcd"),
}

#: The same request may succeed a moment later.
_TRANSIENT = frozenset({0, 429, 500, 502, 503, 504})

_MAX_REASON = 300


class ApiError(Exception):
    """A request failed.

    Args:
        operation: What was tried: verb and object.
        status: The HTTP status; 0 if there was no answer.
        reason: What came back.

    Attributes:
        status: As given.
        retry_after_seconds: How long the API server asks to wait; 0 if it does not.
    """

    def __init__(self, operation: str, status: int, reason: str, retry_after_seconds: float = 0.0) -> None:
        cause, hint = _MEANINGS.get(status) or _MEANINGS[status // 100 * 100 if status >= 500 else 400]
        came = f"{status}: {reason}" if status else reason
        super().__init__(f"Kubernetes: cannot {operation} ({came[:_MAX_REASON]}): {cause}; {hint}")
        self.status = status
        self.retry_after_seconds = retry_after_seconds


def is_transient(exc: ApiError) -> bool:
    """Whether the same request may succeed a moment later."""
    return exc.status in _TRANSIENT


def reason_of(body: bytes) -> str:
    """The message in the body of an answer that is an error."""
    try:
        answer = json.loads(body)
    except ValueError:
        return body[:_MAX_REASON].decode("utf-8", "replace")
    return str(answer.get("message", "")) if isinstance(answer, dict) else ""
