"""Requests to a bulk server, read strictly and within bounds, and what they ask for.

``GET /<content>/<name>`` asks for the bytes of one name, or a range of them; ``POST /<content>`` for many ranges at
once, as JSON: ``{"runs": [[name, offset, length], ...], "checksums": false}``. A range may stand for many that are
equally far apart, such as the columns of a matrix, which are sent one after another:
``[name, offset, length, stride, count]``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, unquote

from attrs import field, frozen

from modelexpress_core.storage.http.answers import read_headers, read_lines
from modelexpress_core.storage.http.connections import Connection
from modelexpress_core.storage.http.failures import BadAnswerError

__all__ = ["MAX_PIECES", "MAX_RUNS", "BulkRequest", "RefusedError", "Run", "read_request", "target_of"]

#: A request is complete in this time, or the connection is closed.
_REQUEST_SECONDS = 10.0

_MAX_BODY_BYTES = 1 << 20

#: Ranges that one request may ask for.
MAX_RUNS = 4096

#: Pieces of all ranges of one request: each may cost the server a system call.
MAX_PIECES = 1 << 20

_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) (/[!-~]{0,8191}) HTTP/1\.1")
_RANGE = re.compile(r"bytes=([0-9]{0,19})-([0-9]{0,19})")


class RefusedError(Exception):
    """A request is answered with ``status`` and ``reason``, and its connection is closed.

    Args:
        status: The status of the answer.
        reason: What the answer says.
        retry_after_seconds: When the same request may succeed; None if it will not.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: HTTPStatus,
        reason: str,
        *,
        retry_after_seconds: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = dict(headers or {})
        if retry_after_seconds is not None:
            self.headers["Retry-After"] = str(retry_after_seconds)


@frozen
class Run:
    """A range of bytes, or pieces that are equally far apart, one after another.

    Attributes:
        name: Whose bytes.
        offset: The first one.
        length: How many; of each piece, if there are several.
        stride: From the start of a piece to the start of the next; at least ``length``.
        count: How many pieces.
    """

    name: str
    offset: int
    length: int
    stride: int = 0
    count: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return self.length * self.count

    @property
    def end(self) -> int:
        """Where the last piece ends."""
        return self.offset + (self.count - 1) * self.stride + self.length

    @property
    def on_wire(self) -> tuple[str | int, ...]:
        """As a request has it."""
        whole = (self.name, self.offset, self.length)
        return whole if self.count == 1 else (*whole, self.stride, self.count)

    @property
    def is_valid(self) -> bool:
        """Whether its numbers make sense, for content of any size."""
        numbers = (self.offset, self.length, self.stride, self.count)
        return (
            isinstance(self.name, str)
            and all(type(each) is int for each in numbers)
            and self.offset >= 0 < self.length
            and self.count >= 1
            and (self.count == 1 or self.stride >= self.length)
        )


