"""GETs of ranges that differ in nothing but the range: signed once per object, written and read without detours.

For each request botocore checks its parameters, resolves the endpoint, signs, and parses, and urllib3 and http.client
below it make objects of everything: together two to three milliseconds of Python, which holds up all other threads, and
in which the network could move megabytes. What the requests for one object have in common (URL, signature, token) is
prepared by botocore once and used for a minute; S3 takes a signature for fifteen. The headers in which they differ
(Range, If-Match) are not signed: S3 asks for a signature of Host and of what begins with x-amz-, says
https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html. Requests go over the connections of
botocore's pool, so TLS and timeouts are as it sets them up.

Where S3 wants another region or other credentials, or where an answer is not as expected, botocore is asked to send the
request itself: it knows what to do. The same goes until it has got an answer for the first time, and behind a proxy.
"""

from __future__ import annotations

import io
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from attrs import frozen
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError
from botocore.parsers import create_parser
from botocore.utils import get_environ_proxies

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["RangeAnswer", "RangeRequests"]

_SIGNED_SECONDS = 60.0

#: What botocore may make good by another region, or other credentials.
_BOTOCORE_KNOWS = frozenset({301, 302, 307, 308, 400, 401, 403})

#: Longer ones are not S3's.
_MOST_HEAD_BYTES = 64 << 10
_MOST_ERROR_BYTES = 1 << 20

#: What is received at once where a head is expected: what comes with it of the content is copied.
_HEAD_BYTES = 4096

#: What is asked of the kernel at once; between two of these it is noticed that others gave up, or wait longer.
_PIECE_BYTES = 1 << 20

#: Systems of which is known how a socket's own timeout is written.
_KERNEL_WAITS = sys.platform == "linux" and sys.maxsize > 2**32


@frozen
class _Signed:
    """What the GETs of one object have in common.

    Attributes:
        url: Of the object.
        head: The request, but for the lines in which they differ and the empty one.
        until: When it is to be prepared anew.
    """

    url: str
    head: bytes
    until: float


