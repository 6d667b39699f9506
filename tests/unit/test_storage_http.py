"""What answers over HTTP mean for a load, how long they ask to be left alone, and how their sockets are shut down."""

from __future__ import annotations

import gc
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
import trustme

from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    DeadlineError,
    NotFoundError,
    SourceChangedError,
    ThrottledError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.storage.http import OpenSockets, http_error, retry_after_seconds


def error(status: int, retry_after: str | None = None) -> BackendError:
    about = {"uri": "web://host/object", "operation": "read bytes 0-9", "provider": "mx-web"}
    return http_error(status, "Some Reason", retry_after=retry_after, **about)


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [
        (301, BackendError, False),
        (400, BackendError, False),
        (401, AccessDeniedError, False),
        (403, AccessDeniedError, False),
        (404, NotFoundError, False),
        (408, DeadlineError, True),
        (412, SourceChangedError, False),
        (416, SourceChangedError, False),
        (429, ThrottledError, True),
        (500, UnavailableError, True),
        (501, UnsupportedError, False),
        (503, UnavailableError, True),
        (599, UnavailableError, True),
    ],
)
def test_a_status_has_a_meaning(status: int, kind: type[BackendError], retryable: bool) -> None:
    """Its class, and with it whether trying again can help."""
    raised = error(status)

    assert kind is type(raised)
    assert retryable is raised.retryable
    assert f"could not read bytes 0-9 of web://host/object: HTTP {status} Some Reason" == str(raised).split("\n")[0]


def test_errors_say_what_to_do() -> None:
    """Wherever the status says what is likely wrong."""
    lacking = [status for status in (401, 403, 404, 407, 408, 410, 412, 416, 429, 500, 503) if not error(status).hint]

    assert [] == lacking
    assert "HTTP 404" == http_error(404, None, uri="", operation="", provider="mx-web").message


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("soon", None), ("", None), (None, None), ("inf", None), ("nan", None)],
)
def test_what_retry_after_asks_for_in_seconds(header: str | None, seconds: float | None) -> None:
    """What is no such time asks for nothing."""
    assert seconds == retry_after_seconds(header)


def test_what_retry_after_asks_for_as_a_date() -> None:
    """Counted from now; one that is past asks for no wait, and one without a time zone is no such date."""
    now = datetime.now(timezone.utc)

    assert 50 < (retry_after_seconds(format_datetime(now + timedelta(seconds=60), usegmt=True)) or 0) <= 60
    assert 0.0 == retry_after_seconds(format_datetime(now - timedelta(seconds=60), usegmt=True))
    assert retry_after_seconds("Tue, 01 Jan 2030 00:00:00 -0000") is None


def test_only_what_is_tried_again_is_waited_for() -> None:
    """A wait before an error that ends the load would be in vain."""
    assert 3.0 == error(503, "3").retry_after_seconds
    assert 3.0 == error(429, "3").retry_after_seconds
    assert error(404, "3").retry_after_seconds is None


# -- sockets -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection."""
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@pytest.fixture
def tls_pair(pair: tuple[socket.socket, socket.socket]) -> Iterator[tuple[ssl.SSLSocket, ssl.SSLSocket]]:
    """The same, encrypted."""
    authority = trustme.CA()
    serving, asking = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.issue_cert("storage.example").configure_cert(serving)
    authority.configure_trust(asking)
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(serving.wrap_socket, pair[1], server_side=True)
        with asking.wrap_socket(pair[0], server_hostname="storage.example") as one, accepted.result(10) as other:
            yield one, other


def test_shutting_down_ends_a_read_that_waits(pair: tuple[socket.socket, socket.socket]) -> None:
    """At once, also where it is done twice or the other side is gone."""
    sockets = OpenSockets()
    sockets.add(pair[0])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(pair[0].recv, 10)
        time.sleep(0.05)
        assert not waiting.done()
        sockets.shut_down()

        assert b"" == waiting.result(5)
    pair[1].close()
    sockets.shut_down()
    assert sockets.closed


def test_what_connects_after_shutting_down_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    """A read that was about to begin does not outlive its storage."""
    sockets = OpenSockets()
    sockets.shut_down()

    with pytest.raises(ConnectionAbortedError, match="the storage was closed"):
        sockets.add(pair[0])


def test_sockets_that_are_gone_are_forgotten() -> None:
    """A storage that makes a connection for each read does not keep all of them."""
    sockets = OpenSockets()
    for _ in range(3):
        one, other = socket.socketpair()
        with one, other:
            sockets.add(one)
    del one, other
    gc.collect()

    assert 0 == len(sockets._sockets)


def test_a_reader_never_sees_what_is_encrypted(tls_pair: tuple[ssl.SSLSocket, ssl.SSLSocket]) -> None:
    """When the connection is shut down amid a read, it brings the other side's bytes or fails."""
    reader, writer = tls_pair
    sockets = OpenSockets()
    sockets.add(reader)
    seen: set[int] = set()

    def send() -> None:
        with suppress(OSError):
            while True:
                writer.sendall(b"a" * 50_000)

    def receive() -> None:
        with suppress(OSError):
            while got := reader.recv(1000):
                seen.update(got)

    with ThreadPoolExecutor(2) as pool:
        pool.submit(send)
        received = pool.submit(receive)
        time.sleep(0.1)
        sockets.shut_down()
        received.result(5)

    assert {ord("a")} == seen
