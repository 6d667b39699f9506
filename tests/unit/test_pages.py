"""Pages of memory that was never written to are made in one call."""

from __future__ import annotations

import mmap
import resource
import sys

import pytest

from modelexpress_core.fetch.pages import make_pages

MIB = 1 << 20


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux makes pages ahead")
def test_memory_whose_pages_were_made_is_written_without_a_fault_for_each() -> None:
    """Only pages that are completely inside; a page shared with other memory is left alone."""
    with mmap.mmap(-1, 9 * MIB) as memory, memoryview(memory) as view:
        make_pages(view[100 : 8 * MIB + 100])

        before = _faults()
        for position in range(0, 8 * MIB, mmap.PAGESIZE):
            memory[position] = 1
        faults = _faults() - before

    assert faults < 100  # of 2048 pages


@pytest.mark.parametrize("length", [1, 100, mmap.PAGESIZE])
def test_memory_smaller_than_its_pages_is_left_alone(length: int) -> None:
    """Nor does anything need to be there."""
    content = bytearray(b"\x07" * length)

    make_pages(memoryview(content))

    assert content == b"\x07" * length
