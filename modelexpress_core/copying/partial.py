"""An incomplete file: its bytes, and a journal of the bytes that were written.

The journal is a text file with a line for each event, and each line begins with a CRC of the rest. The first incomplete
line was being written when the process was killed; it and the lines after it are ignored::

    file {"name": ..., "root": ..., "size": ..., "version": ...}    which object the bytes belong to
    boot 8b1a...                                                    the machine was rebooted, or is another one
    have 0 8388608                                                  offset and length of bytes that were written
    sync 17                                                         the first 17 ranges since the boot line are on disk

Bytes are written before their line. If the process is killed, the kernel has both; a loss of power may keep the line
and lose the bytes, so after a reboot only synced ranges count.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import threading
import time
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator

import attrs
from attrs import field, frozen
from attrs.validators import instance_of, optional

from modelexpress_core.copying.directories import Directory, NotOwnFileError
from modelexpress_core.copying.local import Disk, local_errors, write_all

__all__ = ["Identity", "Partial", "Spans", "read_identity"]

#: A longer journal is not read: the file is fetched again.
_MAX_JOURNAL_BYTES = 64 << 20

#: The first line has a name of at most 4 KiB and a URI.
_MAX_FIRST_LINE_BYTES = 64 << 10


@frozen
class Identity:
    """The object that a partial file belongs to.

    Attributes:
        root: Redacted URI that was pulled.
        name: Name below it.
        version: Version of the object; None if the storage has no versions.
        size: Its length in bytes.
    """

    root: str = field(validator=instance_of(str))
    name: str = field(validator=instance_of(str))
    version: str | None = field(validator=optional(instance_of(str)))
    size: int = field(validator=instance_of(int))

    @property
    def key(self) -> str:
        """A unique name for its files."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    @property
    def text(self) -> str:
        """Its form in the journal."""
        return json.dumps(attrs.asdict(self), sort_keys=True)


class Spans:
    """Which bytes of a file are present: ranges that neither overlap nor touch, in order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, offset: int, length: int) -> None:
        """``length`` bytes from ``offset`` on are present."""
        start, end = offset, offset + length
        first = bisect_left(self._ends, start)
        last = first
        while last < len(self._starts) and self._starts[last] <= end:
            last += 1
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Offset and length of each range."""
        return ((start, end - start) for start, end in zip(self._starts, self._ends, strict=True))

    @property
    def total(self) -> int:
        """Bytes that are present."""
        return sum(self._ends) - sum(self._starts)

    def covers(self, start: int, end: int) -> bool:
        """Whether all bytes from ``start`` to ``end`` are present."""
        at = bisect_left(self._ends, end)
        return start >= end or (at < len(self._starts) and self._starts[at] <= start)

    def missing(self, size: int, most: int) -> Iterator[tuple[int, int]]:
        """Offset and length of the missing ones of ``size`` bytes, in pieces of at most ``most``."""
        position = 0
        for start, length in [*self, (size, 0)]:
            while position < start:
                piece = min(most, start - position)
                yield position, piece
                position += piece
            position = start + length


