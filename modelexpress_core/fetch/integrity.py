"""Whether the bytes that arrived are the stored ones, if the storage publishes a digest of the file.

The fetching threads compute digests while a load runs. A CRC is computed for each piece of a file and combined at the
end, so that pieces may arrive in any order; other digests need the pieces in order, and pieces that arrive early are
kept for a moment. Digests are taken of the bytes at their destination (or in the staging buffer that they are copied
from), so they cover the network and the libraries.

A digest covers a whole file, so it can be compared if the pieces of a load make up the whole file. If it differs, the
file is read again, piece by piece, which shows the cause: pieces that differ from the first reading were damaged in
transfer. They are delivered again, unless something may have used them. Otherwise, and if the stored file itself is
damaged, the load fails.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import define

from modelexpress_core.errors import IntegrityError
from modelexpress_core.fetch.digests import CRCS, Hasher, best_digest, new_hasher
from modelexpress_core.messages import byte_range

if TYPE_CHECKING:
    from modelexpress_core.checkpoint import CheckpointFile
    from modelexpress_core.fetch.request import Range, Segment

__all__ = ["Integrity", "Reread"]

#: CRC of the pieces if the digest of the file is no CRC.
_PIECE_CRC = "crc32c"

#: Bytes of pieces that arrived early and are kept: copies of staging buffers, and memory of destinations that their
#: owners may have given up.
_MAX_COPIED_BYTES = 64 << 20
_MAX_KEPT_BYTES = 1 << 30

#: How often a file is read again before its storage is blamed: transfer may damage bytes twice.
_MAX_REREADS = 2

#: Reads a part of a file again and calls ``use`` with its bytes: ``reread(file, offset, length, use)``.
Reread = Callable[["CheckpointFile", int, int, Callable[[memoryview], None]], None]


class Integrity:
    """The digests of the files of one load. Thread-safe.

    Args:
        enabled: Whether digests are compared at all.
        uri_of: The redacted URI of a file, from its path.
    """

    def __init__(self, *, enabled: bool, uri_of: Callable[[str], str] = str) -> None:
        self._enabled = enabled
        self._uri_of = uri_of
        self._lock = threading.Lock()
        self._files: dict[str, _FileDigest | None] = {}

    def arrived(self, range_: Range, content: memoryview) -> None:
        """The bytes of ``range_`` were delivered; ``content`` is the buffer that they were read into."""
        if not (self._enabled and range_.file.digests):
            return
        digest = self._of(range_.file)
        if digest is None:
            return
        for segment in range_.segments:
            if segment.runs is None:
                start = segment.offset - range_.offset
                memory = segment.memory
                digest.add(segment, content[start : start + segment.length] if memory is None else memory)

    def check(self, reread: Reread) -> int:
        """Compare the digest of every file that was read as a whole.

        Returns:
            Number of files whose digest was compared and is right, after reading again if necessary.

        Raises:
            IntegrityError: One is wrong, and fetching again did not help.
        """
        return sum(digest.check(reread) for digest in self._files.values() if digest is not None)

    def _of(self, file: CheckpointFile) -> _FileDigest | None:
        with self._lock:
            if file.path not in self._files:
                best = best_digest(file.digests)
                self._files[file.path] = None if best is None else _FileDigest(file, *best, uri=self._uri_of(file.path))
            return self._files[file.path]


@define(eq=False)
class _Piece:
    """A contiguous part of a file that arrived.

    Attributes:
        offset: First byte in the file.
        length: Bytes.
        crc: CRC of the bytes that were delivered last.
        segment: Its segment, if it may be delivered again; else None.
    """

    offset: int
    length: int
    crc: int
    segment: Segment | None


class _FileDigest:
    """The digest of one file, computed as its pieces arrive."""

    def __init__(self, file: CheckpointFile, algorithm: str, expected: str, *, uri: str) -> None:
        self._file = file
        self._uri = uri
        self._algorithm = algorithm
        self._expected = expected
        self._crc = CRCS.get(algorithm, CRCS[_PIECE_CRC])()
        self._pieces: list[_Piece] = []
        self._in_order = None if algorithm in CRCS else _InOrder(algorithm, file.header)

    def add(self, segment: Segment, content: memoryview) -> None:
        crc = self._crc.compute(content, 0)
        # Appending is atomic, and the list is only read when all pieces arrived.
        kept = segment if segment.ticket.stable else None
        self._pieces.append(_Piece(segment.offset, segment.length, crc, kept))
        if self._in_order is not None:
            self._in_order.add(segment, content)

    def check(self, reread: Reread) -> bool:
        """Whether the digest was compared and is right.

        Raises:
            IntegrityError: It is wrong.
        """
        arrived: defaultdict[tuple[int, int], list[_Piece]] = defaultdict(list)
        for piece in self._pieces:
            arrived[piece.offset, piece.length].append(piece)
        chain = self._chain(arrived)
        if chain is None:
            return False
        agree = all(piece.crc == pieces[0].crc for pieces in arrived.values() for piece in pieces)
        if not agree or self._computed(arrived[key][0] for key in chain) != self._expected:
            self._read_again(chain, arrived, reread)
        others = arrived.keys() - set(chain)
        self._read_others(others, arrived, reread)
        return True

    def _chain(self, pieces: Iterable[tuple[int, int]]) -> Sequence[tuple[int, int]] | None:
        """The pieces that make up the file and are covered by ``_computed``; None if there is a gap."""
        if self._in_order is not None:
            digested = self._in_order.pieces(self._file.size)
            if digested is not None:  # other pieces may make up the file too, but only these were digested
                return digested
        return _chain(pieces, self._file.header_bytes, self._file.size)

    def _computed(self, pieces: Iterable[_Piece]) -> str | None:
        """The digest of the file as it arrived; None if it is unknown."""
        if self._in_order is not None:
            return self._in_order.hexdigest(self._file.size)
        value = self._crc.compute(memoryview(self._file.header), 0)
        for piece in pieces:
            value = self._crc.combine(value, piece.crc, piece.length)
        return f"{value:0{self._crc.digits}x}"

    def _read_again(
        self, chain: Iterable[tuple[int, int]], arrived: Mapping[tuple[int, int], list[_Piece]], reread: Reread
    ) -> None:
        """Read the whole file again, and once more if its digest is wrong again; deliver the pieces that differ."""
        for _ in range(_MAX_REREADS):
            digest, lost = self._reread_once(chain, arrived, reread)
            if digest == self._expected:
                break
        else:
            raise self._damaged(f"read again {_MAX_REREADS} times, its digest was wrong each time", stored=True)
        if lost:
            raise self._lost(lost)

    def _reread_once(
        self, chain: Iterable[tuple[int, int]], arrived: Mapping[tuple[int, int], list[_Piece]], reread: Reread
    ) -> tuple[str, list[_Piece]]:
        """The digest of the file as it is read now, and the pieces that differ and cannot be delivered again."""
        hasher = new_hasher(self._algorithm)
        header = bytearray()

        def use_header(content: memoryview) -> None:
            hasher.update(content)
            header.extend(content)

        reread(self._file, 0, self._file.header_bytes, use_header)
        lost: list[_Piece] = []
        for offset, length in chain:

            def use(content: memoryview, pieces: list[_Piece] = arrived[offset, length]) -> None:
                hasher.update(content)
                lost.extend(self._deliver_again(content, pieces))

            reread(self._file, offset, length, use)
        digest = hasher.hexdigest()
        if digest == self._expected and header != self._file.header:
            raise self._damaged("the header was damaged in transfer")
        return digest, lost

    def _read_others(
        self, keys: Iterable[tuple[int, int]], arrived: Mapping[tuple[int, int], list[_Piece]], reread: Reread
    ) -> None:
        """Compare pieces that overlap others, so that the digest does not cover them, with the file read again.

        No digest covers what is read here either, so it is not delivered.
        """
        for offset, length in sorted(keys):
            pieces = arrived[offset, length]
            again: list[int] = []

            def use(content: memoryview, again: list[int] = again) -> None:
                again.append(self._crc.compute(content, 0))

            reread(self._file, offset, length, use)
            if any(piece.crc not in again for piece in pieces):
                raise self._lost(pieces)

    def _deliver_again(self, content: memoryview, pieces: Iterable[_Piece]) -> list[_Piece]:
        """Deliver ``content`` for those of ``pieces`` that differ; returns those for which it is too late."""
        crc = self._crc.compute(content, 0)
        lost = []
        for piece in pieces:
            if piece.crc == crc:
                continue
            # Something may have overwritten it since it arrived.
            if piece.segment is None or not piece.segment.ticket.stable:
                lost.append(piece)
            else:
                piece.segment.deliver(content)
                piece.crc = crc
        return lost

    def _lost(self, pieces: list[_Piece]) -> IntegrityError:
        first = pieces[0]
        where = byte_range(first.offset, first.length)
        return self._damaged(f"{where} were damaged in transfer, and may have been used")

    def _damaged(self, what: str, *, stored: bool = False) -> IntegrityError:
        name = self._algorithm.upper()
        in_transfer = "the network, a proxy or the memory of a machine in between changed bytes; TLS would notice"
        in_store = "the stored file is damaged, or its digest was published for other content"
        again = "start the load again; if this repeats, use TLS, and check the machines in between"
        return IntegrityError(
            f"what arrived does not have the published {name} {self._expected}: {what}",
            uri=self._uri,
            operation="verify the content",
            cause=in_store if stored else in_transfer,
            hint="upload it again; MX_VERIFY_DIGESTS=0 loads it unverified" if stored else again,
        )


class _InOrder:
    """A digest of bytes in order: the thread with the next piece digests it, and the kept pieces that follow."""

    def __init__(self, algorithm: str, header: bytes) -> None:
        self._lock = threading.Lock()
        self._hasher: Hasher = new_hasher(algorithm)
        self._hasher.update(memoryview(header))
        self._next = len(header)
        self._digested: list[tuple[int, int]] = []
        self._busy = False
        self._given_up = False
        self._kept: dict[int, tuple[memoryview, Segment | None]] = {}
        self._copied_bytes = 0
        self._kept_bytes = 0

    def add(self, segment: Segment, content: memoryview) -> None:
        with self._lock:
            if self._given_up or segment.offset < self._next:
                return
            if self._busy or segment.offset != self._next:
                self._keep(segment, content)
                return
            self._busy = True
        while True:
            self._hasher.update(content)
            with self._lock:
                if len(content):
                    self._digested.append((self._next, len(content)))
                self._next += len(content)
                kept = self._kept.pop(self._next, None)
                if kept is None:
                    self._busy = False
                    return
                content, owner = kept
                self._forget(content, owner)

    def hexdigest(self, size: int) -> str | None:
        return self._hasher.hexdigest() if self._next == size else None

    def pieces(self, size: int) -> Sequence[tuple[int, int]] | None:
        """Offset and length of the digested pieces; None if they are not the whole file."""
        return self._digested if self._next == size else None

    def _keep(self, segment: Segment, content: memoryview) -> None:
        """Keep the piece until it is the next. If that takes too much memory, give up: the file is read again later."""
        if segment.offset in self._kept:
            return
        if segment.memory is None:
            self._copied_bytes += len(content)
            self._kept[segment.offset] = (memoryview(bytes(content)), None)
        else:  # the segment keeps the destination alive
            self._kept_bytes += 0 if segment.ticket.stable else len(content)
            self._kept[segment.offset] = (content, segment)
        if self._copied_bytes > _MAX_COPIED_BYTES or self._kept_bytes > _MAX_KEPT_BYTES:
            self._given_up = True
            self._kept.clear()

    def _forget(self, content: memoryview, owner: Segment | None) -> None:
        if owner is None:
            self._copied_bytes -= len(content)
        elif not owner.ticket.stable:
            self._kept_bytes -= len(content)


def _chain(pieces: Iterable[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]] | None:
    """Pieces (offset, length) that follow one another from ``start`` to ``end``; None if there is a gap."""
    follows = {end: 0}  # offset -> length of a piece there from which the end can be reached
    for offset, length in sorted(pieces, reverse=True):
        if length and offset + length in follows:
            follows[offset] = length
    chain = []
    while start != end:
        if start not in follows:
            return None
        chain.append((start, follows[start]))
        start += follows[start]
    return chain
