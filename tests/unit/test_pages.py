"""Pages of memory that was never written to are made in one call."""

from __future__ import annotations

import mmap
import re
import resource
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import modelexpress_core as mx
from modelexpress_core.fetch.pages import make_pages, use_huge_pages
from modelexpress_core.storage.memory import store

MIB = 1 << 20

_MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


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


def _huge_bytes(address: int) -> int:
    """Bytes in huge pages of the mapping that holds ``address``."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0


@pytest.mark.skipif(
    not _MODES.exists() or "[never]" in _MODES.read_text(), reason="this machine gives no huge pages to memory"
)
def test_new_tensors_have_huge_pages() -> None:
    """All but the first and the last of a large tensor, which then has the right bytes."""
    state = {"large": torch.arange(8 * MIB, dtype=torch.int64)}
    store("huge-pages").put("model.safetensors", save(state))

    loaded = mx.load_state_dict("memory://huge-pages", environ={})["large"]

    assert torch.equal(state["large"], loaded)
    middle = loaded.data_ptr() + loaded.nbytes // 2
    if not _huge_bytes(middle):
        pytest.skip("no huge pages are free on this machine")
    assert _huge_bytes(middle) >= 32 * MIB


@pytest.mark.parametrize("length", [1, 100, 5 * MIB])
def test_asking_for_huge_pages_changes_no_byte(length: int) -> None:
    """Memory that has none inside is left alone."""
    content = torch.full((length,), 7, dtype=torch.uint8)

    use_huge_pages(content.data_ptr() + 1, length - 1)

    assert (content == 7).all()


@pytest.mark.parametrize("length", [1, 100, mmap.PAGESIZE])
def test_memory_smaller_than_its_pages_is_left_alone(length: int) -> None:
    """Nor does anything need to be there."""
    content = bytearray(b"\x07" * length)

    make_pages(memoryview(content))

    assert content == b"\x07" * length