class RangeAnswer:
    """An answer whose content is not read yet; its connection belongs to it until ``read_into`` or ``close``.

    Attributes:
        status: The HTTP status.
        headers: By names in small letters.
    """

    def __init__(self, pool: Any, connection: Any, patience: Callable[[], float]) -> None:  # noqa: ANN401 - of urllib3
        self._pool = pool
        self._connection = connection
        self._sock = connection.sock
        self._patience = patience
        self._timeout_seconds: float | None = None
        # A socket with one of Python's timeouts returns whatever has arrived. Where the kernel has the timeout, it
        # wakes nobody until a piece is complete.
        self._kernel_waits = _KERNEL_WAITS and type(self._sock) is socket.socket
        self._whole_pieces = socket.MSG_WAITALL if self._kernel_waits else 0
        self._begun = b""
        self.status = 0
        self.headers: dict[str, str] = {}

    @property
    def _length(self) -> int:
        return int(self.headers["content-length"])

    def send(self, request: bytes) -> None:
        """Send ``request``, and read the head of the answer to it.

        Raises:
            OSError: The connection broke, or nothing came in time.
            HTTPException: What came is no head of an answer.
        """
        self._wait_patiently()
        self._sock.sendall(request)
        received, part = b"", memoryview(bytearray(_HEAD_BYTES))
        while (end := received.find(b"\r\n\r\n")) < 0:
            if len(received) > _MOST_HEAD_BYTES:
                message = "the head of the answer does not end"
                raise HTTPException(message)
            count = self._receive_some(part)
            if not count:
                message = "the connection was closed before the answer"
                raise ConnectionError(message)
            received += part[:count]
        first, *lines = received[:end].decode("latin-1").split("\r\n")
        version, _, status = first.partition(" ")
        if version not in {"HTTP/1.1", "HTTP/1.0"} or not status[:3].isdigit():
            message = "what was received is no answer of HTTP/1.1"
            raise HTTPException(message)
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()
        if version == "HTTP/1.0":
            self.headers["connection"] = "close"
        self.status = int(status[:3])
        self._received = received
        self._begun = received[end + 4 :]

    @property
    def has_content(self) -> bool:
        """Whether it is a part or the whole of an object, in the form that ``read_into`` reads."""
        plain = self.headers.get("content-length", "").isdigit() and "transfer-encoding" not in self.headers
        return self.status in {200, 206} and plain

    def error_content(self) -> bytes:
        """The content of an answer that is none of an object's."""
        message = HTTPResponse(cast("socket.socket", _Replayed(self._received, self._receive_some)), method="GET")
        try:
            message.begin()
            content = message.read(_MOST_ERROR_BYTES)
            self._give_back(whole=message.isclosed())
        except BaseException:
            self.close()
            raise
        finally:
            message.close()
        return content

    def read_into(self, view: memoryview) -> tuple[int, Exception | None]:
        """Fill ``view`` with the content; what is longer is left.

        Returns:
            Number of bytes that arrived, and what kept more from arriving (None where the stream just ended).
        """
        view = view[: self._length]  # what comes after the content is no part of the object
        done, error = min(len(self._begun), len(view)), None
        view[:done] = self._begun[:done]
        try:
            while done < len(view):
                self._wait_patiently()
                count = self._receive_some(view[done : done + _PIECE_BYTES], self._whole_pieces)
                if not count:
                    break
                done += count
        except OSError as exc:
            error = exc
        finally:
            self._give_back(whole=done == self._length >= len(self._begun))
        return done, error

    def close(self) -> None:
        """Give the content up, and the connection with it."""
        self._connection.close()

    def _give_back(self, *, whole: bool) -> None:
        """Leave the connection to the next request, where nothing is left in it of this one."""
        if not whole or "close" in self.headers.get("connection", "").lower():
            self.close()
        with suppress(OSError):  # it was shut down: whoever takes it next finds out
            self._sock.settimeout(self._timeout_seconds)
        self._pool._put_conn(self._connection)

    def _wait_patiently(self) -> None:
        """Have the socket wait for the patience of this moment."""
        seconds = self._patience()
        if seconds == self._timeout_seconds:
            return
        self._timeout_seconds = seconds
        if self._kernel_waits:
            self._sock.setblocking(True)
            whole, rest = divmod(seconds, 1)
            timeout = struct.pack("@ll", int(whole), int(rest * 1e6))
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        else:
            self._sock.settimeout(seconds)

    def _receive_some(self, view: memoryview, flags: int = 0) -> int:
        try:
            return int(self._sock.recv_into(view, len(view), flags))
        except BlockingIOError as exc:  # from the kernel's timeout
            raise TimeoutError("timed out") from exc


class _Replayed(io.RawIOBase):
    """What was received already, and what comes after it, as http.client wants it of a socket."""

    def __init__(self, received: bytes, receive: Callable[[memoryview], int]) -> None:
        self._received = io.BytesIO(received)
        self._receive = receive

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - as io has it
        return self._received.readinto(buffer) or self._receive(memoryview(buffer))


