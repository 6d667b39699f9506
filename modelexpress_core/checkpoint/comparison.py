"""Compares what a reader got with the chunk manifest, as the bytes come (docs/manifest.md).

Each read takes the CRC of its part of each chunk. Once the parts of a chunk make it up, their CRCs are combined and
compared with the row of the chunk: reads may begin and end anywhere, and come in any order. What never becomes a whole
chunk is left as parts, for the server to compare.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator, Sequence

from attrs import define, frozen

from modelexpress_core.checkpoint.chunks import FileChunks
from modelexpress_core.checkpoint.manifest import TABLES

__all__ = ["FileComparison", "Part", "Reading"]

_ROW_BYTES = TABLES["crc64nvme"]


@frozen
class Part:
    """Bytes of one chunk that a reader got.

    Attributes:
        offset: First byte in the file.
        length: Bytes.
        crc: Their CRC-64/NVME.
    """

    offset: int
    length: int
    crc: int


@define(eq=False)
class _Piece:
    """A part of a chunk that a read brought."""

    start: int
    end: int
    crc: int


class FileComparison:
    """Compares one file. Thread-safe.

    Args:
        chunks: The chunks of the file.
        rows: Its rows of the table ``crc64nvme``; None if they are not known yet.

    Attributes:
        chunks: The chunks.
        compared_bytes: Bytes of chunks that were compared and are right; bytes that came twice count twice.

    Raises:
        ValueError: There is not one row for each chunk.
    """

    def __init__(self, chunks: FileChunks, rows: bytes | None = None) -> None:
        self.chunks = chunks
        self.compared_bytes = 0
        self._lock = threading.Lock()
        self._pieces: dict[int, list[_Piece]] = {}
        self._pending = 0
        self._rows: bytes | None = None
        # Whole chunks that came before the rows: a CRC for each, and the few that came with another one too.
        self._early: array[int] | None = None
        self._is_early = bytearray()
        self._early_twice: list[tuple[int, int]] = []
        if rows is not None:
            self.set_rows(rows)

    @property
    def knows_rows(self) -> bool:
        """Whether there are rows to compare with."""
        return self._rows is not None

    @property
    def pending_parts(self) -> int:
        """How many parts of chunks wait for the others."""
        return self._pending

    def set_rows(self, rows: bytes) -> Sequence[tuple[int, int]]:
        """Compare from now on; returns first byte and end of each chunk that came before, and differs.

        Raises:
            ValueError: There is not one row for each chunk.
        """
        if len(rows) != self.chunks.count * _ROW_BYTES:
            message = f"{len(rows)} bytes of digests for {self.chunks.count} chunks"
            raise ValueError(message)
        with self._lock:
            self._rows = rows
            early, self._early = self._early, None
            known = [] if early is None else [(number, early[number]) for number in _ones(self._is_early)]
            self._is_early = bytearray()
            twice, self._early_twice = self._early_twice, []
            return [self.chunks.bounds(number) for number, crc in (*known, *twice) if not self._is_right(number, crc)]

    def read_from(self, offset: int) -> Reading:
        """A read that begins at ``offset``."""
        return Reading(self, offset)

    def take_parts(self) -> Sequence[Part]:
        """Remove and return the parts of chunks that are not complete, for the server to compare."""
        with self._lock:
            pieces = [piece for of_chunk in self._pieces.values() for piece in of_chunk]
            self._pieces.clear()
            self._pending = 0
        return [Part(piece.start, piece.end - piece.start, piece.crc) for piece in pieces]

    def _arrived(self, number: int, piece: _Piece) -> Sequence[_Piece]:
        """A part of a chunk is there; returns the parts of the chunk if they make it up, and it differs."""
        start, end = self.chunks.bounds(number)
        with self._lock:
            if (piece.start, piece.end) == (start, end):
                return () if self._is_right(number, piece.crc) else (piece,)
            pieces = self._pieces.setdefault(number, [])
            if any((each.start, each.end, each.crc) == (piece.start, piece.end, piece.crc) for each in pieces):
                return ()  # the same bytes for two destinations: comparing them once is enough
            pieces.append(piece)
            self._pending += 1
            whole = _tiling(pieces, start, end)
            if not whole:
                return ()
            for each in whole:
                pieces.remove(each)
            if not pieces:
                del self._pieces[number]
            self._pending -= len(whole)
            return () if self._is_right(number, _combined(whole)) else whole

    def _put_back(self, number: int, pieces: Sequence[_Piece]) -> None:
        with self._lock:
            if pieces:
                self._pieces.setdefault(number, []).extend(pieces)
                self._pending += len(pieces)

    def _is_right(self, number: int, crc: int) -> bool:
        """Whether a whole chunk has its row, with the lock held; it is kept where there are no rows yet."""
        if self._rows is None:
            if self._early is None:
                self._early = array("Q", bytes(self.chunks.count * 8))
                self._is_early = bytearray(self.chunks.count)
            if not self._is_early[number]:
                self._early[number] = crc
                self._is_early[number] = 1
            elif self._early[number] != crc:
                self._early_twice.append((number, crc))
            return True
        if crc != int.from_bytes(self._rows[number * _ROW_BYTES : (number + 1) * _ROW_BYTES], "big"):
            return False
        start, end = self.chunks.bounds(number)
        self.compared_bytes += end - start
        return True


class Reading:
    """The bytes of one read, one after another. Not thread-safe: each read has one thread.

    Args:
        file: Compares the file.
        offset: First byte of the read.

    Attributes:
        end: End of the bytes so far.
        different: First byte and end of what this read brought of each chunk that is complete now, and differs. It can
            be read again: see ``again``.
    """

    def __init__(self, file: FileComparison, offset: int) -> None:
        self._file = file
        self.end = offset
        self.different: list[tuple[int, int]] = []
        self._crc = 0
        self._part_start = offset
        self._number = -1
        self._chunk_end = offset
        self._others: dict[int, Sequence[_Piece]] = {}

    def add(self, content: memoryview) -> None:
        """The next bytes."""
        from awscrt import checksums

        done, length = 0, len(content)
        while done < length:
            if self.end == self._chunk_end:
                self._next_chunk()
            count = min(length - done, self._chunk_end - self.end)
            self._crc = checksums.crc64nvme(content[done : done + count], self._crc)
            done += count
            self.end += count
            if self.end == self._chunk_end:
                self._submit()

    def finish(self) -> None:
        """There are no more bytes."""
        if self.end > self._part_start:
            self._submit()

    def again(self, start: int, end: int) -> Reading:
        """Begin to read an entry of ``different`` again: the new bytes take the place of those that came first."""
        self.different.remove((start, end))
        number = self._file.chunks.touching(start, end)[0]
        self._file._put_back(number, self._others.pop(number))  # noqa: SLF001 - the two are one
        return Reading(self._file, start)

    def _next_chunk(self) -> None:
        self._number = self._file.chunks.touching(self.end, self.end + 1)[0]
        _, self._chunk_end = self._file.chunks.bounds(self._number)
        self._part_start, self._crc = self.end, 0

    def _submit(self) -> None:
        piece = _Piece(self._part_start, self.end, self._crc)
        wrong = self._file._arrived(self._number, piece)  # noqa: SLF001 - the two are one
        self._part_start = self.end
        if wrong:
            self._others[self._number] = [each for each in wrong if each is not piece]
            self.different.append((piece.start, piece.end))


def _tiling(pieces: Sequence[_Piece], start: int, end: int) -> Sequence[_Piece]:
    """Pieces that follow one another from ``start`` to ``end``; none if there are not."""
    if sum(piece.end - piece.start for piece in pieces) < end - start:
        return ()
    before: dict[int, _Piece | None] = {start: None}  # where pieces end that follow one another from the start
    for piece in sorted(pieces, key=lambda each: each.start):
        if piece.start in before:
            before.setdefault(piece.end, piece)
    if end not in before:
        return ()
    chain: list[_Piece] = []
    at = before[end]
    while at is not None:
        chain.append(at)
        at = before[at.start]
    return chain[::-1]


def _combined(pieces: Sequence[_Piece]) -> int:
    from awscrt import checksums

    crc = pieces[0].crc
    for piece in pieces[1:]:
        crc = checksums.combine_crc64nvme(crc, piece.crc, piece.end - piece.start)
    return crc


def _ones(flags: bytearray) -> Iterator[int]:
    at = flags.find(1)
    while at >= 0:
        yield at
        at = flags.find(1, at + 1)
