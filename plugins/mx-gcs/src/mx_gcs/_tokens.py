"""Requests for access tokens over core's connections, which bound the time and the size of each answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from attrs import field, frozen

from modelexpress_core.storage.http import BoundedSession, Proxies, request_of_sdk

__all__ = ["METADATA_HOST", "TokenAnswerError", "TokenRequests", "UnsafeTokenUrlError"]

#: Name of the metadata server of Google's machines and pods.
METADATA_HOST = "metadata.google.internal"

#: The metadata server is on the same machine: one that does not answer in this time is not there.
_METADATA_CONNECT_SECONDS = 3.0


class UnsafeTokenUrlError(ValueError):
    """Credentials would go over plain HTTP to another machine.

    Args:
        host: The host in the URL.
    """

    def __init__(self, host: str) -> None:
        super().__init__(f"credentials would be sent unencrypted to {host[:80]}")


class TokenAnswerError(Exception):
    """A service refused to give a token.

    Google's library would try some of them again, and sleep in between; only core waits. So each of them is raised.

    Args:
        host: Of the service.
        status: HTTP status.
        code: Error code in the answer: ``"invalid_grant"``, ``"PERMISSION_DENIED"``.
        words: What the service says about it, and more codes. May hold a part of a credential.
        headers: By lower-case name.
    """

    def __init__(self, host: str, status: int, code: str, words: str, headers: Mapping[str, str]) -> None:
        super().__init__(f"{host} answered HTTP {status}")
        self.host = host
        self.status = status
        self.code = code
        self.words = words
        self.headers = headers


@frozen
class TokenAnswer:
    """An answer, as google-auth reads it.

    Attributes:
        status: HTTP status.
        headers: By lower-case name.
        data: The content.
    """

    status: int
    headers: Mapping[str, str] = field(repr=False)
    data: bytes = field(repr=False)


class TokenRequests:
    """Sends the requests of google-auth, in place of its transports (``google.auth.transport.Request``). Thread-safe.

    A URL with https is reached as GCS is, through a proxy if one is set. Plain http is for this machine, link-local
    addresses and the metadata server alone, and goes through no proxy.

    Args:
        connect_timeout_seconds: How long each step to a connection may take.
        read_timeout_seconds: How long to wait for the next bytes, and for the whole head.
        proxies: Which proxy leads where.
        ca_bundle: File with the authorities to trust; None for those of this system.
        metadata_host: Host, or host and port, of the metadata server.
    """

    def __init__(
        self,
        *,
        connect_timeout_seconds: float,
        read_timeout_seconds: float,
        proxies: Proxies,
        ca_bundle: str | None,
        metadata_host: str,
    ) -> None:
        named = urlsplit(f"//{metadata_host}").hostname
        self._session = BoundedSession(
            connect_timeout_seconds=connect_timeout_seconds,
            read_timeout_seconds=read_timeout_seconds,
            proxies=proxies,
            ca_bundle=lambda: ca_bundle,
            metadata_hosts={METADATA_HOST, *([named] if named else [])},
        )

    def __call__(
        self,
        url: str,
        method: str = "GET",
        body: bytes | str | None = None,
        headers: Mapping[str, Any] | None = None,
        **_: object,
    ) -> TokenAnswer:
        """The answer to a request.

        Raises:
            TokenAnswerError: It is not a success.
            OSError: There is none.
            ValueError: The request cannot be sent as HTTP.
        """
        request = request_of_sdk(method, url, (headers or {}).items(), body)
        local = self._session.is_local(request.origin)
        if not (local or request.origin.tls):
            raise UnsafeTokenUrlError(request.origin.host)
        answer = self._session.send(request, connect_timeout_seconds=_METADATA_CONNECT_SECONDS if local else None)
        if not answer.succeeded:
            code, words = _error_of(answer.content)
            raise TokenAnswerError(request.origin.host, answer.status, code, words, answer.headers)
        return TokenAnswer(answer.status, answer.headers, answer.content)

    def close(self) -> None:
        """End what other threads wait for; later requests fail."""
        self._session.close()


def _error_of(data: bytes) -> tuple[str, str]:
    """Code and words of an answer that refuses: of OAuth (RFC 6749 section 5.2), of a Google API, or of neither."""
    try:
        parsed = json.loads(data)
        error = parsed["error"]
    except (ValueError, TypeError, KeyError, RecursionError):
        text = data[:2000].decode("utf-8", "replace")
        return "", "" if "<" in text else text
    if isinstance(error, dict):
        details = error.get("details")
        details = details if isinstance(details, list) else []
        reasons = [str(each.get("reason") or "") for each in details if isinstance(each, dict)]
        return str(error.get("status") or ""), " ".join([str(error.get("message") or ""), *reasons])
    words = (parsed.get("error_subtype"), parsed.get("error_description"))
    return str(error), " ".join(str(each) for each in words if each)
