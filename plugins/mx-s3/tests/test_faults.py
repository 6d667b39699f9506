"""What a network or a server that misbehaves does to reads: a proxy before the real server, or a scripted one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from devtools.network import full_port
from devtools.seaweedfs import SeaweedFS
from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.errors import (
    BackendError,
    DeadlineError,
    NotFoundError,
    SourceChangedError,
    UnavailableError,
    UnsupportedError,
)
from mx_s3._storage import S3Storage
from tests.support.network import CLOSED_PORT

CONTENT = bytes(range(256)) * 8192  # 2 MiB


@pytest.fixture
def etag(put: Callable[..., str]) -> str:
    return put("faults/object", CONTENT)


def _first(fault: Fault) -> Callable[[int, bytes], Fault | None]:
    return lambda number, _: fault if number == 0 else None


def _always(fault: Fault) -> Callable[[int, bytes], Fault | None]:
    return lambda _number, _head: fault


@pytest.mark.parametrize("kind", ["reset", "truncate"])
def test_a_connection_that_breaks_gives_a_short_count(
    proxied: Callable[..., tuple[S3Storage, TcpProxy]], etag: str, kind: Any
) -> None:
    """The bytes before the break count and are right; the next call goes on where they end."""
    storage, proxy = proxied(_first(Fault(kind, after_bytes=1_500_000)))
    memory = bytearray(len(CONTENT))

    done = storage.read_into("faults/object", 0, memoryview(memory), version=etag)

    assert 1_000_000 < done < 1_500_000
    assert CONTENT[:done] == memory[:done]
    rest = storage.read_into("faults/object", done, memoryview(memory)[done:], version=etag)
    assert len(CONTENT) - done == rest
    assert CONTENT == memory
    assert 2 == proxy.connections


@pytest.mark.parametrize("kind", ["reset", "truncate"])
@pytest.mark.parametrize("operation", ["list", "stat", "read"])
def test_a_connection_that_breaks_before_any_byte_may_be_tried_again(
    proxied: Callable[..., tuple[S3Storage, TcpProxy]], etag: str, kind: Any, operation: str
) -> None:
    """UnavailableError, retryable, and the same storage works at the next try."""
    storage, _ = proxied(_first(Fault(kind)))
    calls: dict[str, Callable[[], Any]] = {
        "list": lambda: list(storage.list("faults")),
        "stat": lambda: storage.stat("faults/object"),
        "read": lambda: storage.read_into("faults/object", 0, memoryview(bytearray(9)), version=etag),
    }

    with pytest.raises(UnavailableError, match="broke") as caught:
        calls[operation]()

    assert caught.value.retryable
    assert calls[operation]()


def test_silence_is_a_deadline(proxied: Callable[..., tuple[S3Storage, TcpProxy]], etag: str) -> None:
    """Where no answer comes within the read timeout, the read may be tried again."""
    storage, _ = proxied(_always(Fault("stall")), MX_S3_READ_TIMEOUT_SECONDS="0.3")
    started = time.monotonic()

    with pytest.raises(DeadlineError, match="MX_S3_READ_TIMEOUT_SECONDS") as caught:
        storage.read_into("faults/object", 0, memoryview(bytearray(9)), version=etag)

    assert caught.value.retryable
    assert "sent nothing for 0.3 s [TimeoutError]" in str(caught.value)
    assert 0.25 < time.monotonic() - started < 5


def test_silence_amid_the_body_gives_a_short_count(
    proxied: Callable[..., tuple[S3Storage, TcpProxy]], etag: str
) -> None:
    """What came before the silence counts."""
    storage, _ = proxied(_always(Fault("stall", after_bytes=1_500_000)), MX_S3_READ_TIMEOUT_SECONDS="0.3")
    memory = bytearray(len(CONTENT))

    done = storage.read_into("faults/object", 0, memoryview(memory), version=etag)

    assert 1_000_000 < done < 1_500_000
    assert CONTENT[:done] == memory[:done]


def test_patience_ends_a_read_in_silence(proxied: Callable[..., tuple[S3Storage, TcpProxy]], etag: str) -> None:
    """A read that waited for patience_seconds gives up, long before the read timeout, and says how long it waited."""
    storage, _ = proxied(_always(Fault("stall")), MX_S3_READ_TIMEOUT_SECONDS="60")
    storage.patience_seconds = 0.3
    started = time.monotonic()

    with pytest.raises(DeadlineError, match=r"sent nothing for 0\.3 s") as caught:
        storage.read_into("faults/object", 0, memoryview(bytearray(len(CONTENT))), version=etag)

    assert caught.value.retryable
    assert 0.25 < time.monotonic() - started < 5


def test_patience_ends_a_read_before_a_piece_is_whole(
    proxied: Callable[..., tuple[S3Storage, TcpProxy]], etag: str
) -> None:
    """The first bytes count, however few arrived before the silence."""
    storage, _ = proxied(_always(Fault("stall", after_bytes=100_000)), MX_S3_READ_TIMEOUT_SECONDS="60")
    storage.patience_seconds = 0.3
    memory = bytearray(len(CONTENT))
    started = time.monotonic()

    done = storage.read_into("faults/object", 0, memoryview(memory), version=etag)

    assert 90_000 < done < 100_000
    assert CONTENT[:done] == memory[:done]
    assert time.monotonic() - started < 5


def test_patience_set_amid_a_body_holds_for_its_rest(
    proxied: Callable[..., tuple[S3Storage, TcpProxy]], etag: str, until: Callable[[Callable[[], object]], None]
) -> None:
    """What arrived before the silence counts, though the patience was set after the read had begun."""

    def policy(_number: int, _head: bytes) -> Fault:
        storage.patience_seconds = 0.3  # the request is under way
        return Fault("stall", after_bytes=1_500_000)

    storage, _ = proxied(policy, MX_S3_READ_TIMEOUT_SECONDS="60")
    memory = bytearray(len(CONTENT))
    started = time.monotonic()

    done = storage.read_into("faults/object", 0, memoryview(memory), version=etag)

    assert 1_000_000 < done < 1_500_000
    assert CONTENT[:done] == memory[:done]
    assert time.monotonic() - started < 5


def test_patience_has_a_bound_and_concerns_reads_alone(
    proxied: Callable[..., tuple[S3Storage, TcpProxy]], etag: str
) -> None:
    """It begins with the read timeout, never exceeds it, and a server may take longer over stat and list."""
    storage, _ = proxied(_always(Fault("delay", seconds=0.4)), MX_S3_READ_TIMEOUT_SECONDS="50")
    begun = storage.patience_seconds
    storage.patience_seconds = 100.0
    raised = storage.patience_seconds
    storage.patience_seconds = 0.1

    assert (50.0, 50.0) == (begun, raised)
    assert len(CONTENT) == storage.stat("faults/object").size
    assert ["faults/object"] == [info.path for info in storage.list("faults")]
    with pytest.raises(DeadlineError):
        storage.read_into("faults/object", 0, memoryview(bytearray(9)), version=etag)


def test_a_slow_answer_is_no_fault(proxied: Callable[..., tuple[S3Storage, TcpProxy]], etag: str) -> None:
    """A delay below the read timeout changes nothing."""
    storage, _ = proxied(_always(Fault("delay", after_bytes=1000, seconds=0.2)))
    memory = bytearray(len(CONTENT))

    assert len(CONTENT) == storage.read_into("faults/object", 0, memoryview(memory), version=etag)
    assert CONTENT == memory


@pytest.mark.parametrize("after_bytes", [0, 1_000_000], ids=["before the answer", "amid the body"])
def test_close_ends_reads_in_other_threads(
    proxied: Callable[..., tuple[S3Storage, TcpProxy]],
    etag: str,
    until: Callable[[Callable[[], object]], None],
    after_bytes: int,
) -> None:
    """A read that waits fails at once, for good, and says that the storage was closed; so does a later one."""
    storage, proxy = proxied(_always(Fault("stall", after_bytes=after_bytes)), MX_S3_READ_TIMEOUT_SECONDS="60")
    memory = bytearray(len(CONTENT))
    errors: list[BackendError] = []

    def read() -> None:
        try:
            storage.read_into("faults/object", 0, memoryview(memory), version=etag)
        except BackendError as exc:
            errors.append(exc)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: proxy.requests == 4 and (not after_bytes or memory[500_001]))
    started = time.monotonic()
    storage.close()
    for thread in threads:
        thread.join(10)

    assert time.monotonic() - started < 2
    assert 4 == len(errors)
    assert {False} == {error.retryable for error in errors}
    assert all("the storage was closed" in str(error) for error in errors)
    with pytest.raises(BackendError, match="the storage was closed"):
        storage.stat("faults/object")
    with pytest.raises(BackendError, match="the storage was closed"):
        list(storage.list("faults"))
    storage.close()


def test_nothing_listens(opened: Callable[..., S3Storage]) -> None:
    """A refused connection may be tried again: servers restart."""
    endpoint = f"http://127.0.0.1:{CLOSED_PORT}"
    storage = opened(AWS_ENDPOINT_URL=endpoint)

    with pytest.raises(UnavailableError, match=f"{endpoint} refused the connection") as caught:
        storage.stat("any")

    assert caught.value.retryable


def test_a_host_that_does_not_exist(opened: Callable[..., S3Storage]) -> None:
    """A name that does not resolve is reported as that."""
    storage = opened(AWS_ENDPOINT_URL="http://no-such-host.invalid")

    with pytest.raises(
        UnavailableError, match=r"the name of the endpoint http://no-such-host\.invalid does not resolve"
    ):
        storage.stat("any")


@pytest.fixture
def deaf_port() -> Iterator[int]:
    with full_port() as port:
        yield port


def test_a_host_that_does_not_accept_in_time(opened: Callable[..., S3Storage], deaf_port: int) -> None:
    """The connect timeout ends the wait, and names firewalls."""
    storage = opened(AWS_ENDPOINT_URL=f"http://127.0.0.1:{deaf_port}", MX_S3_CONNECT_TIMEOUT_SECONDS="0.3")

    with pytest.raises(DeadlineError, match="firewall") as caught:
        storage.stat("any")

    assert caught.value.retryable


def test_https_to_a_port_that_speaks_http(server: SeaweedFS, opened: Callable[..., S3Storage]) -> None:
    """The scheme is pointed at; trying again would not help."""
    storage = opened(AWS_ENDPOINT_URL=server.endpoint.replace("http:", "https:"))

    with pytest.raises(UnavailableError, match="no TLS connection") as caught:
        storage.stat("any")

    assert not caught.value.retryable
    assert "scheme and port of AWS_ENDPOINT_URL" in str(caught.value)


def _range_of(first: int, last: int, total: int = 100, **headers: str) -> dict[str, str]:
    return {"Content-Range": f"bytes {first}-{last}/{total}", "ETag": '"v1"', **headers}


def _read(storage: S3Storage, offset: int = 10, length: int = 10, version: str | None = '"v1"') -> bytes:
    memory = bytearray(length)
    count = storage.read_into("object", offset, memoryview(memory), version=version)
    return bytes(memory[:count])


def test_a_scripted_server_that_ignores_ranges_is_refused(scripted: Callable[..., S3Storage]) -> None:
    """A 200 with the whole object is never taken for the range."""
    storage = scripted((200, {"ETag": '"v1"'}, bytes(100)))

    with pytest.raises(UnsupportedError, match="the whole object") as caught:
        _read(storage)

    assert not caught.value.retryable
    assert "AWS_ENDPOINT_URL" in str(caught.value)


def test_a_scripted_server_that_ignores_ranges_is_read_from_the_start(scripted: Callable[..., S3Storage]) -> None:
    """A 200 does hold the range that begins at 0; the rest of it is not waited for."""
    storage = scripted((200, {"ETag": '"v1"'}, bytes(range(100))))

    assert bytes(range(10)) == _read(storage, 0)
    assert bytes(range(100)) == _read(storage, 0, 200)


@pytest.mark.parametrize("answered", [(0, 9), (11, 20), (20, 10)])
def test_a_scripted_server_that_sends_another_range_is_refused(
    scripted: Callable[..., S3Storage], answered: tuple[int, int]
) -> None:
    """The Content-Range has to begin where the read does."""
    storage = scripted((206, _range_of(*answered), bytes(10)))

    with pytest.raises(UnsupportedError, match=f"other bytes: bytes {answered[0]}-{answered[1]}/100"):
        _read(storage)


def test_a_scripted_server_that_sends_more_than_was_asked_for(scripted: Callable[..., S3Storage]) -> None:
    """Only what was asked for is taken."""
    storage = scripted((206, _range_of(10, 99), bytes(range(10, 100))))

    assert bytes(range(10, 20)) == _read(storage)


def test_a_scripted_server_that_ignores_if_match_is_noticed(scripted: Callable[..., S3Storage]) -> None:
    """The ETag of the answer is compared too."""
    storage = scripted((206, _range_of(10, 19, ETag='"v2"'), bytes(10)))

    with pytest.raises(SourceChangedError, match="If-Match was ignored"):
        _read(storage)


def test_a_scripted_server_that_closes_after_the_headers(scripted: Callable[..., S3Storage]) -> None:
    """An answer without its body may be tried again."""
    storage = scripted((206, {**_range_of(10, 19), "Content-Length": "10"}, b""))

    with pytest.raises(UnavailableError, match="closed before the first byte") as caught:
        _read(storage)

    assert caught.value.retryable


@pytest.mark.parametrize("status", [200, 500])
def test_a_scripted_server_that_speaks_something_else(scripted: Callable[..., S3Storage], status: int) -> None:
    """The page of a proxy is no listing; the server behind it may come back."""
    storage = scripted((status, {}, b"<html><body>Welcome</html>"))

    with pytest.raises(UnavailableError) as caught:
        list(storage.list("any"))

    assert caught.value.retryable
    assert caught.value.hint


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", UnavailableError, "not of the S3 protocol"),
        (b"<html><body>Sign in</body></html>", UnavailableError, "HTTPS_PROXY"),
        (b"<ListAllMyBucketsResult><Buckets/></ListAllMyBucketsResult>", NotFoundError, "MX_S3_ADDRESSING_STYLE=path"),
    ],
)
def test_a_scripted_answer_that_is_no_listing(
    scripted: Callable[..., S3Storage], body: bytes, kind: type[BackendError], says: str
) -> None:
    """It is not taken for a listing without objects; the list of buckets points at the style of addresses."""
    storage = scripted((200, {"Content-Type": "text/html"}, body))

    with pytest.raises(kind, match=says):
        list(storage.list("model"))


def test_a_scripted_server_that_asks_for_patience(scripted: Callable[..., S3Storage]) -> None:
    """A 503 may be tried again, after as long as it says; botocore itself does not try again."""
    body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    storage = scripted((503, {"Retry-After": "7", "x-amz-request-id": "REQ1"}, body))

    with pytest.raises(UnavailableError, match=r"HTTP 503, SlowDown, request REQ1: Please reduce") as caught:
        _read(storage)

    assert caught.value.retryable
    assert 7.0 == caught.value.retry_after_seconds
