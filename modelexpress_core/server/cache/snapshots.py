"""One version of a model in the cache, complete or still arriving, and how it is read."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from modelexpress_core.checkpoint.manifest import TABLES, Manifest
from modelexpress_core.copying.local import local_errors
from modelexpress_core.errors import ModelExpressError, NotFoundError, SourceChangedError, UnavailableError
from modelexpress_core.server.cache.records import COMMIT_DIGITS, CachedFile, Record, StoredFile, key_of

if TYPE_CHECKING:
    from modelexpress_core.server.cache.downloads import Download

__all__ = ["CachedFileReader", "Snapshot"]

#: How long a reader waits for a file to begin.
_BEGIN_SECONDS = 20.0

#: Whoever waits for bytes looks at least so often whether the download still runs.
_LOOK_SECONDS = 1.0


class CachedFileReader:
    """A file that is open for reading, perhaps while it arrives.

    Args:
        descriptor: Of the file, whose missing bytes are holes.
        size: Its length in bytes.
        wait: Waits for bytes of it.

    Attributes:
        descriptor: As above; closed by ``close``.
        size: As above.
    """

    def __init__(self, descriptor: int, size: int, wait: Callable[[int, int, float], bool]) -> None:
        self.descriptor = descriptor
        self.size = size
        self._wait = wait

    def wait(self, start: int, end: int, seconds: float) -> bool:
        """Wait until the bytes from ``start`` to ``end`` are there, for at most ``seconds``; returns whether they are.

        Raises:
            ModelExpressError: The download failed, or began the file again.
        """
        return self._wait(start, end, seconds)

    def close(self) -> None:
        """Close the descriptor."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Snapshot:
    """One version of one model. Thread-safe.

    Args:
        root: The directory of the cache.
        record: What is known of it, if it is complete.
        download: What brings it, if it is not.
        on_damage: Called if a file is not the one any more that was verified.

    Attributes:
        place: Canonical name of the model.
        source: Redacted URI of its storage.
        version: What readers pin.
        revision: What was asked for when it was downloaded.
        weights: Whether files of weights are part of it.
        restricted: Whether its storage gives it to some readers alone.
        files: The files, by their paths.
        size_bytes: Bytes of all of them.
    """

    def __init__(
        self,
        root: str,
        *,
        record: Record | None = None,
        download: Download | None = None,
        on_damage: Callable[[Snapshot], None] = lambda _snapshot: None,
    ) -> None:
        facts = record or download
        assert facts is not None  # noqa: S101 - for the type checker: callers pass one of them
        self.place: str = facts.place
        self.source: str = facts.source
        self.version: str = facts.version
        self.revision: str = facts.revision
        self.weights: bool = facts.weights
        self.restricted: bool = facts.restricted
        files = [stored.file for stored in record.files] if record else list(download.files) if download else []
        self.files: Mapping[str, CachedFile] = MappingProxyType({file.path: file for file in files})
        self.size_bytes = sum(file.size for file in files)
        self._root = root
        self._record = record
        self._download = download
        self._on_damage = on_damage
        self._stored: Mapping[str, StoredFile] = {}
        if record is not None:
            self._stored = {stored.file.path: stored for stored in record.files}

    @property
    def key(self) -> str:
        """Names its files on disk."""
        return key_of(self.place, self.version, weights=self.weights)

    @property
    def commit_hash(self) -> str:
        """The version as 40 hex digits, which existing clients expect."""
        return self.version[:COMMIT_DIGITS]

    @property
    def record(self) -> Record | None:
        """What is known of it, once it is complete."""
        if self._record is None and self._download is not None and self._download.record is not None:
            record = self._download.record
            self._stored = {stored.file.path: stored for stored in record.files}
            self._record = record
        return self._record

    @property
    def complete(self) -> bool:
        """Whether all files are there, and were compared with the digests of their storage."""
        return self.record is not None

    @property
    def present_bytes(self) -> int:
        """Bytes that are there."""
        return self.size_bytes if self.record is not None or not self._download else self._download.present_bytes

    @property
    def error(self) -> ModelExpressError | None:
        """Why its download failed."""
        return None if self.record is not None or not self._download else self._download.error

    def wait(self, seconds: float) -> bool:
        """Wait until it is complete, for at most ``seconds``; returns whether it is.

        Raises:
            ModelExpressError: The download failed.
        """
        return self._download is None or self._download.wait(lambda: self.complete, seconds)

    @property
    def directory(self) -> str | None:
        """The directory that has all files under their names; None while they arrive."""
        return None if self.record is None else os.path.join(self._root, self.record.directory)

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[CachedFileReader]:
        """Open a file for the ``with`` block; it is waited for until it begins.

        Raises:
            NotFoundError: It has no such file.
            SourceChangedError: The file is not the one any more that was verified.
            ModelExpressError: The download failed, or the file cannot be opened.
        """
        reader = self.open_file(path)
        try:
            yield reader
        finally:
            reader.close()

    def open_file(self, path: str) -> CachedFileReader:
        """As ``open``, for callers that close it."""
        reader = self.try_open_file(path, _BEGIN_SECONDS)
        if reader is None:
            raise UnavailableError(
                f"the download of {self.place} has not reached {path!r} yet", hint="ask again in a moment"
            )
        return reader

    def try_open_file(self, path: str, seconds: float) -> CachedFileReader | None:
        """As ``open_file``; None if the file does not begin within ``seconds``."""
        file = self.files.get(path)
        if file is None:
            raise NotFoundError(
                f"{self.place} has no file {path!r} at {self.version[:12]}",
                uri=self.source,
                hint="list its files with mx models list, or ask for another revision",
            )
        if self.record is None:
            assert self._download is not None  # noqa: S101 - for the type checker: it has a record, or a download
            return self._download.open_file(file, seconds)
        return self._open_stored(self._stored[path])

    def _open_stored(self, stored: StoredFile) -> CachedFileReader:
        blob = os.path.join(self._root, stored.blob)
        try:
            descriptor = os.open(blob, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            raise self._damaged(stored, "is gone") from exc
        except OSError:
            with local_errors(blob, "open"):
                raise
        if not stored.is_unchanged(os.fstat(descriptor)):
            os.close(descriptor)
            raise self._damaged(stored, "was changed or replaced")
        return CachedFileReader(descriptor, stored.file.size, lambda _start, _end, _seconds: True)

    def _damaged(self, stored: StoredFile, what: str) -> SourceChangedError:
        self._on_damage(self)
        return SourceChangedError(
            f"{stored.file.path!r} {what} in the cache since it was verified",
            uri=self.source,
            cause="another program writes to the directory of the cache",
            hint="ask again: it is downloaded again",
        )

    def manifest(self) -> tuple[Manifest, Mapping[str, str]]:
        """The index of its chunk manifest, and the path of each table.

        Raises:
            ModelExpressError: It is not complete yet, or the manifest cannot be read.
        """
        record = self.record
        if record is None:
            message = f"{self.place} is still being downloaded, and has no chunk manifest yet"
            raise ModelExpressError(message, hint="ask again when it is complete")
        directory = manifest_directory(self._root, record.key)
        with local_errors(directory, "read"), open(os.path.join(directory, "index"), "rb") as file:
            manifest = Manifest.parse(file.read())
        return manifest, {table: os.path.join(directory, table) for table in TABLES}


def manifest_directory(root: str, key: str) -> str:
    """The directory of the chunk manifest of a version."""
    return os.path.join(root, ".mx", "manifests", key)


def wait_for(changed: threading.Condition, met: Callable[[], bool], seconds: float) -> bool:
    """Wait on ``changed`` until ``met``; returns whether it is. ``met`` may raise."""
    deadline = time.monotonic() + seconds
    with changed:
        while not met():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            changed.wait(min(left, _LOOK_SECONDS))
    return True
