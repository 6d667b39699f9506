"""Sends the requests of azure-identity over core's connections, which bound the time and the size of each answer."""

from __future__ import annotations

import ipaddress
import json
import threading
from collections.abc import Mapping
from contextlib import closing
from typing import Any
from urllib.parse import urlencode, urlsplit

from azure.core.exceptions import ServiceRequestError, ServiceResponseError
from azure.core.pipeline.transport import HttpResponse, HttpTransport

from modelexpress_core.storage.http import BadAnswerError, ConnectionPool, Origin, Proxies, Request, check_encoding
from mx_azure._errors import Attempt

__all__ = ["BoundedTransport"]

#: Tokens, keys and descriptions of Entra ID take a few KiB.
_MAX_CONTENT_BYTES = 1 << 20


class BoundedTransport(HttpTransport[Any, Any]):
    """Stands in for azure-core's transport, which waits for each byte anew and reads answers of any size.

    Each request has a connection of its own, and no wait between attempts is slept here: core waits.

    Args:
        connect_timeout_seconds: How long each step to a connection may take.
        read_timeout_seconds: How long to wait for the next bytes, and for the whole head.
        proxies: Which proxy leads where.
        ca_bundle: File with the authorities to trust.
    """

    def __init__(
        self, *, connect_timeout_seconds: float, read_timeout_seconds: float, proxies: Proxies, ca_bundle: str
    ) -> None:
        self._connect_timeout_seconds = connect_timeout_seconds
        self._read_timeout_seconds = read_timeout_seconds
        self._proxies = proxies
        self._ca_bundle = ca_bundle
        self._thread = threading.local()

    def begin(self) -> list[Attempt]:
        """A list that will have the attempts of this thread from now on."""
        attempts: list[Attempt] = []
        self._thread.attempts = attempts
        return attempts

    def open(self) -> None:
        """Do nothing: each request opens a connection."""

    def close(self) -> None:
        """Do nothing: no connection stays open."""

    def __exit__(self, *_: object) -> None:
        pass

    def sleep(self, duration: float) -> None:
        """Do not wait; see the class."""

    def send(self, request: Any, **options: Any) -> Any:  # noqa: ANN401 - requests of two generations of azure-core
        """Return the answer.

        Raises:
            AzureError: As azure-core's own transport, by the kind of the failure.
        """
        host = urlsplit(request.url).netloc.rpartition("@")[2]
        wait = min(float(options.get("read_timeout", self._read_timeout_seconds)), self._read_timeout_seconds)
        try:
            answer = self._answer(request, wait, options)
        except OSError as exc:
            self._note(Attempt(host, failure=exc))
            raise ServiceRequestError(f"no answer from {host}", error=exc) from exc
        except ValueError as exc:
            self._note(Attempt(host, failure=exc))
            raise ServiceResponseError(f"a request to {host} that HTTP does not allow", error=exc) from exc
        headers = answer.headers
        self._note(Attempt(host, answer.status_code, _codes(answer), headers.get("retry-after")))
        return answer

    def _answer(self, request: Any, wait: float, options: Mapping[str, Any]) -> _Answer:  # noqa: ANN401 - see above
        connect = min(
            float(options.get("connection_timeout", self._connect_timeout_seconds)), self._connect_timeout_seconds
        )
        content = _content(request)
        prepared = Request.to_url(request.method, request.url, _headers(request, len(content)), content)
        pool = ConnectionPool(
            connect_timeout_seconds=connect,
            proxies=Proxies() if _is_on_machine(prepared.origin) else self._proxies,
            ca_bundle=self._ca_bundle,
        )
        with closing(pool), pool.send(prepared, lambda: wait) as answer:
            check_encoding(answer.headers)
            received = answer.read(_MAX_CONTENT_BYTES)
            if not answer.ended:
                raise BadAnswerError(f"the answer has more than {_MAX_CONTENT_BYTES} bytes")
        return _Answer(request, answer.status, answer.reason, answer.headers, received)

    def _note(self, attempt: Attempt) -> None:
        attempts = getattr(self._thread, "attempts", None)
        if attempts is not None:
            attempts.append(attempt)


class _Answer(HttpResponse):
    """An answer as azure-core's pipelines read it."""

    def __init__(
        self,
        request: Any,  # noqa: ANN401 - see above
        status: int,
        reason: str,
        headers: Mapping[str, str],
        content: bytes,
    ) -> None:
        super().__init__(request, None)
        self.status_code = status
        self.reason = reason
        self.headers = dict(headers)
        self.content_type = headers.get("content-type")
        self._content = content

    def body(self) -> bytes:
        """The whole content."""
        return self._content


def _is_on_machine(origin: Origin) -> bool:
    """Whether it is a metadata service of this machine, by plain HTTP: no proxy may see its tokens."""
    if origin.tls:
        return False
    try:
        address = ipaddress.ip_address(origin.host.partition("%")[0])
    except ValueError:
        return origin.host.lower() == "localhost"
    return address.is_loopback or address.is_link_local


def _headers(request: Any, length: int) -> list[tuple[str, str]]:  # noqa: ANN401 - see above
    """The headers of ``request``, with the length of its content, and without those of azure-core's own connections."""
    own = {"content-length", "accept-encoding", "connection"}
    headers = [(name, str(value)) for name, value in request.headers.items() if name.lower() not in own]
    return [*headers, ("Content-Length", str(length))] if length or request.method == "POST" else headers


def _content(request: Any) -> bytes:  # noqa: ANN401 - see above
    content = getattr(request, "content", None) or getattr(request, "data", None) or getattr(request, "_data", None)
    if content is None:
        return b""
    if isinstance(content, Mapping):
        return urlencode(content).encode()
    return content.encode() if isinstance(content, str) else bytes(content)


def _codes(answer: _Answer) -> tuple[str, ...]:
    """The codes in an error of Entra ID; never its words, which may repeat what was sent."""
    if answer.status_code < 400:
        return ()
    try:
        found = json.loads(answer.body())
        name, numbers = found.get("error"), found.get("error_codes") or ()
    except (ValueError, AttributeError):
        return ()
    names = (name,) if isinstance(name, str) and name.isidentifier() and len(name) < 60 else ()
    return (*names, *(f"AADSTS{number}" for number in numbers[:4] if isinstance(number, int)))
