"""Ranges from servers that send something else, break, or refuse; with a signer of the tests' own."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import trustme

from devtools.http_proxy import HttpProxy
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
from modelexpress_core.storage.http import (
    ConnectionPool,
    Failures,
    Proxies,
    RangeReader,
    Refusal,
    Request,
    SettingNames,
    VersionHeaders,
)
from modelexpress_core.uri import ModelURI
from tests.support.http_servers import ByteServer, answering, server_context

CONTENT = bytes(range(100))


class Tokens:
    """Signs with a token; has ``spare`` others."""

    def __init__(self, url: str, spare: Sequence[str] = ()) -> None:
        self.url = url
        self.token = "first"
        self.spare = list(spare)
        self.refusals: list[list[Refusal]] = []

    def request(self, path: str, headers: Mapping[str, str]) -> Request:
        signed = Request.to_url("GET", f"{self.url}/{path}", [("Authorization", f"Bearer {self.token}")])
        return signed.with_headers(headers)

    def renewed(self, path: str, headers: Mapping[str, str], refusals: Sequence[Refusal]) -> Request | None:
        self.refusals.append(list(refusals))
        if refusals[-1].status not in {302, 401} or not self.spare:
            return None
        self.token = self.spare.pop(0)
        if self.token.startswith("http"):  # a place that is asked without a token
            return Request.to_url("GET", f"{self.token}/{path}").with_headers(headers)
        return self.request(path, headers)


Reading = Callable[..., RangeReader]


@pytest.fixture
def reader() -> Iterator[Reading]:
    """Makes readers of a server; they end with the test."""
    with contextlib.ExitStack() as stack:

        def reader(
            signer: Tokens | str, ca_bundle: str | None = None, proxies: Proxies | None = None, **options: Any
        ) -> RangeReader:
            signer = Tokens(signer) if isinstance(signer, str) else signer
            pool = ConnectionPool(connect_timeout_seconds=5, ca_bundle=ca_bundle, proxies=proxies)
            stack.callback(pool.close)
            failures = Failures(
                "mx-web",
                ModelURI("web", "host"),
                endpoint=lambda: "http://host",
                names=SettingNames(),
                closed=lambda: pool.closed,
            )
            made = RangeReader(pool, signer, failures, **{"read_timeout_seconds": 5.0, **options})
            made.close = pool.close  # type: ignore[attr-defined]
            return made

        yield reader


@contextlib.contextmanager
def server(answer: Callable[[bytes], bytes | None] | bytes, **options: Any) -> Iterator[tuple[str, ByteServer]]:
    with answering(answer, **options) as started:
        yield f"http{'s' if options.get('context') else ''}://127.0.0.1:{started.port}", started


def read(reader: RangeReader, offset: int = 10, length: int = 10, version: str | None = '"v1"') -> bytes:
    memory = bytearray(length)
    done = reader.read_into("object", offset, memoryview(memory), version=version)
    assert bytes(length - done) == memory[done:]
    return bytes(memory[:done])


def part(first: int = 10, last: int = 19, *lines: str, status: str = "206 Partial Content") -> bytes:
    content = CONTENT[first : last + 1]
    range_line = f"Content-Range: bytes {first}-{last}/100" if status.startswith("206") else "X: y"
    head = [f"HTTP/1.1 {status}", range_line, 'ETag: "v1"', f"Content-Length: {len(content)}", *lines]
    return "".join(f"{line}\r\n" for line in head).encode() + b"\r\n" + content


def ranges(request: bytes) -> bytes:
    """What a good server answers."""
    (line,) = [line for line in request.split(b"\r\n") if line.lower().startswith(b"range: bytes=")]
    first, _, last = line[len(b"Range: bytes=") :].partition(b"-")
    return part(int(first), min(int(last), 99))


# -- what is asked for -------------------------------------------------------------------------------------------------


def test_a_range_is_read_into_place(reader: Reading) -> None:
    """With one request that says which bytes of which version, over one connection."""
    with server(ranges) as (url, started):
        reading = reader(url)

        assert [CONTENT[10:20], CONTENT[90:], CONTENT[:1]] == [
            read(reading),
            read(reading, 90, 20),
            read(reading, 0, 1, None),
        ]
        assert ["bytes=10-19", "bytes=90-109", "bytes=0-0"] == started.header("Range")
        assert ['"v1"', '"v1"'] == started.header("If-Match")
        assert ["identity"] * 3 == started.header("Accept-Encoding")
        assert 1 == started.connections


def test_versions_may_have_headers_of_their_own(reader: Reading) -> None:
    """Generations instead of ETags, for one."""
    versions = VersionHeaders("x-if-generation", "x-generation")
    with server(part(10, 19, "X-Generation: 8")) as (url, started):
        reading = reader(url, versions=versions)

        assert CONTENT[10:20] == read(reading, version="8")
        with pytest.raises(SourceChangedError, match="another version, 8, and x-if-generation was ignored") as caught:
            read(reading, version="7")
        assert "replaced the object" in str(caught.value.cause)
        assert ["8", "7"] == started.header("X-If-Generation")


# -- answers that hold something else ----------------------------------------------------------------------------------


def _wrong(content_range: str) -> bytes:
    return part().replace(b"bytes 10-19/100", content_range.encode())


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (part(0, 99, status="200 OK"), UnsupportedError, "the whole object"),
        (part(0, 9), UnsupportedError, "other bytes: bytes 0-9/100"),
        (part(11, 20), UnsupportedError, "other bytes"),
        (_wrong("bytes 20-10/100"), UnsupportedError, "other bytes"),
        (_wrong("bytes 10-9/100"), UnsupportedError, "other bytes"),
        (_wrong("bytes 10-9/*"), UnsupportedError, "other bytes"),
        (_wrong("bytes 10-9/10"), SourceChangedError, "no bytes: bytes 10-9/10"),
        (_wrong("bytes -10-19/100"), UnsupportedError, "other bytes"),
        (_wrong("bytes */100"), UnsupportedError, "other bytes"),
        (_wrong("items 10-19/100"), UnsupportedError, "other bytes"),
        (_wrong("bytes 10-19/100, bytes 30-39/100"), UnsupportedError, "other bytes"),
        (_wrong("bytes \u0661\u0660-19/100"), UnsupportedError, "other bytes"),
        (part().replace(b"Content-Range", b"X-Range"), UnsupportedError, "the whole object"),
        (part().replace(b"206 Partial Content", b"200 OK"), UnsupportedError, "other bytes: bytes 10-19/100"),
        (
            part(10, 19, "Content-Type: multipart/byteranges; boundary=x").replace(b"Content-Range", b"X"),
            UnsupportedError,
            "the whole object",
        ),
        (part().replace(b'"v1"', b'"v2"'), SourceChangedError, "If-Match was ignored"),
        (part().replace(b"ETag", b"X-Tag"), UnsupportedError, "no header etag"),
        (part(0, 99, status="200 OK").replace(b"ETag", b"X-Tag"), UnsupportedError, "no header etag"),
        (part(10, 19, "Content-Encoding: gzip"), UnsupportedError, "encoded: gzip"),
        (part(10, 19, "Content-Encoding: br, gzip"), UnsupportedError, "encoded: br, gzip"),
    ],
)
def test_other_bytes_are_never_delivered(reader: Reading, answer: bytes, error: type[BackendError], words: str) -> None:
    """The memory stays as it was, and the connection, which has the rest of that answer, is not used again."""
    with server(answer) as (url, started):
        reading = reader(url)
        memory = bytearray(10)
        for _ in range(2):
            with pytest.raises(error, match=words) as caught:
                reading.read_into("object", 10, memoryview(memory), version='"v1"')

        assert bytes(10) == memory
        assert error is type(caught.value)
        assert caught.value.hint
        assert 2 == started.connections


def test_the_whole_object_from_its_start(reader: Reading) -> None:
    """A 200 does hold the range that begins at 0; what is longer is not read."""
    with server(part(0, 99, status="200 OK")) as (url, _):
        assert CONTENT[:10] == read(reader(url), 0)
        assert CONTENT == read(reader(url), 0, 200)


def test_more_than_was_asked_for_is_left(reader: Reading) -> None:
    """Nothing is written behind the buffer."""
    with server(part(10, 99)) as (url, _):
        memory = bytearray(30)

        assert 10 == reader(url).read_into("object", 10, memoryview(memory)[10:20], version=None)
        assert bytes(10) + CONTENT[10:20] + bytes(10) == memory


def test_a_content_that_is_longer_than_its_range(reader: Reading) -> None:
    """The bytes that the answer says it holds are taken, and no others."""
    with server(part(10, 19).replace(b"bytes 10-19/100", b"bytes 10-13/100")) as (url, _):
        assert CONTENT[10:14] == read(reader(url))


@pytest.mark.parametrize("value", ["aws-chunked", "AWS-Chunked, identity", "identity", ""])
def test_an_encoding_that_means_nothing_may_be_ignored(reader: Reading, value: str) -> None:
    """Some services show how the object was uploaded."""
    with server(part(10, 19, f"Content-Encoding: {value}")) as (url, _):
        assert CONTENT[10:20] == read(reader(url, ignored_encodings=("aws-chunked",)))


def test_an_ignored_encoding_hides_no_other(reader: Reading) -> None:
    """The content is encoded with the second one."""
    with (
        server(part(10, 19, "Content-Encoding: aws-chunked, gzip")) as (url, _),
        pytest.raises(UnsupportedError, match="encoded: aws-chunked, gzip"),
    ):
        read(reader(url, ignored_encodings=("aws-chunked",)))


def test_an_object_that_was_decoded_on_the_way_is_refused(reader: Reading) -> None:
    """A service that decodes stored objects says so in a header of its own; the answer is no range of the object."""
    answer = part(0, 9, "X-Stored-Encoding: gzip").replace(b"206 Partial Content", b"200 OK")
    headers = ("content-encoding", "x-stored-encoding")

    with server(answer) as (url, _), pytest.raises(UnsupportedError, match="encoded: gzip"):
        reader(url, encoding_headers=headers).read_into("object", 0, memoryview(bytearray(10)), version=None)


def test_chunked_answers(reader: Reading) -> None:
    """Proxies may send a range so."""
    chunks = b"4\r\n%s\r\n6\r\n%s\r\n0\r\n\r\n" % (CONTENT[10:14], CONTENT[14:20])
    answer = part().replace(b"Content-Length: 10", b"Transfer-Encoding: chunked")[:-10] + chunks
    with server(answer) as (url, _):
        assert CONTENT[10:20] == read(reader(url))


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 206 P\r\nx: " + b"y" * 100_000,
        b"HTTP/1.1 206 P\r\n" + b"x: y\r\n" * 100_000,
        part().replace(b"Content-Length: 10", b"Content-Length: 10\r\nTransfer-Encoding: chunked"),
        part().replace(b"Content-Length: 10", b"Content-Length: 10\r\nContent-Length: 11"),
    ],
)
def test_what_is_no_answer(reader: Reading, answer: bytes) -> None:
    """It is a broken connection, which may be tried again."""
    with server(answer) as (url, _), pytest.raises(UnavailableError, match="broke") as caught:
        read(reader(url))

    assert caught.value.retryable


def test_a_head_that_drips(reader: Reading) -> None:
    """A byte at a time, each in time, is silence in the end."""

    def drip(sock: socket.socket, content: bytes) -> None:
        for byte in content:
            sock.sendall(bytes([byte]))
            time.sleep(0.05)

    with server(part(), piece=drip) as (url, _):
        reading = reader(url)
        reading.patience_seconds = 0.3
        begun = time.monotonic()

        with pytest.raises(DeadlineError):
            read(reading)
        assert time.monotonic() - begun < 3


# -- answers that break ------------------------------------------------------------------------------------------------


def _cut(count: int) -> Callable[[socket.socket, bytes], None]:
    def send(sock: socket.socket, content: bytes) -> None:
        sock.sendall(content[: content.index(b"\r\n\r\n") + 4 + count])
        sock.shutdown(socket.SHUT_RDWR)

    return send


def test_a_break_gives_a_short_count(reader: Reading) -> None:
    """And where nothing arrived, an error that may be tried again."""
    with server(ranges, piece=_cut(4)) as (url, _):
        assert CONTENT[10:14] == read(reader(url))
    with server(ranges, piece=_cut(0)) as (url, _), pytest.raises(UnavailableError, match="before the first") as caught:
        read(reader(url))
    assert caught.value.retryable


@pytest.mark.parametrize("tls", [False, True])
def test_silence_gives_a_short_count(reader: Reading, tmp_path: Path, tls: bool) -> None:
    """After the patience of the moment, which has a bound."""
    context, authority = server_context(tmp_path, "127.0.0.1")
    silent = threading.Event()

    def send(sock: socket.socket, content: bytes) -> None:
        sock.sendall(content[:-6])
        silent.wait(5)

    with server(ranges, piece=send, context=context if tls else None) as (url, _):
        reading = reader(url, authority)
        reading.patience_seconds = 100
        assert 5.0 == reading.patience_seconds
        reading.patience_seconds = 0.3
        begun = time.monotonic()

        assert CONTENT[10:14] == read(reading)
        assert time.monotonic() - begun < 3
        silent.set()


@pytest.mark.parametrize("arrived", [0, 4])
def test_closing_ends_a_read(reader: Reading, arrived: int) -> None:
    """For good: it is not tried again, also where some bytes had arrived."""

    def send(sock: socket.socket, content: bytes) -> None:
        if arrived:
            sock.sendall(content[: arrived - 10])
        time.sleep(1)

    with server(ranges, piece=send) as (url, _):
        reading: Any = reader(url)
        threading.Timer(0.2, reading.close).start()

        for _ in range(2):
            with pytest.raises(BackendError, match="the storage was closed") as caught:
                read(reading)
            assert not caught.value.retryable


# -- refusals ----------------------------------------------------------------------------------------------------------


def _refused(status: str, *lines: str, content: bytes = b"s3cret-in-the-body") -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", *lines]
    return "".join(f"{line}\r\n" for line in head).encode() + b"\r\n" + content


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (_refused("404 Not Found"), NotFoundError),
        (_refused("403 Forbidden"), AccessDeniedError),
        (_refused("412 Precondition Failed"), SourceChangedError),
        (_refused("416 Range Not Satisfiable"), SourceChangedError),
        (_refused("429 Too Many Requests", "Retry-After: 7"), ThrottledError),
        (_refused("503 Service Unavailable", "Retry-After: 7"), UnavailableError),
        (_refused("302 Found", "Location: http://127.0.0.1:1/"), BackendError),
    ],
)
def test_refusals(reader: Reading, answer: bytes, error: type[BackendError]) -> None:
    """Each status has its class; the body is not repeated, and the connection serves another request, but for 416."""
    with server(answer) as (url, started):
        reading = reader(url)
        for _ in range(3):
            with pytest.raises(error) as caught:
                read(reading)

        assert error is type(caught.value)
        assert "s3cret" not in str(caught.value)
        assert (7.0 if caught.value.retryable else None) == caught.value.retry_after_seconds
        assert (3, 3 if b" 416 " in answer else 1) == (len(started.requests), started.connections)


def test_a_refusal_may_be_met_with_another_token(reader: Reading) -> None:
    """Once per refusal, and the signer sees every answer to this read."""
    good: list[str] = ["second"]

    def answer(request: bytes) -> bytes:
        return ranges(request) if f"Bearer {good[0]}".encode() in request else _refused("401 Unauthorized")

    with server(answer) as (url, started):
        signer = Tokens(url, ["wrong", "second"])

        assert CONTENT[10:20] == read(reader(signer))
        assert ["Bearer first", "Bearer wrong", "Bearer second"] == started.header("Authorization")
        assert [1, 2] == [len(refusals) for refusals in signer.refusals]
        assert b"s3cret-in-the-body" == signer.refusals[0][0].content
        assert "s3cret" not in repr(signer.refusals)

        good[0] = "none"
        with pytest.raises(AccessDeniedError):
            read(reader(signer))


def test_renewals_have_a_bound(reader: Reading) -> None:
    """A signer that always has another token does not go on for ever."""
    with server(_refused("401 Unauthorized")) as (url, started), pytest.raises(AccessDeniedError):
        read(reader(Tokens(url, [str(number) for number in range(100)])))

    assert 4 == len(started.requests)


def test_a_token_does_not_go_along_a_redirect(reader: Reading) -> None:
    """The signer alone decides which headers go to the other server."""
    with server(ranges) as (elsewhere, other), server(_refused("302 Found", f"Location: {elsewhere}/")) as (url, _):
        signer = Tokens(url, [elsewhere])

        assert CONTENT[10:20] == read(reader(signer))
        assert [] == other.header("Authorization")
        assert ["bytes=10-19"] == other.header("Range")


def test_the_body_of_a_refusal_has_a_bound(reader: Reading) -> None:
    """The status counts, and no more than a MiB is received."""
    sent: list[int] = []

    def send(sock: socket.socket, content: bytes) -> None:
        try:
            for start in range(0, len(content), 1 << 16):
                sock.sendall(content[start : start + (1 << 16)])
                sent.append(1)
        finally:
            sock.close()

    with (
        server(_refused("500 Oops", content=b"x" * (64 << 20)), piece=send) as (url, _),
        pytest.raises(UnavailableError, match="HTTP 500"),
    ):
        read(reader(url))

    assert len(sent) << 16 < 32 << 20


# -- through proxies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True])
def test_ranges_through_a_proxy(reader: Reading, tmp_path: Path, tls: bool) -> None:
    """To a server that only the proxy can find, in a tunnel or in absolute form."""
    context, authority = server_context(tmp_path, "weights.invalid")
    with answering(ranges, context=context if tls else None) as started:
        with HttpProxy(route=lambda _host, _port: ("127.0.0.1", started.port)) as proxy:
            proxies = Proxies.from_environ({"ALL_PROXY": proxy.url})
            reading = reader(f"http{'s' * tls}://weights.invalid", authority, proxies)

            assert CONTENT[10:20] == read(reading)
            assert CONTENT[20:30] == read(reading, 20)

        assert (1, 0) if tls else (0, 2) == (len(proxy.tunnels), len(proxy.requests))
        assert 1 == started.connections


def test_a_proxy_that_asks_for_a_password(reader: Reading) -> None:
    """Its answer is understood as its own, and is never tried again."""
    with server(ranges) as (url, started), HttpProxy(authorization="Basic x") as proxy:
        reading = reader(url, proxies=Proxies.from_environ({"HTTP_PROXY": proxy.url}))

        with pytest.raises(AccessDeniedError, match="HTTP 407") as caught:
            read(reading)
        assert "proxy" in str(caught.value)
        assert [] == started.requests


@pytest.mark.parametrize(
    ("names", "expired", "says"),
    [
        (("other.example",), False, "is for another host"),
        (("127.0.0.1",), True, "has expired"),
        (("127.0.0.1",), False, "is not trusted"),
    ],
)
def test_why_a_certificate_is_refused(
    reader: Reading, tmp_path: Path, names: tuple[str, ...], says: str, *, expired: bool
) -> None:
    """Another host, an old certificate and an unknown authority have different causes and next steps."""
    authority, stranger = trustme.CA(), trustme.CA()
    file = tmp_path / "authority.pem"
    (stranger if says == "is not trusted" else authority).cert_pem.write_to_path(str(file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    yesterday = datetime.now(timezone.utc) - timedelta(days=1)
    authority.issue_cert(*names, **({"not_after": yesterday} if expired else {})).configure_cert(context)

    with (
        answering(part(), context=context) as server,
        pytest.raises(UnavailableError, match=says) as caught,
    ):
        read(reader(f"https://127.0.0.1:{server.port}", ca_bundle=str(file)))

    assert caught.value.cause
    assert caught.value.hint
    assert not caught.value.retryable
