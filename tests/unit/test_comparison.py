"""Readers compare what they got with the chunk manifest, however their reads are cut."""

from __future__ import annotations

from array import array
from random import Random

import pytest
from awscrt import checksums
from hypothesis import given
from hypothesis import strategies as st

from modelexpress_core.checkpoint.chunks import FileChunks
from modelexpress_core.checkpoint.comparison import FileComparison, Reading
from modelexpress_core.checkpoint.manifest import chunk_digest

CONTENT = Random(7).randbytes(1000)

#: Two regions of chunks of 64 bytes, and one of a single chunk between them.
CHUNKS = FileChunks(1000, array("Q", [0, 300, 500]), array("Q", [64, 200, 64]), array("Q", [0, 5, 6]), 14)

ROWS = b"".join(chunk_digest("crc64nvme", CONTENT[start:end]) for start, end in CHUNKS)

_RANGES = st.tuples(st.integers(0, 999), st.integers(1, 400)).map(lambda each: (each[0], min(1000, sum(each))))

#: Cuts of a whole file into reads, in any order.
_CUTS = st.lists(st.integers(1, 999), unique=True, max_size=40).flatmap(
    lambda cuts: st.permutations([*zip([0, *sorted(cuts)], [*sorted(cuts), 1000], strict=True)])
)


def _read(file: FileComparison, start: int, content: bytes, landing: int = 50) -> Reading:
    """Read ``content`` at ``start``, which lands some bytes at a time."""
    reading = file.read_from(start)
    for at in range(0, len(content), landing):
        reading.add(memoryview(content)[at : at + landing])
    reading.finish()
    return reading


def _has_fault(file: FileComparison) -> bool:
    """Whether a part that is left has another CRC than the file: the server would find it."""
    return any(
        part.crc != checksums.crc64nvme(CONTENT[part.offset : part.offset + part.length], 0)
        for part in file.take_parts()
    )


@given(_CUTS, st.integers(1, 200), st.booleans())
def test_a_whole_file_is_compared_here_however_it_is_cut(
    ranges: list[tuple[int, int]], landing: int, late_rows: bool
) -> None:
    """Nothing is left for the server, also where rows come after the bytes."""
    file = FileComparison(CHUNKS, None if late_rows else ROWS)

    different = [_read(file, start, CONTENT[start:end], landing).different for start, end in ranges]
    different += [list(file.set_rows(ROWS))] if late_rows else []

    assert [] == [each for each in different if each]
    assert len(CONTENT) == file.compared_bytes
    assert not file.take_parts()
    assert 0 == file.pending_parts


@given(st.lists(_RANGES, max_size=30))
def test_every_byte_is_compared_here_or_left_for_the_server(ranges: list[tuple[int, int]]) -> None:
    """Reads that overlap, and repeat, do not fail."""
    file = FileComparison(CHUNKS, ROWS)

    different = [_read(file, start, CONTENT[start:end]).different for start, end in ranges]

    parts = file.take_parts()
    left = {position for part in parts for position in range(part.offset, part.offset + part.length)}
    touched = {position for start, end in ranges for position in range(start, end)}
    whole = {position for start, end in CHUNKS if {*range(start, end)} <= touched for position in range(start, end)}
    assert [] == [each for each in different if each]
    assert touched - left <= whole
    assert file.compared_bytes >= len(touched - left)
    assert all(part.crc == checksums.crc64nvme(CONTENT[part.offset : part.offset + part.length], 0) for part in parts)


@given(st.lists(_RANGES, min_size=1, max_size=30), st.data())
def test_a_flip_in_any_read_is_found(ranges: list[tuple[int, int]], data: st.DataObject) -> None:
    """Here or by the server, also where another read brought the right bytes."""
    file = FileComparison(CHUNKS, ROWS)
    flipped = data.draw(st.integers(0, len(ranges) - 1))
    start, end = ranges[flipped]
    position, bit = data.draw(st.integers(start, end - 1)), data.draw(st.integers(0, 7))
    content = bytearray(CONTENT[start:end])
    content[position - start] ^= 1 << bit

    found = False
    for number, (begin, stop) in enumerate(ranges):
        found |= bool(_read(file, begin, bytes(content) if number == flipped else CONTENT[begin:stop]).different)

    assert found or _has_fault(file)


@given(_CUTS, st.data())
def test_a_part_that_is_read_again_takes_the_place_of_the_first(
    ranges: list[tuple[int, int]], data: st.DataObject
) -> None:
    """A chunk that was damaged in transit is right after its second read, if the last read brought the damage."""
    file = FileComparison(CHUNKS, ROWS)
    flipped = data.draw(st.integers(0, 999))
    unrepaired = 0
    for start, end in ranges:
        content = bytearray(CONTENT[start:end])
        if start <= flipped < end:
            content[flipped - start] ^= 1
        reading = _read(file, start, bytes(content))
        for begin, stop in list(reading.different):
            again = reading.again(begin, stop)
            again.add(memoryview(CONTENT)[begin:stop])
            again.finish()
            unrepaired += bool(again.different)

    before = next(index for index, (start, end) in enumerate(ranges) if start <= flipped < end)
    number = CHUNKS.touching(flipped, flipped + 1)[0]
    chunk = CHUNKS.bounds(number)
    last = max(index for index, each in enumerate(ranges) if each[0] < chunk[1] and each[1] > chunk[0])
    assert (0 if before == last else 1) == unrepaired


def test_early_chunks_are_compared_once_rows_come() -> None:
    """A damaged one is found, also where the same chunk came twice, the second time right."""
    file = FileComparison(CHUNKS)
    damaged = bytes(64)

    _read(file, 64, damaged)
    _read(file, 64, CONTENT[64:128])
    _read(file, 128, CONTENT[128:192])

    assert not file.knows_rows
    assert [(64, 128)] == list(file.set_rows(ROWS))
    assert 128 == file.compared_bytes


def test_wrong_rows_are_refused() -> None:
    """There has to be one for each chunk."""
    with pytest.raises(ValueError, match="104 bytes of digests for 14 chunks"):
        FileComparison(CHUNKS, ROWS[:-8])


def test_memory_is_one_part_for_each_read_and_chunk() -> None:
    """Whatever the number of its pieces."""
    file = FileComparison(CHUNKS, ROWS)

    _read(file, 310, CONTENT[310:490], landing=1)

    assert 1 == file.pending_parts