@frozen
class BulkRequest:
    """The head of a request.

    Attributes:
        method: GET, HEAD or POST.
        content: What is read: the first part of the path.
        name: The rest of the path; empty for POST.
        headers: By lower-case name.
        begun: Bytes that came after the head.
    """

    method: str
    content: str
    name: str
    headers: Mapping[str, str] = field(repr=False)
    begun: bytes = field(repr=False)

    @property
    def ticket(self) -> str:
        """The ticket that the request shows; empty if it shows none."""
        scheme, _, ticket = self.headers.get("authorization", "").partition(" ")
        return ticket.strip() if scheme.lower() == "bearer" else ""

    def range_of(self, nbytes: int) -> tuple[int, int, bool]:
        """First byte and end of what a GET asks for, of ``nbytes`` bytes, and whether it is a range.

        Raises:
            RefusedError: The range begins beyond the end.
        """
        match = _RANGE.fullmatch(self.headers.get("range", ""))
        if match is None or match[1] == match[2] == "":
            return 0, nbytes, False
        if not match[1]:
            start, end = max(0, nbytes - int(match[2])), nbytes
        else:
            start, end = int(match[1]), min(nbytes, int(match[2]) + 1 if match[2] else nbytes)
        if start >= end:
            raise RefusedError(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"it has {nbytes} bytes")
        return start, end, True

    def runs(self, connection: Connection) -> tuple[Sequence[Run], bool]:
        """The ranges that a POST asks for, and whether each gets a checksum.

        Raises:
            RefusedError: The body is too long, or no list of ranges.
            OSError: It did not come.
        """
        length = self.headers.get("content-length", "")
        if not re.fullmatch(r"[0-9]{1,9}", length):
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "the body needs a Content-Length")
        if int(length) > _MAX_BODY_BYTES:
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {_MAX_BODY_BYTES} bytes")
        if len(self.begun) > int(length):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "requests are sent one after another")
        return _runs_of(self._body(connection, int(length)))

    def _body(self, connection: Connection, length: int) -> bytes:
        body = memoryview(bytearray(length))
        done = len(self.begun)
        body[:done] = self.begun
        deadline = time.monotonic() + _REQUEST_SECONDS
        while done < length:
            connection.wait_at_most(deadline - time.monotonic())
            count = connection.receive(body[done:])
            if not count or time.monotonic() > deadline:
                raise BadAnswerError("the body of the request is not complete")
            done += count
        return bytes(body)


def _runs_of(body: bytes) -> tuple[Sequence[Run], bool]:
    try:
        asked: Any = json.loads(body)
        runs = tuple(Run(*each) for each in asked["runs"])
        checksums = asked.get("checksums", False)
        right = (
            isinstance(checksums, bool)
            and all(len(each) in {3, 5} for each in asked["runs"])
            and all(run.is_valid for run in runs)
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        right = False
    if not right:
        reason = 'the body has to be {"runs": [["name", offset, length], ...], "checksums": false}'
        raise RefusedError(HTTPStatus.BAD_REQUEST, reason)
    if len(runs) > MAX_RUNS:
        raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {MAX_RUNS} ranges")
    if sum(run.count for run in runs) > MAX_PIECES:
        raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {MAX_PIECES} pieces of ranges")
    return runs, checksums


def read_request(connection: Connection, idle_seconds: float) -> BulkRequest | None:
    """The next request; None if the connection ended without one.

    Args:
        connection: The connection.
        idle_seconds: How long its first byte may take.

    Raises:
        RefusedError: It is none that is answered.
        OSError: The connection broke, or the request was not complete in time.
    """
    part = memoryview(bytearray(4096))
    connection.wait_at_most(idle_seconds)
    count = connection.receive(part)
    if not count:
        return None
    deadline = time.monotonic() + _REQUEST_SECONDS

    def receive(view: memoryview) -> int:
        connection.wait_at_most(deadline - time.monotonic())
        return connection.receive(view)

    try:
        head, begun = read_lines(receive, deadline, "request", bytes(part[:count]))
        first, *lines = head.split(b"\r\n")
        headers = read_headers(lines, "request")
    except BadAnswerError as exc:
        raise RefusedError(HTTPStatus.BAD_REQUEST, str(exc)) from exc
    match = _REQUEST_LINE.fullmatch(first)
    if match is None or "transfer-encoding" in headers:
        raise RefusedError(HTTPStatus.BAD_REQUEST, "a request in HTTP/1.1, without a Transfer-Encoding, is expected")
    method, target = match[1].decode(), match[2].decode()
    if method not in {"GET", "HEAD", "POST"}:
        raise RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, "GET, HEAD and POST are answered")
    content, _, name = target.partition("?")[0][1:].partition("/")
    if method != "POST" and (begun or headers.get("content-length", "0") != "0"):
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"{method} has no body")
    return BulkRequest(method, unquote(content), unquote(name), headers, begun)


def target_of(content: str, name: str = "") -> str:
    """The path of a request."""
    return f"/{quote(content, safe='')}" + (f"/{quote(name)}" if name else "")
