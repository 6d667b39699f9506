"""Files that other programs replace while a process runs: certificates, keys, tokens."""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from modelexpress_core.errors import SettingsError

__all__ = ["WatchedFiles", "read_bytes"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: Variables that name files with secrets.
_SECRETS = frozenset({"MX_AUTH_TOKENS_PATH", "MX_AUTH_TOKEN_PATH", "MX_METRICS_TOKEN_PATH", "MX_TLS_KEY_PATH"})

#: Files with secrets that others can read, which the log has named.
_named: set[str] = set()

#: Readings of files that change while they are read.
_ATTEMPTS = 5

_Signature = tuple[tuple[int, int, int] | None, ...]


def read_bytes(path: str, variable: str) -> bytes:
    """The content of a file. The log warns once of a file with secrets that all users can read.

    Raises:
        SettingsError: It cannot be read; the message names the file, and the ``variable`` that names it.
    """
    try:
        with open(path, "rb") as file:
            if variable in _SECRETS and os.fstat(file.fileno()).st_mode & stat.S_IROTH and path not in _named:
                _named.add(path)
                _log.warning("all users of this machine can read %s, which %s names: chmod o-r it", path, variable)
            return file.read()
    except (OSError, ValueError) as exc:  # the latter for a path with a NUL in it
        message = f"the file that {variable} names cannot be read: {path}: {getattr(exc, 'strerror', None) or exc}"
        raise SettingsError(message, hint=f"correct {variable}, or the permissions of the file") from exc


class WatchedFiles(Generic[_T]):
    """A value that is read from files, and read again when one of them has changed. Thread-safe.

    If changed files cannot be used, the last value stays in use, and the log says so once.

    Args:
        paths: The files.
        read: Reads the value; raises ``SettingsError`` if the files cannot be used.

    Raises:
        SettingsError: By the constructor, if the first reading fails.
    """

    def __init__(self, paths: Sequence[str], read: Callable[[], _T]) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._lock = threading.Lock()
        self._signature, self._value = self._settled()

    def value(self) -> _T:
        """The present value."""
        return self.changed()[0]

    def changed(self) -> tuple[_T, bool]:
        """The present value, and whether this call has read it."""
        with self._lock:
            signature = self._look()
            if signature == self._signature:
                return self._value, False
            try:
                self._signature, self._value = self._settled()
            except SettingsError as exc:
                self._signature = signature  # logged once
                _log.error("the former content of %s stays in use: %s", " and ".join(self._paths), exc)
                return self._value, False
            return self._value, True

    def _settled(self) -> tuple[_Signature, _T]:
        """A value of files that did not change while they were read."""
        for attempt in range(_ATTEMPTS):
            before = self._look()
            try:
                value = self._read()
            except SettingsError:
                if before == self._look() or attempt == _ATTEMPTS - 1:
                    raise
                continue
            if before == self._look():
                return before, value
        message = f"{' and '.join(self._paths)} keep changing while they are read"
        raise SettingsError(message, hint="replace files by renaming new ones onto them")

    def _look(self) -> _Signature:
        return tuple(_signature(path) for path in self._paths)


def _signature(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
