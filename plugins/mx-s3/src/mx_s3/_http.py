"""What botocore does not offer: the sockets below a client, and a body's bytes read straight into memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError
from urllib3.exceptions import HTTPError

from modelexpress_core.storage.http import OpenSockets

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

__all__ = ["BotocoreAnswer", "Connections"]

#: The most that is lost where a connection is reset: what http.client read before does not count then.
_PIECE_BYTES = 256 << 10


class _Reading(threading.local):
    """The read that this thread is at."""

    under_way = False
    sock: Any = None
    timeout_seconds = 0.0


class Connections:
    """The sockets of one client, so that one thread can end what others wait for, and waits can be cut short.

    Args:
        read_timeout_seconds: How long the client itself waits for the next bytes.
    """

    def __init__(self, read_timeout_seconds: float) -> None:
        self._sockets = OpenSockets()
        self._reading = _Reading()
        self._read_timeout_seconds = read_timeout_seconds
        self._patience_seconds = read_timeout_seconds

    @property
    def closed(self) -> bool:
        """Reads have been ended, and later ones will fail."""
        return self._sockets.closed

    @property
    def patience_seconds(self) -> float:
        """How long a read waits for its next bytes; never longer than the client does."""
        return self._patience_seconds

    @patience_seconds.setter
    def patience_seconds(self, seconds: float) -> None:
        self._patience_seconds = min(seconds, self._read_timeout_seconds)

    def watch(self, client: S3Client) -> None:
        """Know every socket that ``client`` opens from now on.

        botocore has no public way to them. Should a version of it keep them elsewhere, reads still end after
        ``close``, but only with what they wait for, or with its timeout; and silent ones with its timeout.
        """
        endpoint: Any = getattr(client, "_endpoint", None)
        pools = getattr(getattr(endpoint, "http_session", None), "_pool_classes_by_scheme", {})
        for scheme, pool in pools.items():
            methods = {"connect": self._connect(pool), "getresponse": self._getresponse(pool)}
            watched = type(pool.ConnectionCls.__name__, (pool.ConnectionCls,), methods)
            pools[scheme] = type(pool.__name__, (pool,), {"ConnectionCls": watched})

    @contextmanager
    def reading(self) -> Iterator[Callable[[], None]]:
        """Within it, requests of this thread wait no longer than ``patience_seconds``.

        Yields:
            What makes the patience of the moment hold for the body that is read next.
        """
        self._reading.under_way = True
        try:
            yield self._wait_patiently
        finally:
            self._reading.under_way, self._reading.sock = False, None

    def _wait_patiently(self) -> None:
        reading, seconds = self._reading, self._patience_seconds
        if reading.sock is not None and reading.timeout_seconds != seconds:
            reading.timeout_seconds = seconds
            with suppress(OSError):  # closed: the read finds that out
                reading.sock.settimeout(seconds)

    def _getresponse(self, pool: Any) -> Callable[..., Any]:  # noqa: ANN401 - a class of urllib3's pools
        original = pool.ConnectionCls.getresponse

        def getresponse(connection: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - of that pool
            if self._reading.under_way and connection.sock is not None:
                self._reading.sock, self._reading.timeout_seconds = connection.sock, self._patience_seconds
                connection.sock.settimeout(self._patience_seconds)
                connection.timeout = self._patience_seconds  # urllib3 2 sets the socket's timeout to this once more
            return original(connection, *args, **kwargs)

        return getresponse

    def _connect(self, pool: Any) -> Callable[[Any], None]:  # noqa: ANN401 - a class of urllib3's pools
        original = pool.ConnectionCls.connect

        def connect(connection: Any) -> None:  # noqa: ANN401 - of that pool
            original(connection)
            try:
                self._sockets.add(connection.sock)
            except ConnectionAbortedError:
                connection.close()
                raise

        return connect

    def shut_down(self) -> None:
        """End every read that waits for bytes, and every one that comes later."""
        self._sockets.shut_down()


class BotocoreAnswer:
    """The answer to a GetObject of botocore's, its content not read yet.

    Args:
        response: What ``get_object`` returned.
        wait_patiently: Called before each of the few waits.

    Attributes:
        status: The HTTP status.
        headers: By names in small letters.
    """

    def __init__(self, response: GetObjectOutputTypeDef, wait_patiently: Callable[[], None]) -> None:
        self._body = response["Body"]
        self._wait_patiently = wait_patiently
        self.status = response["ResponseMetadata"]["HTTPStatusCode"]
        self.headers: Mapping[str, str] = response["ResponseMetadata"]["HTTPHeaders"]

    def read_into(self, view: memoryview) -> tuple[int, Exception | None]:
        """Fill ``view`` with the next bytes, and give up the connection: for reuse if the content is at its end.

        Returns:
            Number of bytes that arrived, and what kept more from arriving (None where the stream just ended).
        """
        body = self._body
        response: Any = getattr(body, "_raw_stream", None)
        # urllib3's own readinto goes through a copy; that of http.client, below it, does not.
        readinto = getattr(getattr(response, "_fp", None), "readinto", None) or _copying(body)
        done, error = 0, None
        try:
            while done < len(view):
                self._wait_patiently()
                count = readinto(view[done : done + _PIECE_BYTES])
                if not count:
                    break
                done += count
        except (OSError, HTTPException, HTTPError, BotoCoreError) as exc:
            error = exc
        finally:
            if done < len(view) or not getattr(response, "closed", False):
                body.close()
            if hasattr(response, "release_conn"):
                response.release_conn()
        return done, error

    def close(self) -> None:
        """Give the content up, and the connection with it."""
        self._body.close()


def _copying(body: StreamingBody) -> Callable[[memoryview], int]:
    """What fills memory from ``body`` by its public methods alone."""

    def readinto(view: memoryview) -> int:
        piece = body.read(len(view))
        view[: len(piece)] = piece
        return len(piece)

    return readinto
