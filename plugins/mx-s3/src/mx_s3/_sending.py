"""Sending requests that botocore prepared over core's connections, which bound the time and the size of each answer."""

from __future__ import annotations

import io
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

from botocore import exceptions as boto
from botocore.awsrequest import AWSPreparedRequest, AWSResponse

from modelexpress_core.storage.http import BadAnswerError, ConnectionPool, Proxies, Request
from modelexpress_core.storage.http.failures import ConnectTimeoutError, ProxyError

__all__ = ["BoundedSession", "answer_of", "prepared_request"]

#: Credentials and tokens take a few KiB.
_MAX_CONTENT_BYTES = 1 << 20


class BoundedSession:
    """Stands in for botocore's HTTP session, which waits for each byte anew and reads answers of any size.

    For services that give credentials: each request has a connection of its own.

    Args:
        connect_timeout_seconds: How long each step to a connection may take.
        read_timeout_seconds: How long to wait for the next bytes, and for the whole head.
        proxies: Which proxy leads where; none if missing.
        ca_bundle: Returns the file with the authorities to trust.
    """

    def __init__(
        self,
        *,
        connect_timeout_seconds: float,
        read_timeout_seconds: float,
        proxies: Proxies | None = None,
        ca_bundle: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._connect_timeout_seconds = connect_timeout_seconds
        self._read_timeout_seconds = read_timeout_seconds
        self._proxies = proxies
        self._ca_bundle = ca_bundle

    def send(self, request: AWSPreparedRequest, **_: object) -> AWSResponse:
        """Return the answer. Also a handler of botocore's event ``before-send``.

        Raises:
            BotoCoreError: As botocore's own session, by the kind of the failure.
        """
        pool = ConnectionPool(
            connect_timeout_seconds=self._connect_timeout_seconds, proxies=self._proxies, ca_bundle=self._ca_bundle()
        )
        try:
            with (
                closing(pool),
                pool.send(prepared_request(request), lambda: self._read_timeout_seconds) as answer,
            ):
                content = answer.read(_MAX_CONTENT_BYTES)
                if not answer.ended:
                    raise BadAnswerError(f"the answer has more than {_MAX_CONTENT_BYTES} bytes")
        except ValueError as exc:
            raise boto.HTTPClientError(error=exc) from exc
        except OSError as exc:
            raise _as_botocore(exc, request.url) from exc
        return answer_of(request.url, answer.status, answer.headers, content)

    def close(self) -> None:
        """Do nothing: no connection stays open."""


def _as_botocore(exc: OSError, url: str) -> boto.BotoCoreError:
    """``exc`` as botocore's own session raises it: its fetchers of credentials judge by the class."""
    classes: tuple[tuple[type[OSError], type[boto.BotoCoreError]], ...] = (
        (ConnectTimeoutError, boto.ConnectTimeoutError),
        (TimeoutError, boto.ReadTimeoutError),
        (ssl.SSLError, boto.SSLError),
        (BadAnswerError, boto.ConnectionClosedError),
        (ConnectionResetError, boto.ConnectionClosedError),
        (BrokenPipeError, boto.ConnectionClosedError),
    )
    if isinstance(exc, ProxyError):
        return boto.ProxyConnectionError(proxy_url="of the environment", error=exc)
    cls = next((found for kind, found in classes if isinstance(exc, kind)), boto.EndpointConnectionError)
    return cls(endpoint_url=url, error=exc)


def prepared_request(request: AWSPreparedRequest) -> Request:
    """A request of botocore's as core sends it.

    Raises:
        ValueError: A part of it is not allowed in HTTP.
    """
    headers = []
    value: Any
    for name, value in request.headers.items():
        headers.append((name, value.decode("latin-1") if isinstance(value, bytes) else str(value)))
    body: Any = request.body
    if body is None:
        body = b""
    elif hasattr(body, "read"):
        body = body.read()
    content = body.encode() if isinstance(body, str) else bytes(body)
    return Request.to_url(request.method, request.url, headers, content)


class _Content(io.BytesIO):
    """The content of an answer, as botocore reads it."""

    def stream(self) -> Iterator[bytes]:
        yield self.read()


def answer_of(url: str, status: int, headers: Mapping[str, str], content: bytes) -> AWSResponse:
    """An answer as botocore's session returns it."""
    fields: Any = dict(headers)
    raw: Any = _Content(content)
    return AWSResponse(url, status, fields, raw)
