"""What the storages over HTTP of all services do in the same way: reading, patience, closing, explaining failures."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from modelexpress_core.errors import BackendError
from modelexpress_core.storage.http.connections import ConnectionPool
from modelexpress_core.storage.http.failures import Failures
from modelexpress_core.storage.http.listings import ListingPage, entries_of_pages
from modelexpress_core.storage.http.ranges import RangeReader

__all__ = ["HttpStorage"]

E = TypeVar("E")


class HttpStorage:
    """A storage without ``list`` and ``stat``, which a plugin adds: its class inherits this one.

    What begins with an underscore is for such classes: ``_pool``, ``_failures``, ``_read_timeout_seconds``,
    ``_entries`` and ``_explained``.

    Args:
        reader: Reads ranges.
        pool: Its connections, which are closed with the storage.
        failures: Explains what goes wrong.
        read_timeout_seconds: How long requests other than reads wait for the next bytes.
        clock: Seconds; says how long a listing takes.
    """

    def __init__(
        self,
        reader: RangeReader,
        pool: ConnectionPool,
        failures: Failures,
        *,
        read_timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reader = reader
        self._pool = pool
        self._failures = failures
        self._read_timeout_seconds = read_timeout_seconds
        self._clock = clock

    @property
    def patience_seconds(self) -> float:
        """How long a read waits for its next bytes; at most, and to begin with, the read timeout of the settings."""
        return self._reader.patience_seconds

    @patience_seconds.setter
    def patience_seconds(self, seconds: float) -> None:
        self._reader.patience_seconds = seconds

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        """Read into ``buffer`` with one GET of the range, which is refused if the version is no longer ``version``."""
        return self._reader.read_into(path, offset, buffer, version=version)

    def close(self) -> None:
        """Shut the connections down; reads that are under way in other threads fail at once."""
        self._pool.close()

    def _entries(
        self, page: Callable[[str | None], ListingPage[E]], path: str, operation: str, *, things: str = "objects"
    ) -> Iterator[E]:
        """The entries of all pages of a listing, as ``entries_of_pages`` yields them."""
        return entries_of_pages(
            page,
            self._failures,
            path,
            operation,
            read_timeout_seconds=self._read_timeout_seconds,
            clock=self._clock,
            things=things,
        )

    @contextlib.contextmanager
    def _explained(self, path: str, operation: str) -> Iterator[None]:
        """Raise what goes wrong in the block as an error that names the object and the operation."""
        try:
            yield
        except self._failures.caught as exc:
            raise self._failure(exc, path, operation) from exc

    def _failure(self, exc: Exception, path: str, operation: str) -> BackendError:
        return self._failures.of_exception(exc, path, operation, self._read_timeout_seconds)
