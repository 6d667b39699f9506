"""Ranges of cached files, cut into pieces of memory for the messages of a stream."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from modelexpress_core.bulk.requests import MAX_PIECES, Run
from modelexpress_core.errors import SourceChangedError
from modelexpress_core.storage.file_runs import fill_runs
from modelexpress_core.wire.proto.modelexpress import cache_pb2

__all__ = ["MAX_RANGES", "cut", "read", "run_of", "wrong_with"]

#: Ranges that one call may ask for.
MAX_RANGES = 1024

#: Pieces of this length are read one by one; shorter ones are gathered.
_LONG_BYTES = 32 << 10


def run_of(path: str, asked: cache_pb2.FileRange | cache_pb2.FilePart) -> Run:
    """A range of a request."""
    return Run(path, asked.offset, asked.length, asked.stride, asked.count or 1)


def wrong_with(runs: Iterable[Run], size: int) -> str:
    """Why ranges of a file with ``size`` bytes make no sense; empty if they do."""
    pieces = 0
    for run in runs:
        pieces += run.count
        if not run.is_valid or run.end > size:
            return f"bytes {run.offset} to {run.end - 1} of {run.name[:200]!r}, which has {size} bytes"
        if pieces > MAX_PIECES:
            return f"more than {MAX_PIECES} pieces of ranges"
    return ""


def cut(run: Run, message_bytes: Callable[[], int]) -> Iterator[Run]:
    """Ranges of at most ``message_bytes()`` bytes each, which make up ``run``."""
    if run.count > 1 and run.length <= _LONG_BYTES:
        first = 0
        while first < run.count:
            count = min(run.count - first, max(1, message_bytes() // run.length))
            yield Run(run.name, run.offset + first * run.stride, run.length, run.stride, count)
            first += count
        return
    for number in range(run.count):
        start = run.offset + number * run.stride
        end = start + run.length
        while start < end:
            length = min(end - start, message_bytes())
            yield Run(run.name, start, length)
            start += length


def read(descriptor: int, run: Run) -> memoryview:
    """The bytes of ``run``.

    Raises:
        SourceChangedError: The file is shorter.
    """
    content: bytes | bytearray
    if run.count == 1:
        # It makes bytes, which are not filled with zeros first.
        content = os.pread(descriptor, run.length, run.offset)
        while len(content) < run.length and (rest := _rest(descriptor, run, len(content))):
            content += rest
        done = len(content)
    else:
        content = bytearray(run.nbytes)
        done = fill_runs(descriptor, memoryview(content), run.offset, run.length, run.stride)
    if done != run.nbytes:
        raise SourceChangedError(
            f"{run.name!r} ends before byte {run.end} in the cache",
            cause="another program writes to the directory of the cache",
            hint="ask again: it is downloaded again",
        )
    return memoryview(content)


def _rest(descriptor: int, run: Run, done: int) -> bytes:
    return os.pread(descriptor, run.length - done, run.offset + done)
