"""Compares cached files with their chunk manifest, for readers that got parts of chunks."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from attrs import define, field

from modelexpress_core.bulk.requests import Run
from modelexpress_core.checkpoint.manifest import TABLES, chunk_digest
from modelexpress_core.errors import SourceChangedError
from modelexpress_core.server.services.file_reads import cut, read

if TYPE_CHECKING:
    from modelexpress_core.checkpoint.chunks import FileChunks
    from modelexpress_core.checkpoint.manifest import Manifest
    from modelexpress_core.server.cache import Snapshot

__all__ = ["ChunkComparison"]

#: A chunk that was compared is not compared again in this time, while its file is unchanged.
_COMPARED_SECONDS = 60.0

#: Files whose chunks are remembered.
_MAX_FILES = 512

#: Manifests that are remembered; one of a large model has some hundred kilobytes, and longer ones are read again.
_MAX_MANIFESTS = 16
_MAX_MANIFEST_BYTES = 1 << 20

_PART_BYTES = 256 << 10

_TABLE = "crc64nvme"


@define(eq=False)
class _File:
    """A file whose chunks are compared.

    Attributes:
        facts: Inode, size and times of it, when its chunks were compared.
        chunks: Its chunks.
        rows: Their digests.
        compared: When each chunk was found right, by the monotonic clock.
        lock: Held while one of its chunks is compared.
    """

    facts: tuple[int, ...]
    chunks: FileChunks
    rows: bytes
    compared: dict[int, float] = field(factory=dict)
    lock: threading.Lock = field(factory=threading.Lock)


class ChunkComparison:
    """Compares parts of files. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[tuple[str, str], _File] = OrderedDict()
        self._manifests: OrderedDict[str, tuple[Manifest, dict[str, str]]] = OrderedDict()

    def manifest(self, snapshot: Snapshot) -> tuple[Manifest, dict[str, str]]:
        """The index of the chunk manifest of a version, and the path of each table.

        Raises:
            ModelExpressError: It cannot be read.
        """
        with self._lock:
            known = self._manifests.get(snapshot.key)
        if known is None:
            manifest, tables = snapshot.manifest()
            known = (manifest, dict(tables))
            if len(manifest.text) <= _MAX_MANIFEST_BYTES:
                with self._lock:
                    self._manifests[snapshot.key] = known
                    while len(self._manifests) > _MAX_MANIFESTS:
                        self._manifests.popitem(last=False)
        return known

    def compare(self, snapshot: Snapshot, run: Run, crc: int) -> tuple[bool, int]:
        """Compare the chunks around a part with the manifest, and the part with the CRC of a reader.

        Args:
            snapshot: A version that is complete.
            run: The part, within its file.
            crc: The CRC-64/NVME of what the reader got.

        Returns:
            Whether the CRC is that of the part, and how many of the chunks are damaged.

        Raises:
            SourceChangedError: The file was changed meanwhile, or before.
            ModelExpressError: It cannot be read.
        """
        from awscrt import checksums

        with snapshot.open(run.name) as reader:
            descriptor = reader.descriptor
            before = _facts(descriptor)
            file = self._file(snapshot, run.name, descriptor, before)
            damaged = sum(not self._is_right(file, number, descriptor) for number in _touched(file.chunks, run))
            found = 0
            for part in cut(run, lambda: _PART_BYTES):
                found = int(checksums.crc64nvme(read(descriptor, part), found))
            if _facts(descriptor) != before:
                raise SourceChangedError(
                    f"{run.name!r} was changed in the cache while it was compared",
                    cause="another program writes to the directory of the cache",
                    hint="ask again: it is downloaded again",
                )
        return found == crc, damaged

    def _is_right(self, file: _File, number: int, descriptor: int) -> bool:
        with file.lock:
            if time.monotonic() - file.compared.get(number, -_COMPARED_SECONDS) < _COMPARED_SECONDS:
                return True
            start, end = file.chunks.bounds(number)
            width = TABLES[_TABLE]
            content = read(descriptor, Run("", start, end - start))
            right = chunk_digest(_TABLE, content) == file.rows[number * width : (number + 1) * width]
            if right:
                file.compared[number] = time.monotonic()
            else:
                file.compared.pop(number, None)
            return right

    def _file(self, snapshot: Snapshot, path: str, descriptor: int, facts: tuple[int, ...]) -> _File:
        key = (snapshot.key, path)
        with self._lock:
            known = self._files.get(key)
            if known is not None and known.facts == facts:
                self._files.move_to_end(key)
                return known
        from modelexpress_core.server.cache.chunk_tables import chunks_of

        manifest, tables = self.manifest(snapshot)
        entry = next(each for each in manifest.files if each.path == path)
        chunks, _ = chunks_of(descriptor, path, entry.size)
        width = TABLES[_TABLE]
        with open(tables[_TABLE], "rb") as table:
            table.seek(entry.first * width)
            rows = table.read(entry.chunks * width)
        if chunks.count != entry.chunks or len(rows) != entry.chunks * width:
            raise SourceChangedError(
                f"{path!r} in the cache does not have the chunks of its manifest",
                cause="another program writes to the directory of the cache",
                hint="remove the model from the cache, and ask again",
            )
        file = _File(facts, chunks, rows)
        with self._lock:
            self._files[key] = file
            while len(self._files) > _MAX_FILES:
                self._files.popitem(last=False)
        return file


def _facts(descriptor: int) -> tuple[int, ...]:
    stat = os.fstat(descriptor)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _touched(chunks: FileChunks, run: Run) -> list[int]:
    """The chunks that have a byte of ``run``."""
    found: set[int] = set()
    if run.count > 1 and run.stride >= _PART_BYTES:
        for number in range(run.count):
            start = run.offset + number * run.stride
            found.update(chunks.touching(start, start + run.length))
    else:  # chunks have more bytes than the gaps, or nearly so
        found.update(chunks.touching(run.offset, run.end))
    return sorted(found)