class Partial:
    """The bytes and the journal of one file. ``write`` is thread-safe.

    Args:
        directory: The directory of both, to which this user alone may write.
        identity: The object that they belong to.
        disk: The disk that holds both.
    """

    def __init__(self, directory: Directory, identity: Identity, *, disk: Disk | None = None) -> None:
        self.identity = identity
        self._disk = disk or Disk()
        self._directory = directory
        self._part_name = f"{identity.key}.part"
        self._journal_name = f"{identity.key}.journal"
        self.path = directory.path_of(self._part_name)
        self._lock = threading.Lock()
        self._syncing = threading.Lock()
        self._descriptor = -1
        self._journal = -1
        self._users = 0
        self._closed = False
        self._spans = Spans()
        self._since_boot = 0
        self._synced = 0.0

    @property
    def present_bytes(self) -> int:
        """Bytes that were written."""
        with self._lock:
            return self._spans.total

    @property
    def complete(self) -> bool:
        """Whether all bytes were written."""
        return self.present_bytes == self.identity.size

    def covers(self, start: int, end: int) -> bool:
        """Whether all bytes from ``start`` to ``end`` were written."""
        with self._lock:
            return self._spans.covers(start, end)

    def missing(self, most: int) -> list[tuple[int, int]]:
        """Offset and length of the missing bytes, in pieces of at most ``most``."""
        with self._lock:
            return list(self._spans.missing(self.identity.size, most))

    @property
    def allocated_bytes(self) -> int:
        """Disk space of the file."""
        try:
            return self._directory.stat(self._part_name).st_blocks * 512
        except FileNotFoundError:
            return 0

    @property
    def file_bytes(self) -> int | None:
        """Length of the file; bytes that are missing are holes in it. None if there is no file."""
        try:
            return self._directory.stat(self._part_name).st_size
        except FileNotFoundError:
            return None

    # -- before and after ---------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Resume from the bytes that an earlier pull left, or remove them if they cannot be trusted."""
        with local_errors(self.path, "resume"):
            with contextlib.suppress(NotOwnFileError):
                if self.identity.version is not None and self._replay():
                    return
            self.discard()

    def reserve(self) -> None:
        """Create the files and reserve the space."""
        with local_errors(self.path, f"allocate {self.identity.size} bytes for {self.identity.name!r} in"):
            descriptor = self._directory.open_own(self._part_name, os.O_RDWR | os.O_CREAT)
            try:
                self._disk.allocate(descriptor, self.identity.size)
            finally:
                os.close(descriptor)
            if not self._directory.exists(self._journal_name):
                self._begin_journal()

    def restart(self) -> None:
        """Remove all bytes, because they are wrong, and begin again."""
        with local_errors(self.path, "begin again with"):
            self.discard()
        self.reserve()

    def discard(self) -> None:
        """Remove both files."""
        with self._lock:
            if not self._users:
                self._release()
            self._spans = Spans()
            self._since_boot = 0
        # The journal first: bytes without a journal are ignored, whatever happens in between.
        for name in (self._journal_name, self._part_name):
            self._directory.unlink(name)

    def open(self) -> int:
        """A descriptor for reading the bytes."""
        return self._directory.open_own(self._part_name, os.O_RDONLY)

    def publish(self, target: Directory, before: Callable[[int], None]) -> None:
        """Move the complete file to its name below ``target``.

        Args:
            target: The directory that is pulled into.
            before: Called with the file's modification time in nanoseconds, when all bytes are on disk.
        """
        with local_errors(self.path, f"finish {self.identity.name!r} in"):
            self.sync()
            before(self._directory.stat(self._part_name).st_mtime_ns)
        with (
            local_errors(target.path_of(self.identity.name), "put in place"),
            target.parent_of(self.identity.name) as (parent, last),
        ):
            self._directory.replace(self._part_name, parent, last)
            self._directory.unlink(self._journal_name)

    def close(self) -> None:
        """Stop writing. The bytes stay for the next pull, if there are any and their version is known."""
        with self._lock:
            self._closed = True
            if not self._users:
                self._release()
        if self.identity.version is None or not self.present_bytes:
            self.discard()

    # -- while bytes arrive -------------------------------------------------------------------------------------------

    def write(self, data: memoryview, offset: int) -> None:
        """Write bytes of the file. Called by many threads at once."""
        with local_errors(self.path, f"write {self.identity.name!r} to"):
            descriptor, journal = self._borrow()
            try:
                write_all(descriptor, data, offset)
                with self._lock:
                    self._spans.add(offset, len(data))
                    self._since_boot += 1
                    write_all(journal, _line(f"have {offset} {len(data)}"))
                if time.monotonic() - self._synced >= self._disk.sync_seconds and self._syncing.acquire(blocking=False):
                    try:
                        self._sync(descriptor, journal)
                    finally:
                        self._syncing.release()
            finally:
                self._give_back()

    def _sync(self, descriptor: int, journal: int) -> None:
        with self._lock:
            ranges = self._since_boot
        self._sync_or_discard(descriptor)
        with self._lock:
            write_all(journal, _line(f"sync {ranges}"))
            self._synced = time.monotonic()

    def sync(self) -> None:
        """Write all bytes to the disk."""
        descriptor = self._directory.open_own(self._part_name, os.O_RDWR)
        try:
            self._sync_or_discard(descriptor)
        finally:
            os.close(descriptor)

    def _sync_or_discard(self, descriptor: int) -> None:
        try:
            self._disk.fsync(descriptor)
        except OSError:
            # It is unknown which bytes are on the disk, and another fsync would report success.
            with contextlib.suppress(OSError):
                self._directory.unlink(self._journal_name)
            raise

    def _borrow(self) -> tuple[int, int]:
        with self._lock:
            if self._closed:
                raise OSError(0, "the pull has ended")
            if self._descriptor < 0:
                self._descriptor = self._directory.open_own(self._part_name, os.O_RDWR)
                self._journal = self._directory.open_own(self._journal_name, os.O_WRONLY | os.O_APPEND)
                self._synced = time.monotonic()
            self._users += 1
            return self._descriptor, self._journal

    def _give_back(self) -> None:
        with self._lock:
            self._users -= 1
            # Many files may wait to be verified, and descriptors are limited.
            if not self._users and (self._closed or self._spans.total == self.identity.size):
                self._release()

    def _release(self) -> None:
        for descriptor in (self._descriptor, self._journal):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._journal = -1

    # -- the journal --------------------------------------------------------------------------------------------------

    def _begin_journal(self) -> None:
        descriptor = self._directory.create(self._journal_name)
        try:
            write_all(descriptor, _line(f"file {self.identity.text}") + _line(f"boot {self._disk.boot_id()}"))
        finally:
            os.close(descriptor)

    def _replay(self) -> bool:
        """Read the journal; whether the bytes that it lists can be used."""
        try:
            content = self._directory.read_own(self._journal_name, _MAX_JOURNAL_BYTES + 1)
            part = self._directory.open_own(self._part_name, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            size = os.fstat(part).st_size
        finally:
            os.close(part)
        if size != self.identity.size or len(content) > _MAX_JOURNAL_BYTES:
            return False
        try:
            lines, length = _whole_lines(content)
            synced, pending, boot = _ranges(lines[1:])
        except (IndexError, ValueError):  # whole lines, and yet not those of a journal
            return False
        if not lines or lines[0] != f"file {self.identity.text}":
            return False
        same_boot = boot and boot == self._disk.boot_id()
        for offset, count in [*synced, *(pending if same_boot else ())]:
            if not 0 <= offset < offset + count <= size:
                return False
            self._spans.add(offset, count)
        self._since_boot = len(pending) if same_boot else 0
        journal = self._directory.open_own(self._journal_name, os.O_WRONLY | os.O_APPEND)
        try:
            os.ftruncate(journal, length)
            if not same_boot:
                write_all(journal, _line(f"boot {self._disk.boot_id()}"))
        finally:
            os.close(journal)
        return True


def read_identity(directory: Directory, journal: str) -> Identity | None:
    """The object of the partial file with this journal; None if the journal does not say."""
    try:
        start = directory.read_own(journal, _MAX_FIRST_LINE_BYTES)
        lines, _ = _whole_lines(start[: start.find(b"\n") + 1])
        word, _, text = lines[0].partition(" ") if lines else ("", "", "")
        return Identity(**json.loads(text)) if word == "file" else None
    except (OSError, NotOwnFileError, RecursionError, ValueError, TypeError):
        return None


def _line(text: str) -> bytes:
    content = text.encode()
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _whole_lines(content: bytes) -> tuple[list[str], int]:
    """The lines before the first incomplete one, and their total length."""
    lines = []
    length = 0
    for line in io.BytesIO(content):
        text = line[9:-1]
        if line[:9] != b"%08x " % zlib.crc32(text) or line[-1:] != b"\n":
            break
        lines.append(text.decode())
        length += len(line)
    return lines, length


def _ranges(lines: list[str]) -> tuple[list[tuple[int, int]], list[tuple[int, int]], str]:
    """Ranges that are surely on disk, those written since the last boot line, and the id of that boot."""
    synced: list[tuple[int, int]] = []
    pending: list[tuple[int, int]] = []
    on_disk = 0
    boot = ""
    for line in lines:
        word, *values = line.split(" ")
        if word == "boot":
            synced += pending[:on_disk]
            boot, pending, on_disk = values[0], [], 0
        elif word == "have":
            pending.append((int(values[0]), int(values[1])))
        elif word == "sync":
            on_disk = int(values[0])
    return synced + pending[:on_disk], pending, boot
