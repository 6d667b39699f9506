"""Sends the requests of azure-identity over core's connections, which bound the time and the size of each answer."""

from __future__ import annotations

import json
import threading
from typing import Any
from urllib.parse import urlsplit

from azure.core.exceptions import ServiceRequestError, ServiceResponseError
from azure.core.pipeline.transport import HttpResponse, HttpTransport

from modelexpress_core.storage.http import BoundedSession, Proxies, WholeAnswer, request_of_sdk
from mx_azure._errors import Attempt

__all__ = ["BoundedTransport"]

#: Headers of azure-core's own connections.
_OWN_HEADERS = ("accept-encoding", "connection")


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
        self._session = BoundedSession(
            connect_timeout_seconds=connect_timeout_seconds,
            read_timeout_seconds=read_timeout_seconds,
            proxies=proxies,
            ca_bundle=lambda: ca_bundle,
        )
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
        try:
            prepared = request_of_sdk(
                request.method, request.url, request.headers.items(), _body(request), left_out=_OWN_HEADERS
            )
            answer = self._session.send(
                prepared,
                connect_timeout_seconds=options.get("connection_timeout"),
                read_timeout_seconds=options.get("read_timeout"),
            )
        except OSError as exc:
            self._note(Attempt(host, failure=exc))
            raise ServiceRequestError(f"no answer from {host}", error=exc) from exc
        except ValueError as exc:
            self._note(Attempt(host, failure=exc))
            raise ServiceResponseError(f"a request to {host} that HTTP does not allow", error=exc) from exc
        self._note(Attempt(host, answer.status, _codes(answer), answer.headers.get("retry-after")))
        return _Answer(request, answer)

    def _note(self, attempt: Attempt) -> None:
        attempts = getattr(self._thread, "attempts", None)
        if attempts is not None:
            attempts.append(attempt)


class _Answer(HttpResponse):
    """An answer as azure-core's pipelines read it."""

    def __init__(self, request: Any, answer: WholeAnswer) -> None:  # noqa: ANN401 - see above
        super().__init__(request, None)
        self.status_code = answer.status
        self.reason = answer.reason
        self.headers = dict(answer.headers)
        self.content_type = answer.headers.get("content-type")
        self._content = answer.content

    def body(self) -> bytes:
        """The whole content."""
        return self._content


def _body(request: Any) -> Any:  # noqa: ANN401 - see above
    return getattr(request, "content", None) or getattr(request, "data", None) or getattr(request, "_data", None)


def _codes(answer: WholeAnswer) -> tuple[str, ...]:
    """The codes in an error of Entra ID; never its words, which may repeat what was sent."""
    if answer.status < 400:
        return ()
    try:
        found = json.loads(answer.content)
        name, numbers = found.get("error"), found.get("error_codes") or ()
    except (ValueError, AttributeError):
        return ()
    names = (name,) if isinstance(name, str) and name.isidentifier() and len(name) < 60 else ()
    return (*names, *(f"AADSTS{number}" for number in numbers[:4] if isinstance(number, int)))
