"""Reading ranges of files from a web server that lists its directories as JSON, as nginx does."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import quote

from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    InvalidURIError,
    NotFoundError,
    SourceChangedError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.storage import ObjectInfo
from modelexpress_core.uri import ModelURI

#: HTTP status -> what it means for a load; from 500 on the server has a fault that may pass.
_MEANING = {
    401: AccessDeniedError,
    403: AccessDeniedError,
    404: NotFoundError,
    416: SourceChangedError,  # the file is shorter than the range that was asked for
    429: UnavailableError,
}


class HelloStorage:
    """The files of one web server. A file's version is its ETag."""

    def __init__(self, authority: str) -> None:
        if not re.fullmatch(r"([^:\[\]]+|\[[^\]]+\])(:\d+)?", authority):
            raise InvalidURIError(f"no host and port: hello://{authority}", hint="write hello://host:port/path")
        self._authority = authority
        self._sockets: dict[HTTPConnection, socket.socket] = {}
        self._closed = False

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The files below the directory ``prefix``."""
        folder = f"{prefix}/" if prefix else ""
        try:
            with self._answer("GET", folder, "list the files") as answer:
                entries = [(folder + entry["name"], entry["type"]) for entry in json.load(answer)]
        except NotFoundError:
            return
        for path, kind in entries:
            yield from self.list(path) if kind == "directory" else [self.stat(path)]

    def stat(self, path: str) -> ObjectInfo:
        """The file at ``path``."""
        with self._answer("HEAD", path, "read the size") as answer:
            return ObjectInfo(path, int(answer.headers["Content-Length"]), answer.headers["ETag"])

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        """Read into ``buffer``, as far as the connection holds."""
        last, done = offset + len(buffer) - 1, 0
        with self._answer("GET", path, f"read bytes {offset}-{last}", f"bytes={offset}-{last}") as answer:
            if version not in (None, answer.headers["ETag"]):
                raise self._error(SourceChangedError, "the file was replaced", path, "read it")
            if answer.status != 206 and offset:
                raise self._error(UnsupportedError, "the server ignores Range", path, "read a part of it")
            with suppress(OSError, HTTPException):  # what arrived before counts, and core goes on behind it
                while count := answer.readinto(buffer[done : done + 65536]):
                    done += count
            if not done and answer.length:
                raise ConnectionError("the connection broke before the first byte")
        return done

    def close(self) -> None:
        """End the reads that are under way."""
        self._closed = True
        for sock in list(self._sockets.values()):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _answer(self, method: str, path: str, operation: str, byte_range: str = "") -> Iterator[HTTPResponse]:
        """The server's answer to one request, and an error of ours for whatever goes wrong with it."""
        connection = HTTPConnection(self._authority, timeout=30)
        try:
            connection.connect()
            self._sockets[connection] = connection.sock
            if self._closed:
                raise ConnectionError
            connection.request(method, f"/{quote(path)}", headers={"Range": byte_range} if byte_range else {})
            answer = connection.getresponse()
            if answer.status not in (200, 206):
                kind = UnavailableError if answer.status >= 500 else _MEANING.get(answer.status, BackendError)
                raise self._error(kind, f"HTTP {answer.status} {answer.reason}", path, operation)
            yield answer
        except (OSError, HTTPException) as exc:
            if self._closed:
                raise self._error(BackendError, "the storage was closed", path, operation) from exc
            raise self._error(UnavailableError, type(exc).__name__, path, operation) from exc
        except (ValueError, TypeError, KeyError) as exc:
            raise self._error(UnsupportedError, "no answer of the kind that nginx gives", path, operation) from exc
        finally:
            connection.close()
            self._sockets.pop(connection, None)

    def _error(self, kind: type[BackendError], reason: str, path: str, operation: str) -> BackendError:
        uri = str(ModelURI("hello", self._authority, path))
        return kind(reason, uri=uri, operation=operation, provider="mx-hello")
