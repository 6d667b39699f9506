"""Heads and contents of answers: what is read, and what is refused, byte for byte."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelexpress_core.storage.http.answers import Answer, Head, read_head
from modelexpress_core.storage.http.failures import BadAnswerError


class Stream:
    """Stands for a connection: gives the bytes in pieces of ``piece`` at most, then ends or breaks."""

    def __init__(self, content: bytes, piece: int = 1 << 20, breaks: bool = False) -> None:
        self._content = io.BytesIO(content)
        self._piece = piece
        self._breaks = breaks
        self.closed = self.released = False
        self.waits: list[float] = []

    def wait_at_most(self, seconds: float) -> None:
        self.waits.append(seconds)

    def receive(self, view: memoryview, *, whole: bool = False) -> int:
        count = self._content.readinto(view[: self._piece])
        if not count and self._breaks:
            raise ConnectionResetError("reset")
        return count

    def close(self) -> None:
        self.closed = True

    def release(self) -> None:
        assert not self.released
        self.released = True

    @property
    def rest(self) -> bytes:
        return self._content.read()


def answer(stream: Stream, method: str = "GET", wait: Callable[[], float] = lambda: 5.0) -> Answer:
    return Answer(stream, method, wait_seconds=wait, release=stream.release)


def read(stream: Stream, length: int = 100) -> bytes:
    memory = bytearray(length)
    with answer(stream) as got:
        done = got.read_into(memoryview(memory))
    return bytes(memory[:done])


# -- heads -------------------------------------------------------------------------------------------------------------


def test_a_head() -> None:
    """Names in lower case, values without the space around them, repeated ones joined."""
    head = Head.parse(b'HTTP/1.1 206 Partial Content\r\nETag: "v1" \r\nx-a:1\r\nX-A:\t2\r\nempty:')

    assert (1, 206, "Partial Content") == (head.minor_version, head.status, head.reason)
    assert {"etag": '"v1"', "x-a": "1, 2", "empty": ""} == head.headers


@pytest.mark.parametrize("line", [b"HTTP/1.1 200", b"HTTP/1.1 200 ", b"HTTP/1.0 200 OK"])
def test_status_lines(line: bytes) -> None:
    """The reason phrase may be missing."""
    assert 200 == Head.parse(line).status


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2",
        b"HTTP/2 200 OK",
        b"HTTP/1.2 200 OK",
        b"http/1.1 200 OK",
        b"HTTP/1.1 20 OK",
        b"HTTP/1.1 2000 OK",
        b"HTTP/1.1 000 OK",
        b"HTTP/1.1  200 OK",
        b"HTTP/1.1 200 OK\r\nno colon",
        b"HTTP/1.1 200 OK\r\n: no name",
        b"HTTP/1.1 200 OK\r\nspace : before the colon",
        b"HTTP/1.1 200 OK\r\na: b\r\n folded: line",
        b"HTTP/1.1 200 OK\r\na: b\0c",
        b"HTTP/1.1 200 OK\r\na: b\nc: d",
        b"HTTP/1.1 200 OK\r\na: b\rc",
        b"HTTP/1.1 200 OK\r\n" + b"\r\n".join(b"a%d: b" % i for i in range(201)),
    ],
)
def test_what_is_no_head(head: bytes) -> None:
    """Anything that two readers could understand in two ways is refused."""
    with pytest.raises(BadAnswerError):
        Head.parse(head)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_refused(received: bytes) -> None:
    """Nothing else is raised, and no header holds a line break."""
    try:
        head = Head.parse(b"HTTP/1.1 200 OK\r\n" + received)
    except BadAnswerError:
        return
    assert not any("\n" in text or "\r" in text for item in head.headers.items() for text in item)


def test_a_head_without_end() -> None:
    """It is given up at 64 KiB, and so is one of very many lines."""
    for content in (b"HTTP/1.1 200 OK\r\na: " + b"b" * 1_000_000, b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200_000):
        stream = Stream(content)

        with pytest.raises(BadAnswerError, match="does not end"):
            answer(stream)
        assert len(stream.rest) > len(content) - 80_000


def test_a_head_byte_by_byte_has_a_deadline() -> None:
    """Each byte comes in time, but the head is not complete in time."""
    stream = Stream(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", piece=1)

    with pytest.raises(TimeoutError, match="not complete"):
        read_head(stream.receive, time.monotonic() - 1)


@pytest.mark.parametrize("content", [b"", b"HTTP/1.1 200 OK\r\n"])
def test_a_head_that_is_cut(content: bytes) -> None:
    """The connection was closed before the answer."""
    with pytest.raises(BadAnswerError, match="closed before the answer"):
        answer(Stream(content))


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_interim_answers_are_passed_over(piece: int) -> None:
    """Whether they come with the final answer or before it (RFC 9110 section 15.2)."""
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    final = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"

    assert b"abc" == read(Stream(interim * 3 + final, piece))
    with pytest.raises(BadAnswerError, match="interim"):
        answer(Stream(interim * 20 + final, piece))


# -- contents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("headers", "content"),
    [
        (b"Content-Length: 10", b"0123456789"),
        (b"Content-Length: 10, 10", b"0123456789"),
        (b"Content-Length: 10\r\nContent-Length: 10", b"0123456789"),
        (b"Transfer-Encoding: chunked", b"A\r\n0123456789\r\n0\r\n\r\n"),
        (b"Transfer-Encoding: Chunked", b"3\r\n012\r\n07;x=y\r\n3456789\r\n000\r\n\r\n"),
        (b"Transfer-Encoding: chunked", b"3 ;x\r\n012\r\n7\r\n3456789\r\n0\r\nTrailer: x\r\nOther: y\r\n\r\n"),
        (b"X: without a length", b"0123456789"),
    ],
)
def test_contents(piece: int, headers: bytes, content: bytes) -> None:
    """By its length, in chunks, or until the connection ends."""
    stream = Stream(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\n" + content, piece)

    with answer(stream) as got:
        assert b"0123456789" == got.read(1000)
        assert got.ended
    assert stream.released is (b"X:" not in headers)


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_a_content_is_read_part_by_part(piece: int) -> None:
    """Framed answers are read so: a header, then as many bytes as that says."""
    stream = Stream(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n012\r\n7\r\n3456789\r\n0\r\n\r\n", piece
    )
    first, second = bytearray(4), bytearray(10)

    with answer(stream) as got:
        assert 4 == got.read_into(memoryview(first))
        assert 6 == got.read_into(memoryview(second))
        assert 0 == got.read_into(memoryview(second))

    assert (b"0123", b"456789") == (first, second[:6])
    assert stream.released


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=10), st.integers(1, 60), st.integers(1, 60))
def test_chunks_of_any_size_in_pieces_of_any_size(chunks: list[bytes], piece: int, part: int) -> None:
    """The content is that of the chunks, whatever the network and the reader make of it."""
    framed = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    stream = Stream(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n", piece)
    memory, content = bytearray(part), b""

    with answer(stream) as got:
        while count := got.read_into(memoryview(memory)):
            content += memory[:count]

    assert b"".join(chunks) == content
    assert stream.released


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 3\r\nContent-Length: 4",
        b"Content-Length: 3, 4",
        b"Content-Length: -3",
        b"Content-Length: +3",
        b"Content-Length: 0x3",
        b"Content-Length: 3_0",
        b"Content-Length: ",
        b"Content-Length: \xb2",
        b"Content-Length: 99999999999999999999",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    ],
)
def test_contents_whose_end_is_not_clear(headers: bytes) -> None:
    """Two lengths, or none that is a number: where the next answer begins is not known."""
    with pytest.raises(BadAnswerError, match="does not say clearly"):
        answer(Stream(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n"))


@pytest.mark.parametrize(
    "content",
    [
        b"xyz\r\nabc",
        b"-3\r\nabc",
        b"0x3\r\nabc",
        b"\r\nabc",
        b"11111111111111111\r\nabc",
        b"3" + b" " * 100_000,
        b"3;" + b"x" * 100_000 + b"\r\nabc",
        b"3\nabc\n",
    ],
)
def test_chunks_that_are_none(content: bytes) -> None:
    """Nothing of them is taken for content."""
    stream = Stream(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + content)
    memory = bytearray(10)

    with answer(stream) as got, pytest.raises(BadAnswerError):
        got.read_into(memoryview(memory))

    assert bytes(10) == memory
    assert stream.closed


@pytest.mark.parametrize(
    "end",
    [b"abcd\r\n0\r\n\r\n", b"abc\r\n0\r\n" + b"a: b\r\n" * 1000, b"abc\r\n0\r\n" + b"a" * 100_000, b"abc\r\n0\r\n"],
)
def test_chunks_that_end_badly(end: bytes) -> None:
    """A chunk that is longer than it says, and trailers without end: the connection is not used again."""
    stream = Stream(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n" + end)

    assert b"abc" == read(stream)
    assert stream.closed
    assert not stream.released


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("headers", [b"Content-Length: 10", b"Transfer-Encoding: chunked"])
def test_bytes_before_a_break_count(headers: bytes, breaks: bool) -> None:
    """Where there are none, a reset is raised."""
    start = b"A\r\n" if headers.startswith(b"T") else b""
    head = b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\n"

    cut = Stream(head + start + b"0123", breaks=breaks)
    assert b"0123" == read(cut)
    assert cut.closed

    with answer(Stream(head + start, breaks=breaks)) as got:
        if breaks:
            with pytest.raises(ConnectionResetError):
                got.read_into(memoryview(bytearray(10)))
        else:
            assert 0 == got.read_into(memoryview(bytearray(10)))
            assert got.truncated
    with answer(Stream(head + start + b"0123", breaks=breaks)) as got, pytest.raises(OSError, match=r"reset|amid"):
        got.read(100)


@pytest.mark.parametrize(
    ("method", "head"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 1000"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked"),
        ("GET", b"HTTP/1.1 204 No Content"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 1000"),
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0"),
    ],
)
def test_answers_without_content(method: str, head: bytes) -> None:
    """Nothing is waited for, and the connection can be used again at once."""
    stream = Stream(head + b"\r\n\r\n")

    with answer(stream, method) as got:
        assert got.ended
        assert b"" == got.read(10)

    assert stream.released


@pytest.mark.parametrize(
    "answered",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
        b"HTTP/1.1 416 Requested Range Not Satisfiable\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: x, Close\r\n\r\nabc",
        b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\n",
    ],
)
def test_connections_that_are_not_used_again(answered: bytes) -> None:
    """The server closes it, or may do so, or sent more than its answer, which would be taken for the next one."""
    stream = Stream(answered)

    assert b"abc" == read(stream)
    assert stream.closed
    assert not stream.released


def test_a_content_that_is_left_closes_the_connection() -> None:
    """The rest of it would be taken for the next answer."""
    stream = Stream(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789")

    assert b"012" == read(stream, 3)
    assert stream.closed
    assert not stream.released


def test_a_content_has_a_bound() -> None:
    """What is longer is not read."""
    stream = Stream(b"HTTP/1.1 500 Oops\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 3_000_000)

    with answer(stream) as got:
        assert b"x" * 100_000 == got.read(100_000)
        assert not got.ended

    assert len(stream.rest) > 2_500_000


def test_a_content_byte_by_byte_has_a_deadline() -> None:
    """Each byte comes in time, but the content as a whole does not."""
    stream = Stream(b"HTTP/1.1 500 Oops\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000, piece=1)

    with answer(stream, wait=lambda: 0.0 if stream.waits else 5.0) as got:
        got._begun = b""
        receive = stream.receive

        def slow(view: memoryview, *, whole: bool = False) -> int:
            time.sleep(0.01)
            return receive(view[:1])

        stream.receive = slow  # type: ignore[method-assign]
        begun = time.monotonic()
        with pytest.raises(TimeoutError, match="too slowly"):
            got.read(64)
        assert time.monotonic() - begun < 5


def test_the_patience_of_the_moment_holds() -> None:
    """It is asked for before each wait for the content. Waits for the head end with its deadline."""
    stream = Stream(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n" + b"abc", piece=1)
    seconds = iter([1.0, 2.0, 3.0, 4.0])

    with answer(stream, wait=lambda: next(seconds)) as got:
        got.read_into(memoryview(bytearray(3)))

    assert [2.0, 3.0, 4.0] == stream.waits[-3:]
    assert all(wait <= 1.0 for wait in stream.waits[:-3])
