"""Reads of one object share a signature, go over connections of core's, and survive those that misbehave."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    DeadlineError,
    NotFoundError,
    SourceChangedError,
    ThrottledError,
    UnavailableError,
)
from mx_s3._storage import S3Storage

CONTENT = bytes(range(256)) * 400
LONG = bytes(range(256)) * 8192  # 2 MiB


class Seen:
    """What reads send; gives them an answer where there is one."""

    def __init__(self) -> None:
        self.answer: Any = None
        self.reads: list[Any] = []
        self._lock = threading.Lock()

    def __call__(self, request: Any) -> Any:
        if request.method != "GET" or "list-type" in request.path:
            return None
        with self._lock:
            self.reads.append(request)
        return self.answer

    def signatures(self) -> set[str]:
        return {request.headers["Authorization"] for request in self.reads}


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def storage(
    seen: Seen, fronted: Callable[..., str], opened: Callable[..., S3Storage], put: Callable[..., str]
) -> S3Storage:
    """A storage whose reads are seen."""
    put("ranges/object", CONTENT)
    storage = opened(AWS_ENDPOINT_URL=fronted(seen))
    storage.stat("ranges/object")
    return storage


def _read(storage: S3Storage, part: int = 0, key: str = "ranges/object", version: str | None = None) -> bytes:
    memory = bytearray(10_000)
    done = storage.read_into(key, part * 10_000, memoryview(memory), version=version)
    return bytes(memory[:done])


def test_the_reads_of_an_object_share_a_signature(storage: S3Storage, seen: Seen, put: Callable[..., str]) -> None:
    """They differ in what is not signed; another object's have another."""
    put("ranges/other", CONTENT)
    etag = storage.stat("ranges/object").version
    first = _read(storage, 0, version=etag)
    with ThreadPoolExecutor(4) as pool:
        parts = [first, *pool.map(lambda part: _read(storage, part, version=etag), range(1, 11))]

    assert CONTENT == b"".join(parts)
    assert 1 == len(seen.signatures())
    assert 11 == len({request.headers["Range"] for request in seen.reads})
    assert {etag} == {request.headers["If-Match"] for request in seen.reads}
    assert not any("range" in signature.lower() for signature in seen.signatures())

    assert CONTENT[:10_000] == _read(storage, key="ranges/other")
    assert 2 == len(seen.signatures())


def test_a_signature_is_used_for_a_minute(
    seen: Seen, fronted: Callable[..., str], opened: Callable[..., S3Storage], put: Callable[..., str]
) -> None:
    """S3 takes it for fifteen; clocks may differ by some."""
    put("ranges/object", CONTENT)
    now = [0.0]
    storage = opened(AWS_ENDPOINT_URL=fronted(seen), clock=lambda: now[0])
    for now[0] in (0.0, 50.0, 61.0, 100.0):
        assert CONTENT[:10_000] == _read(storage)

    made = [request.headers["Amz-Sdk-Invocation-Id"] for request in seen.reads]  # one for each that botocore prepares
    assert made[0] == made[1] != made[2] == made[3]


ERROR = "<Error><Code>{}</Code><Message>as S3 says it</Message></Error>"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "NoSuchKey", NotFoundError),
        (412, "PreconditionFailed", SourceChangedError),
        (429, "TooManyRequests", ThrottledError),
        (500, "InternalError", UnavailableError),
        (503, "SlowDown", ThrottledError),
    ],
)
def test_an_answer_that_only_s3_can_change_is_not_asked_for_twice(
    storage: S3Storage, seen: Seen, status: int, code: str, expected: type[BackendError]
) -> None:
    """Above all, a server that is asked too much is not asked again at once."""
    seen.answer = status, {"Retry-After": "7"}, ERROR.format(code).encode()

    with pytest.raises(expected) as caught:
        _read(storage)

    assert 1 == len(seen.reads)
    if expected is ThrottledError:
        assert 7 == caught.value.retry_after_seconds
    seen.answer = None
    assert CONTENT[:10_000] == _read(storage)


