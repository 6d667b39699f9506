"""Reading an answer in HTTP/1.1 (RFC 9112): its head, strictly and within bounds, and its content into memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Protocol

from attrs import field, frozen

from modelexpress_core.storage.http.failures import BadAnswerError

__all__ = ["Answer", "ByteStream", "Head", "read_head", "read_headers", "read_lines"]

_MAX_HEAD_BYTES = 64 << 10
_MAX_HEADERS = 200

#: Interim answers (RFC 9110 section 15.2) before the final one.
_MAX_INTERIM_ANSWERS = 8

#: Of the line that begins a chunk, with its extensions, and of each trailer.
_MAX_LINE_BYTES = 8 << 10
_MAX_TRAILERS = 100

#: Of all lines of a content that are longer than the size of a chunk. Nothing uses extensions, and a chunk of one byte
#: may have one of 8 KiB.
_MAX_SIZE_LINE_BYTES = 64
_MAX_EXTENSION_BYTES = 64 << 10

#: What is received at once where a head is expected; the content that comes with it is copied.
_HEAD_PIECE_BYTES = 4096

#: What the kernel is asked for at once: between two pieces the patience may change, and the storage be closed.
_PIECE_BYTES = 1 << 20

#: What a content is read in that goes into no memory of the caller's: listings, words of errors.
_CONTENT_PIECE_BYTES = 64 << 10

#: How slowly a content may come, on average, after the first wait: a server that sends byte after byte never exceeds
#: the wait for the next one. Into the caller's memory: less than any network that weights are loaded over. The engine
#: has a stricter bound for the whole of a read.
_MIN_BYTES_PER_SECOND = 4096
_MIN_CONTENT_BYTES_PER_SECOND = 100_000

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?")
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")


@frozen
class Head:
    """The head of an answer.

    Attributes:
        minor_version: 1 for HTTP/1.1, 0 for HTTP/1.0.
        status: Three digits.
        reason: The reason phrase.
        headers: By lower-case name; those that come more than once are joined with commas.
    """

    minor_version: int
    status: int
    reason: str
    headers: Mapping[str, str] = field(repr=False)

    @classmethod
    def parse(cls, received: bytes) -> Head:
        """The head that ``received`` is, without its last empty line.

        Raises:
            BadAnswerError: It is not the head of an answer in HTTP/1.1 or HTTP/1.0.
        """
        first, *lines = received.split(b"\r\n")
        match = _STATUS_LINE.fullmatch(first)
        if match is None:
            raise BadAnswerError("what was received is not an answer in HTTP/1.1")
        headers = read_headers(lines, "answer")
        return cls(int(match[1]), int(match[2]), (match[3] or b"").decode("latin-1"), headers)

    @property
    def keeps_connection(self) -> bool:
        """Whether the connection can be used again afterwards.

        Not after 416: some servers (fake-gcs-server is one) then close it without having said so, and the next request
        would meet the end of the connection now and then.
        """
        options = {option.strip() for option in self.headers.get("connection", "").lower().split(",")}
        return (
            self.minor_version == 1
            and "close" not in options
            and self.status != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        )

    @property
    def is_chunked(self) -> bool:
        """Whether the content comes in chunks (RFC 9112 section 7.1).

        Raises:
            BadAnswerError: It comes in another coding, or its length is given as well.
        """
        coding = self.headers.get("transfer-encoding")
        if coding is None:
            return False
        # Both at once is how requests and answers are smuggled (RFC 9112 section 6.3).
        if coding.strip().lower() != "chunked" or self.minor_version == 0 or "content-length" in self.headers:
            raise BadAnswerError("the answer does not say clearly where its content ends")
        return True

    @property
    def content_length(self) -> int | None:
        """Length of the content in bytes; None where the answer does not say.

        Raises:
            BadAnswerError: It is not a number, or two lengths differ.
        """
        text = self.headers.get("content-length")
        if text is None:
            return None
        lengths = {length.strip() for length in text.split(",")}
        length = lengths.pop()
        if lengths or not re.fullmatch("[0-9]{1,19}", length):
            raise BadAnswerError("the answer does not say clearly how long its content is")
        return int(length)


def read_head(receive: Callable[[memoryview], int], deadline: float) -> tuple[Head, bytes]:
    """The head of an answer, and the bytes after it that came along.

    Args:
        receive: Puts the next bytes into memory; returns their number, or 0 at the end.
        deadline: When the head has to be complete, by ``time.monotonic``.

    Raises:
        BadAnswerError: It is no head, or a larger one than HTTP servers send.
        TimeoutError: It was not complete in time.
        OSError: The connection broke.
    """
    head, rest = read_lines(receive, deadline, "answer")
    return Head.parse(head), rest


def read_lines(
    receive: Callable[[memoryview], int], deadline: float, what: str, begun: bytes = b""
) -> tuple[bytes, bytes]:
    """The lines before the first empty one, without it, and the bytes after it that came along.

    Args:
        receive: Puts the next bytes into memory; returns their number, or 0 at the end.
        deadline: When they have to be complete, by ``time.monotonic``: a sender of byte after byte would never exceed
            the wait for the next one.
        what: Whose head they are, for messages.
        begun: What has been received of them.

    Raises:
        BadAnswerError: They are longer than any program sends, or the connection ended amid them.
        TimeoutError: They were not complete in time.
        OSError: The connection broke.
    """
    received, part = bytearray(begun), memoryview(bytearray(_HEAD_PIECE_BYTES))
    searched = 0
    while (end := received.find(b"\r\n\r\n", searched)) < 0:
        if len(received) > _MAX_HEAD_BYTES:
            raise BadAnswerError(f"the head of the {what} does not end")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the head of the {what} is not complete")
        searched = max(0, len(received) - 3)
        count = receive(part)
        if not count:
            raise BadAnswerError(f"the connection was closed before the {what}")
        received += part[:count]
    return bytes(received[:end]), bytes(received[end + 4 :])


def read_headers(lines: Sequence[bytes], what: str) -> dict[str, str]:
    """The headers of a head, by lower-case name; those that come more than once are joined with commas.

    Raises:
        BadAnswerError: There are too many, or a line is none.
    """
    if len(lines) > _MAX_HEADERS:
        raise BadAnswerError(f"the {what} has more than {_MAX_HEADERS} headers")
    headers: dict[str, str] = {}
    for line in lines:
        header = _HEADER_LINE.fullmatch(line)
        if header is None:
            raise BadAnswerError(f"the {what} has a line that is not a header")
        name, value = header[1].decode("latin-1").lower(), header[2].decode("latin-1").rstrip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


class ByteStream(Protocol):
    """What an answer is read from: a connection."""

    def wait_at_most(self, seconds: float) -> None:
        """Limit the waits that begin from now on; to almost nothing, if ``seconds`` is not above zero."""
        ...

    def receive(self, view: memoryview, *, whole: bool = False) -> int:
        """Put the next bytes into ``view``: as many as there are, or (``whole``) all of it; 0 at the end."""
        ...

    def close(self) -> None:
        """Close it; called once or more often."""
        ...


def _limited(connection: ByteStream, deadline: float, *, wait: bool = True) -> Callable[[memoryview], int]:
    """Return a function that receives from ``connection``, and waits no longer than until ``deadline``.

    Args:
        connection: Where bytes come from.
        deadline: By ``time.monotonic``.
        wait: Whether to limit the first wait too; it costs a system call.
    """
    limit = wait

    def receive(view: memoryview) -> int:
        nonlocal limit
        if limit:
            connection.wait_at_most(deadline - time.monotonic())
        limit = True
        return connection.receive(view)

    return receive


class Answer:
    """An answer whose content is not read yet. Owns its connection until the content is at its end, or until ``close``.

    To be used in a ``with`` statement, whose end closes a connection that still has content.

    Args:
        connection: On which a request was sent.
        method: Of that request.
        wait_seconds: How long to wait for the next bytes; called before each wait.
        release: Called once, when the connection can be used for another request.

    Attributes:
        status: HTTP status.
        reason: The server's reason phrase.
        headers: By lower-case name.
        ended: The content was read to its end, or given up.
        truncated: The connection ended, or broke, before the content did.

    Raises:
        OSError: The head did not come, or is none.
    """

    def __init__(
        self,
        connection: ByteStream,
        method: str,
        *,
        wait_seconds: Callable[[], float],
        release: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._wait_seconds = wait_seconds
        self._release = release
        self._extension_bytes = 0
        self._content_since = 0.0
        self._content_bytes = 0
        self._min_bytes_per_second = _MIN_BYTES_PER_SECOND
        # One deadline for all heads, the interim ones included.
        deadline = time.monotonic() + wait_seconds()
        head, self._begun = read_head(_limited(connection, deadline, wait=False), deadline)
        for _ in range(_MAX_INTERIM_ANSWERS):
            if head.status >= 200:
                break
            head, self._begun = self._head_after(self._begun, deadline)
        if head.status < 200:
            raise BadAnswerError("interim answers do not end")
        self.status = head.status
        self.reason = head.reason
        self.headers = head.headers
        self.ended = self.truncated = False
        self._broken_by: OSError | None = None
        self._keeps_connection = head.keeps_connection
        has_content = method != "HEAD" and head.status not in {204, 304}
        self._chunked = has_content and head.is_chunked
        self._first_chunk = True
        #: Bytes until the end of the content, or of the chunk; None where only the end of the connection tells.
        self._left: int | None = head.content_length if has_content and not self._chunked else 0
        if self._left == 0 and not self._chunked:
            self._end()

    def _head_after(self, begun: bytes, deadline: float) -> tuple[Head, bytes]:
        """The next head, of which ``begun`` has been received."""
        waiting = begun
        receive_more = _limited(self._connection, deadline)

        def receive(view: memoryview) -> int:
            nonlocal waiting
            if not waiting:
                return receive_more(view)
            count = min(len(view), len(waiting))
            view[:count], waiting = waiting[:count], waiting[count:]
            return count

        head, rest = read_head(receive, deadline)
        return head, rest + waiting

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.ended:
            self.close()

    def close(self) -> None:
        """Close the connection, and with it the rest of the content."""
        self.ended = True
        self._connection.close()

    def read_into(self, view: memoryview) -> int:
        """Fill ``view`` with the next bytes of the content.

        Returns:
            Number of bytes: fewer than ``view`` has where the content, or the connection, ended before, or where the
            bytes came too slowly.

        Raises:
            OSError: The connection broke before the first of them; where it breaks later, their number is returned.
        """
        self._begin_content(_MIN_BYTES_PER_SECOND)
        return self._fill(view)

    def _fill(self, view: memoryview) -> int:
        done = 0
        try:
            while done < len(view) and self._has_more():
                count = self._next(view[done:] if self._left is None else view[done : done + self._left])
                if not count:
                    self._end_of_connection()
                    break
                done += count
                if self._left is not None:
                    self._left -= count
                    if not self._left and not self._chunked:
                        self._end()
        except OSError as exc:
            self.truncated, self._broken_by = True, exc
            self.close()
            if not done:
                raise
        return done

    def read(self, max_bytes: int) -> bytes:
        """The content, of which at most ``max_bytes`` are read.

        Raises:
            OSError: The connection broke before the end, or the content came too slowly.
        """
        pieces: list[bytes] = []
        size = 0
        part = memoryview(bytearray(min(max_bytes, _CONTENT_PIECE_BYTES)))
        self._begin_content(_MIN_CONTENT_BYTES_PER_SECOND)
        while size < max_bytes and not self.ended:
            count = self._fill(part[: max_bytes - size])
            pieces.append(bytes(part[:count]))
            size += count
        if isinstance(self._broken_by, TimeoutError):
            raise self._broken_by
        if self.truncated:
            raise BadAnswerError("the connection was closed amid the answer") from self._broken_by
        return b"".join(pieces)

    # -- the content, piece by piece ----------------------------------------------------------------------------------

    def _has_more(self) -> bool:
        if self._chunked and not self._left and not self.ended:
            self._begin_chunk()
        return not self.ended

    def _next(self, view: memoryview) -> int:
        """Put the next bytes into ``view``; 0 where the connection ended."""
        if self._begun:
            count = min(len(view), len(self._begun))
            view[:count], self._begun = self._begun[:count], self._begun[count:]
            return count
        count = self._receive(view[:_PIECE_BYTES], whole=True)
        self._content_bytes += count
        return count

    def _begin_content(self, min_bytes_per_second: int) -> None:
        self._content_since = time.monotonic()
        self._content_bytes = 0
        self._min_bytes_per_second = min_bytes_per_second

    def _receive(self, view: memoryview, *, whole: bool = False) -> int:
        """Put the next bytes into ``view``; raise TimeoutError where the content comes too slowly."""
        wait = self._wait_seconds()
        allowed = wait + self._content_bytes / self._min_bytes_per_second
        left = self._content_since + allowed - time.monotonic()
        if left <= 0:
            raise TimeoutError("the content of the answer comes too slowly")
        # Another limit costs a system call, so it is lowered only where that matters.
        self._connection.wait_at_most(wait if 2 * left > wait else left)
        return self._connection.receive(view, whole=whole)

    def _begin_chunk(self) -> None:
        if not self._first_chunk and self._line():
            raise BadAnswerError("a chunk of the answer is longer than it says")
        self._first_chunk = False
        size = _CHUNK_SIZE.fullmatch(self._line())
        if size is None:
            raise BadAnswerError("a chunk of the answer has no size")
        self._left = int(size[1], 16)
        if not self._left:
            for _ in range(_MAX_TRAILERS):
                if not self._line():
                    self._end()
                    return
            raise BadAnswerError("the trailers of the answer do not end")

    def _line(self) -> bytes:
        part = memoryview(bytearray(_HEAD_PIECE_BYTES))
        while (end := self._begun.find(b"\r\n", 0, _MAX_LINE_BYTES)) < 0:
            if len(self._begun) >= _MAX_LINE_BYTES:
                raise BadAnswerError("a line in the content of the answer does not end")
            count = self._receive(part)
            if not count:
                raise BadAnswerError("the connection was closed amid the answer")
            self._begun += part[:count]
        self._extension_bytes += max(0, end - _MAX_SIZE_LINE_BYTES)
        if self._extension_bytes > _MAX_EXTENSION_BYTES:
            raise BadAnswerError("the chunks of the answer have extensions without end")
        line, self._begun = self._begun[:end], self._begun[end + 2 :]
        return line

    def _end(self) -> None:
        """The content is complete: leave the connection to the next request, where nothing else is in it."""
        self.ended = True
        if self._keeps_connection and not self._begun:
            self._release()
        else:
            self._connection.close()

    def _end_of_connection(self) -> None:
        self.truncated = self._left is not None
        self.close()
