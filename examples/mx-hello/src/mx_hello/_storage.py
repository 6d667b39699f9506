"""Reads ranges of files from a web server that lists its directories as JSON, as nginx does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import quote

from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.errors import (
    BackendError,
    DeadlineError,
    InvalidURIError,
    NotFoundError,
    SourceChangedError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.storage.http import OpenSockets, http_error
from modelexpress_core.uri import ModelURI


class HelloStorage:
    """The files of one web server. A file's version is its ETag."""

    def __init__(self, authority: str) -> None:
        if not re.fullmatch(r"([^:\[\]]+|\[[^\]]+\])(:\d+)?", authority):
            raise InvalidURIError(f"the URI has no host: hello://{authority}", hint="write hello://host:port/path")
        self.patience_seconds = 30.0  # until core sets it
        self._authority = authority
        self._sockets = OpenSockets()

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
        """Read into ``buffer``, until it is full or the connection breaks."""
        done, wanted = 0, f"{offset}-{offset + len(buffer) - 1}"
        with self._answer("GET", path, f"read bytes {wanted}", f"bytes={wanted}") as answer:
            if version not in (None, answer.headers["ETag"]):
                raise SourceChangedError("the file was replaced", **self._named(path, f"read bytes {wanted}"))
            if answer.status != 206 and offset:
                raise UnsupportedError("the server ignores Range", **self._named(path, f"read bytes {wanted}"))
            try:
                while count := answer.readinto(buffer[done : done + 65536]):
                    done += count
            except (OSError, HTTPException):
                if not done:  # else core continues behind the bytes that arrived
                    raise
        return done

    def close(self) -> None:
        """End the reads in other threads."""
        self._sockets.shut_down()

    @contextmanager
    def _answer(self, method: str, path: str, operation: str, byte_range: str = "") -> Iterator[HTTPResponse]:
        """The server's answer to one request. Translates all errors."""
        named = self._named(path, operation)
        connection = HTTPConnection(self._authority, timeout=self.patience_seconds)
        try:
            connection.connect()
            self._sockets.add(connection.sock)
            connection.request(method, f"/{quote(path)}", headers={"Range": byte_range} if byte_range else {})
            answer = connection.getresponse()
            if answer.status not in (200, 206):
                raise http_error(answer.status, answer.reason, retry_after=answer.headers["Retry-After"], **named)
            yield answer
        except (OSError, HTTPException) as exc:
            if self._sockets.closed:
                raise BackendError("the storage was closed", **named) from exc
            kind = DeadlineError if isinstance(exc, TimeoutError) else UnavailableError
            raise kind(f"the connection failed: {type(exc).__name__}", **named) from exc
        except (ValueError, TypeError, KeyError) as exc:
            raise UnsupportedError("the answer has another format than nginx sends", **named) from exc
        finally:
            connection.close()

    def _named(self, path: str, operation: str) -> dict[str, Any]:
        """The object, the operation and the provider, for an error."""
        return {"uri": str(ModelURI("hello", self._authority, path)), "operation": operation, "provider": "mx-hello"}