def test_botocore_judges_a_refusal_without_a_second_request(storage: S3Storage, seen: Seen) -> None:
    """It signs anew, has no other credentials, and its error is the one that is raised."""
    _read(storage)
    seen.answer = 403, {}, ERROR.format("AccessDenied").encode()

    with pytest.raises(AccessDeniedError):
        _read(storage)

    assert 2 == len(seen.reads)
    assert 1 == len({request.headers["Amz-Sdk-Invocation-Id"] for request in seen.reads})


def test_an_object_that_changed_is_noticed(storage: S3Storage, put: Callable[..., str]) -> None:
    """The version is compared by S3, though no signature covers it."""
    etag = storage.stat("ranges/object").version
    put("ranges/object", CONTENT[::-1])

    with pytest.raises(SourceChangedError):
        _read(storage, version=etag)


def test_botocore_opens_no_connection_to_s3(storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings, HEADs and reads all go over core's connections, which know proxies, patience and closing."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("botocore sent a request")

    monkeypatch.setattr("botocore.httpsession.URLLib3Session.send", refuse)

    assert CONTENT[:20_000] == _read(storage, 0) + _read(storage, 1)
    assert len(CONTENT) == storage.stat("ranges/object").size
    assert "ranges/object" in [info.path for info in storage.list("ranges")]


def test_an_anonymous_read_carries_no_signature(
    seen: Seen, fronted: Callable[..., str], opened: Callable[..., S3Storage], put: Callable[..., str]
) -> None:
    """Nor does it look for one."""
    put("ranges/object", CONTENT, bucket="public")
    storage = opened("s3://public", AWS_ENDPOINT_URL=fronted(seen), MX_S3_ANONYMOUS="1")
    storage.stat("ranges/object")

    assert CONTENT[:10_000] == _read(storage)
    assert [None] == [request.headers["Authorization"] for request in seen.reads]


# -- connections that misbehave ---------------------------------------------------------------------------------------


@pytest.fixture
def broken(
    proxied: Callable[..., tuple[S3Storage, TcpProxy]], put: Callable[..., str]
) -> Callable[[Fault], tuple[S3Storage, TcpProxy]]:
    """Opens a storage, with one idle connection, to whose first read something happens."""
    put("ranges/long", LONG)

    def broken(fault: Fault) -> tuple[S3Storage, TcpProxy]:
        reads = iter([fault])
        storage, proxy = proxied(lambda _, head: next(reads, None) if head.startswith(b"GET") else None)
        storage.stat("ranges/long")
        storage.patience_seconds = 0.3
        return storage, proxy

    return broken


@pytest.mark.parametrize("kind", ["reset", "truncate", "stall"])
@pytest.mark.parametrize("after_bytes", [0, 1, 5000, 100_000, 1_500_000])
def test_every_byte_before_a_break_counts(
    broken: Callable[[Fault], tuple[S3Storage, TcpProxy]], kind: Any, after_bytes: int
) -> None:
    """The next read goes on where they end, over another connection."""
    storage, proxy = broken(Fault(kind, after_bytes=after_bytes, of_body=True))
    memory = bytearray(len(LONG))

    if after_bytes:
        done = storage.read_into("ranges/long", 0, memoryview(memory), version=None)
    else:
        with pytest.raises((UnavailableError, DeadlineError)):
            storage.read_into("ranges/long", 0, memoryview(memory), version=None)
        done = 0

    assert after_bytes == done or kind == "reset"  # which may overtake what was sent before
    assert done <= after_bytes
    assert len(LONG) - done == storage.read_into("ranges/long", done, memoryview(memory)[done:], version=None)
    assert LONG == memory
    assert 2 == proxy.connections


@pytest.mark.parametrize("kind", ["reset", "truncate", "stall"])
@pytest.mark.parametrize("after_bytes", [0, 20])
def test_an_answer_that_breaks_amid_its_head_may_be_tried_again(
    broken: Callable[[Fault], tuple[S3Storage, TcpProxy]], kind: Any, after_bytes: int
) -> None:
    """Silence is a deadline, which says how long it was; all else is a connection that broke."""
    storage, _ = broken(Fault(kind, after_bytes=after_bytes))
    expected = DeadlineError if kind == "stall" else UnavailableError

    with pytest.raises(expected, match="0.3 s" if kind == "stall" else "broke") as caught:
        storage.read_into("ranges/long", 0, memoryview(bytearray(len(LONG))), version=None)

    assert caught.value.retryable
    assert len(LONG) == storage.read_into("ranges/long", 0, memoryview(bytearray(len(LONG))), version=None)


def test_reads_of_one_thread_use_one_connection(
    proxied: Callable[..., tuple[S3Storage, TcpProxy]], put: Callable[..., str]
) -> None:
    """Errors in between leave it usable, too; what is shorter than was asked for does as well."""
    put("ranges/long", LONG)
    storage, proxy = proxied()
    storage.stat("ranges/long")
    memory = memoryview(bytearray(2 * len(LONG)))

    for _ in range(5):
        assert len(LONG) == storage.read_into("ranges/long", 0, memory, version=None)
        with pytest.raises(NotFoundError):
            storage.read_into("ranges/missing", 0, memory, version=None)

    assert 1 == proxy.connections


def test_closing_ends_a_read(broken: Callable[[Fault], tuple[S3Storage, TcpProxy]]) -> None:
    """At once, though the kernel waits for a whole piece."""
    storage, _ = broken(Fault("stall", after_bytes=100_000))
    storage.patience_seconds = 30
    timer = threading.Timer(0.3, storage.close)
    timer.start()
    begun = time.monotonic()

    with pytest.raises(BackendError, match="closed"):
        storage.read_into("ranges/long", 0, memoryview(bytearray(len(LONG))), version=None)

    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 206 P\r\n%s\r\nTransfer-Encoding: chunked\r\n\r\nA\r\n0123456789\r\n0\r\n\r\n",
        b"HTTP/1.0 206 P\r\n%s\r\nContent-Length: 10\r\n\r\n0123456789",
    ],
    ids=["chunked", "HTTP/1.0"],
)
def test_answers_of_other_kinds_are_read_too(opened: Callable[..., S3Storage], answer: bytes) -> None:
    """Proxies may change how an answer is sent."""
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nETag: v\r\nContent-Length: 20\r\n\r\n"
    answer %= b"Connection: close\r\nContent-Range: bytes 0-9/20"
    with _answering(lambda request: head if request.startswith(b"HEAD") else answer) as port:
        storage = opened(AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
        storage.stat("any")
        memory = bytearray(10)

        for _ in range(3):
            assert 10 == storage.read_into("any", 0, memoryview(memory), version=None)
            assert b"0123456789" == memory


def test_what_comes_after_the_content_is_no_part_of_it(opened: Callable[..., S3Storage]) -> None:
    """Even where it comes at once, and the server promised more in another header."""
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nETag: v\r\nContent-Length: 20\r\n\r\n"
    answer = b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-9/20\r\nContent-Length: 4\r\n\r\n0123XXXXXXXX"
    with _answering(lambda request: head if request.startswith(b"HEAD") else answer) as port:
        storage = opened(AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
        storage.stat("any")
        memory = bytearray(10)

        assert 4 == storage.read_into("any", 0, memoryview(memory), version=None)
        assert b"0123\0\0\0\0\0\0" == memory


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"HTTP/1.1 206 P\r\nx: " + b"y" * 100_000])
def test_what_is_no_answer_is_a_broken_connection(opened: Callable[..., S3Storage], answer: bytes) -> None:
    """Whatever it is, it is not taken for content."""
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nETag: v\r\nContent-Length: 20\r\n\r\n"
    with _answering(lambda request: head if request.startswith(b"HEAD") else answer) as port:
        storage = opened(AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
        storage.stat("any")

        with pytest.raises(UnavailableError, match="broke"):
            storage.read_into("any", 0, memoryview(bytearray(10)), version=None)


@contextlib.contextmanager
def _answering(answer: Callable[[bytes], bytes]) -> Iterator[int]:
    """The port of a server that answers one request of each connection, byte for byte, and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.sendall(answer(connection.recv(65536)))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()
