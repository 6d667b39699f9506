"""What stands in files that others replace while a process runs: certificates, keys, tokens."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from modelexpress_core.errors import SettingsError

__all__ = ["Files", "read_bytes"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: Files that are replaced while they are read are read again, this often at most.
_ATTEMPTS = 5

_Signature = tuple[tuple[int, int, int] | None, ...]


def read_bytes(path: str, variable: str) -> bytes:
    """What the file has in it.

    Raises:
        SettingsError: It cannot be read; the message names it, and the ``variable`` that named it.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as exc:  # the latter where the path holds a NUL
        message = f"the file that {variable} names cannot be read: {path}: {getattr(exc, 'strerror', None) or exc}"
        raise SettingsError(message, hint=f"correct {variable}, or the permissions of the file") from exc


class Files(Generic[_T]):
    """A value made of files: made anew whenever one of them has changed. Thread-safe.

    Where they can no longer be read, or make no sense, the last value stays, and the log says so once.

    Args:
        paths: The files.
        read: Makes the value; raises ``SettingsError`` where that is impossible.

    Raises:
        SettingsError: By the constructor, where the value cannot be made the first time.
    """

    def __init__(self, paths: Sequence[str], read: Callable[[], _T]) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._lock = threading.Lock()
        self._signature, self._value = self._settled()

    def value(self) -> _T:
        """The value as of now."""
        return self.changed()[0]

    def changed(self) -> tuple[_T, bool]:
        """The value as of now, and whether it was made by this call."""
        with self._lock:
            signature = self._look()
            if signature == self._signature:
                return self._value, False
            try:
                self._signature, self._value = self._settled()
            except SettingsError as exc:
                self._signature = signature  # said once
                _log.error("going on with what %s said before: %s", " and ".join(self._paths), exc)
                return self._value, False
            return self._value, True

    def _settled(self) -> tuple[_Signature, _T]:
        """A value of files that nobody replaced meanwhile."""
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
