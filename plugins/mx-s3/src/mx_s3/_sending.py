"""Sending requests that botocore prepared over core's connections, which bound the time and the size of each answer."""

from __future__ import annotations

import io
import ssl
from collections.abc import Iterator, Mapping
from typing import Any

from botocore import exceptions as boto
from botocore.awsrequest import AWSPreparedRequest, AWSResponse

from modelexpress_core.storage.http import BadAnswerError, BoundedSession, Request, request_of_sdk
from modelexpress_core.storage.http.failures import ConnectTimeoutError, ProxyError

__all__ = ["CredentialSession", "answer_of", "prepared_request"]


class CredentialSession(BoundedSession):
    """Core's bounded session, as botocore calls it and as it expects failures."""

    def send(self, request: AWSPreparedRequest, **_: object) -> AWSResponse:  # type: ignore[override]  # botocore's
        """Return the answer. Also a handler of botocore's event ``before-send``.

        Raises:
            BotoCoreError: As botocore's own session, by the kind of the failure.
        """
        try:
            answer = super().send(prepared_request(request))
        except ValueError as exc:
            raise boto.HTTPClientError(error=exc) from exc
        except OSError as exc:
            raise _as_botocore(exc, request.url) from exc
        return answer_of(request.url, answer.status, answer.headers, answer.content)


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
    return request_of_sdk(request.method, request.url, request.headers.items(), request.body)


class _Content(io.BytesIO):
    """The content of an answer, as botocore reads it."""

    def stream(self) -> Iterator[bytes]:
        yield self.read()


def answer_of(url: str, status: int, headers: Mapping[str, str], content: bytes) -> AWSResponse:
    """An answer as botocore's session returns it."""
    fields: Any = dict(headers)
    raw: Any = _Content(content)
    return AWSResponse(url, status, fields, raw)
