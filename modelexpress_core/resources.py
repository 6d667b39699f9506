"""Too few threads or too little memory on this machine, as errors of ours."""

from __future__ import annotations

import mmap
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from modelexpress_core.errors import ResourceError

__all__ = ["allocating", "out_of_memory", "start_thread", "starting_threads"]

#: What torch says, in a RuntimeError, if a device or this machine has too little memory.
_NO_MEMORY = re.compile(r"(can't|cannot) allocate memory|not enough memory|out of memory", re.IGNORECASE)

#: The usual stack of a thread, and what a thread needs besides until it runs.
_STACK_BYTES = 8 << 20
_SPARE_BYTES = 8 << 20

#: What Python says, in a RuntimeError, if the system starts no thread.
_NO_THREAD = re.compile(r"can't start new thread")


@contextmanager
def starting_threads(operation: str) -> Iterator[None]:
    """Turn the failure to start a thread, also one of a pool, into an error of ours.

    Args:
        operation: What the threads are for, as a verb phrase.

    Raises:
        ResourceError: No thread could be started.
    """
    try:
        yield
    except RuntimeError as exc:
        if not _NO_THREAD.search(str(exc)):
            raise
        raise ResourceError(
            f"could not {operation}: no thread could be started; {threading.active_count()} run in this process",
            cause="the user or the container is at its limit of processes and threads, or has no memory for a stack",
            hint="raise the limit (ulimit -u, the container's pids limit), or end other programs of this user",
        ) from exc


def start_thread(thread: threading.Thread, operation: str) -> None:
    """Start ``thread``.

    Args:
        thread: The thread.
        operation: What it is for, as a verb phrase.

    Raises:
        ResourceError: The system starts no more threads.
    """
    with starting_threads(operation):
        _check_room()
        thread.start()


def _check_room() -> None:
    """Raise as Python does if there is no address space for one more thread.

    ``Thread.start`` waits until the thread says that it runs. A thread that gets its stack, but no memory after it,
    ends before that, and the wait has no end.
    """
    try:
        mmap.mmap(-1, (threading.stack_size() or _STACK_BYTES) + _SPARE_BYTES).close()
    except OSError as exc:
        raise RuntimeError("can't start new thread") from exc


def out_of_memory(what: str, reason: object = "") -> ResourceError:
    """Return the error for memory that could not be allocated.

    Args:
        what: What needs the memory, as a noun phrase.
        reason: What the allocator says.
    """
    said = str(reason).strip().partition("\n")[0]
    return ResourceError(
        f"could not allocate memory for {what}{': ' if said else ''}{said}",
        cause="the machine, the container, the process (ulimit -v) or the device has too little memory left",
        hint="free memory, load fewer tensors, or use a machine or a device with more",
    )


@contextmanager
def allocating(what: str) -> Iterator[None]:
    """Turn the failure to allocate memory, also that of torch, into an error of ours.

    Args:
        what: What needs the memory, as a noun phrase.

    Raises:
        ResourceError: There is too little memory.
    """
    try:
        yield
    except MemoryError as exc:
        raise out_of_memory(what, exc) from exc
    except RuntimeError as exc:  # torch's OutOfMemoryError is one
        if not _NO_MEMORY.search(str(exc)):
            raise
        raise out_of_memory(what, exc) from exc
