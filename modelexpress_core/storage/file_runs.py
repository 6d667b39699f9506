"""Ranges of an open file, and many short runs of one, read into memory."""

from __future__ import annotations

import mmap
import os
import sys
from typing import Any, Literal

__all__ = ["fill", "fill_runs"]

_PAGE_BYTES = mmap.PAGESIZE

#: Runs and the gaps between them are read by so many bytes.
_THROUGH_BYTES = 512 << 10

#: Sizes and format codes of what is copied at once.
_WORDS: tuple[tuple[int, Literal["Q", "I", "H", "B"]], ...] = ((8, "Q"), (4, "I"), (2, "H"), (1, "B"))


def fill(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read into ``buffer``; fewer bytes where the file ends."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def fill_runs(descriptor: int, buffer: memoryview, offset: int, run_bytes: int, stride_bytes: int) -> int:
    """Read runs of ``run_bytes``, which begin ``stride_bytes`` apart, one after another into ``buffer``.

    Where every page of the file would be read anyway, the gaps are read along, through a buffer of their own: that
    takes a tenth of the calls' time.

    Returns:
        Bytes of whole runs that were read; fewer than the length of ``buffer`` where the file ends.
    """
    read = _fill_through if stride_bytes - run_bytes < _PAGE_BYTES else _fill_one_by_one
    return read(descriptor, buffer, offset, run_bytes, stride_bytes)


def _fill_one_by_one(descriptor: int, buffer: memoryview, offset: int, run_bytes: int, stride_bytes: int) -> int:
    """Read run by run, and nothing between them."""
    position = offset
    for done in range(0, len(buffer), run_bytes):
        part = buffer[done : done + run_bytes]
        if os.preadv(descriptor, [part], position) != run_bytes and fill(descriptor, part, position) != run_bytes:
            return done
        position += stride_bytes
    return len(buffer)


def _fill_through(descriptor: int, buffer: memoryview, offset: int, run_bytes: int, stride_bytes: int) -> int:
    """Read many runs and the gaps between them at a time, and keep the runs."""
    per_read = max(1, _THROUGH_BYTES // stride_bytes)
    through = memoryview(bytearray((per_read - 1) * stride_bytes + run_bytes))
    done = 0
    while done < len(buffer):
        runs = min(per_read, (len(buffer) - done) // run_bytes)
        part = through[: (runs - 1) * stride_bytes + run_bytes]
        count = fill(descriptor, part, offset + done // run_bytes * stride_bytes)
        whole = max(0, (count - run_bytes) // stride_bytes + 1)
        _take_runs(part, stride_bytes, buffer[done : done + whole * run_bytes], run_bytes)
        done += whole * run_bytes
        if count < len(part):
            break
    return done


def _take_runs(part: memoryview, stride_bytes: int, buffer: memoryview, run_bytes: int) -> None:
    """Copy runs of ``run_bytes``, one every ``stride_bytes`` of ``part``, to ``buffer``, one after another."""
    runs = len(buffer) // run_bytes
    numpy: Any = sys.modules.get("numpy")  # torch imports it, where it is installed
    if runs and numpy is not None:  # in a fraction of the time
        lying = numpy.ndarray((runs, run_bytes), numpy.uint8, part, strides=(stride_bytes, 1))
        numpy.ndarray((runs, run_bytes), numpy.uint8, buffer)[:] = lying
        return
    size, code = next(each for each in _WORDS if run_bytes % each[0] == 0 == stride_bytes % each[0])
    words = run_bytes // size
    if words >= runs:
        for run in range(runs):
            start = run * stride_bytes
            buffer[run * run_bytes : (run + 1) * run_bytes] = part[start : start + run_bytes]
        return
    lying_words, taken_words = part[: len(part) // size * size].cast(code), buffer.cast(code)
    for word in range(words):  # the same word of every run in one step
        taken_words[word::words] = lying_words[word :: stride_bytes // size][:runs]