class RangeRequests:
    """Sends GETs for objects of one bucket. Thread-safe.

    Args:
        client: Prepares and signs them, and has the connections.
        bucket: Where the objects lie.
        patience: How long a read waits for its next bytes, in seconds.
        clock: Seconds.
    """

    def __init__(
        self,
        client: S3Client,
        bucket: str,
        patience: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._bucket = bucket
        self._patience = patience
        self._clock = clock
        self._signed: dict[str, _Signed] = {}
        self._proven = False
        self._preparing = threading.local()
        # botocore has no public way to its connections; without them every request is sent by botocore.
        session: Any = getattr(getattr(client, "_endpoint", None), "http_session", None)
        private = ("_get_connection_manager", "_setup_ssl_cert", "_verify")
        self._session: Any = session if all(hasattr(session, name) for name in private) else None
        self._shape: Any = client.meta.service_model.operation_model("GetObject").output_shape
        keep: Any = self._keep  # the stubs have it that handlers return nothing
        client.meta.events.register("before-send.s3.GetObject", keep)
        client.meta.events.register("after-call.s3", self._answered)

    def get(self, key: str, headers: Mapping[str, str]) -> RangeAnswer | None:
        """The answer to a GET of ``key`` with ``headers``; None where botocore is to ask.

        Raises:
            Exception: As the client's own requests.
        """
        if self._session is None or not self._proven:
            return None
        signed = self._signed.get(key)
        if signed is None or self._clock() > signed.until:
            signed = self._sign(key)
            if signed is None:
                self._session = None
                return None
            self._signed[key] = signed
        answer = self._connected(signed.url)
        if answer is None:
            return None
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        try:
            answer.send(b"%s%s\r\n" % (signed.head, lines.encode("latin-1")))
            if answer.has_content:
                return answer
            content = answer.error_content()
        except TimeoutError as exc:
            answer.close()
            raise ReadTimeoutError(endpoint_url=signed.url, error=exc) from exc
        except (OSError, HTTPException) as exc:
            answer.close()
            raise ConnectionClosedError(endpoint_url=signed.url, error=exc) from exc
        if answer.status < 300:  # sent in another form, as the next ones will be
            self._session = None
            return None
        if answer.status in _BOTOCORE_KNOWS:
            self._signed.clear()
            return None
        told = {"status_code": answer.status, "headers": answer.headers, "body": content}
        raise ClientError(create_parser("rest-xml").parse(told, self._shape), "GetObject")

    def _connected(self, url: str) -> RangeAnswer | None:
        """A connection, and what is to be read from it; None where botocore shall find out why there is none."""
        session = self._session
        pool = session._get_connection_manager(url).connection_from_url(url)
        session._setup_ssl_cert(pool, url, session._verify)
        connection = None
        try:
            connection = pool._get_conn()
            if connection.sock is None:
                connection.connect()
        except Exception:  # noqa: BLE001 - whatever it is, botocore meets it too, and has words for it
            if connection is not None:
                connection.close()
            return None
        return RangeAnswer(pool, connection, self._patience)

    def _sign(self, key: str) -> _Signed | None:
        """What the requests for ``key`` have in common; None where they are not for us to send."""
        until = self._clock() + _SIGNED_SECONDS
        preparing = self._preparing
        preparing.request = None
        preparing.under_way = True
        try:
            self._client.get_object(Bucket=self._bucket, Key=key)
        finally:
            preparing.under_way = False
        request: AWSPreparedRequest = preparing.request
        url = urlsplit(request.url)
        if get_environ_proxies(request.url):
            return None
        target = f"{url.path or '/'}?{url.query}" if url.query else url.path or "/"
        lines = [f"GET {target} HTTP/1.1", "Accept-Encoding: identity"]
        if "Host" not in request.headers:
            lines.append(f"Host: {url.netloc}")
        value: Any
        for name, value in request.headers.items():
            text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
            if "\r" in text or "\n" in text:
                return None
            lines.append(f"{name}: {text}")
        return _Signed(request.url, "".join(f"{line}\r\n" for line in lines).encode("latin-1"), until)

    def _answered(self, http_response: AWSResponse, **_: object) -> None:
        self._proven = self._proven or http_response.status_code < 300

    def _keep(self, request: AWSPreparedRequest, **_: object) -> AWSResponse | None:
        """Keep a request that this thread prepares, which is not sent: an empty answer stands for S3's."""
        if not getattr(self._preparing, "under_way", False):
            return None
        self._preparing.request = request
        nothing: Any = {}
        return AWSResponse(request.url, 200, nothing, io.BytesIO())
