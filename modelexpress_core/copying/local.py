"""The local disk: the meaning of its errors, free space, allocation, digests of files."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

from attrs import frozen

from modelexpress_core.errors import ModelExpressError
from modelexpress_core.fetch.digests import new_hasher
from modelexpress_core.report import format_bytes

__all__ = [
    "Disk",
    "allocate",
    "boot_id",
    "check_space",
    "digest_of",
    "fsync_directory",
    "local_errors",
    "write_all",
]

_SPACE = "free space, or choose a directory on another disk; the next pull resumes where this one stopped"
_RIGHTS = "check owner and mode with ls -ld, or choose another directory"

#: errno -> (likely cause, next step)
_ERRORS: Mapping[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", _SPACE),
    errno.EDQUOT: ("the quota of this user is exhausted", _SPACE),
    errno.EFBIG: ("the file system or a limit (ulimit -f) allows no file of this size", _SPACE),
    errno.EACCES: ("this user may not write there", _RIGHTS),
    errno.EPERM: ("this user may not write there", _RIGHTS),
    errno.EROFS: ("the file system is mounted read-only", "choose another directory"),
    errno.ENOTDIR: ("a part of the path is a file", "choose another directory"),
    errno.EISDIR: ("it is a directory", "look at it with ls -ld, and move it away"),
    errno.ELOOP: ("it is a link, which is not followed", "look at it with ls -l, and remove it"),
    errno.EEXIST: ("it is a file", "choose another directory"),
    errno.ENAMETOOLONG: ("the path is longer than the file system allows", "choose a directory with a shorter path"),
    errno.EXDEV: ("a directory below it is a separate mount", "pull into that directory separately"),
    errno.EIO: ("the disk or the network file system has a fault", "look at dmesg"),
    errno.EMFILE: ("too many open files", "raise the limit with ulimit -n, or lower MX_CONCURRENCY"),
}

_BUFFER_BYTES = 4 << 20


@contextmanager
def local_errors(path: str, operation: str) -> Iterator[None]:
    """Turn errors of the operating system into errors that name ``path`` and the next step."""
    try:
        yield
    except OSError as exc:
        cause, hint = _ERRORS.get(exc.errno or 0, (None, "check the directory"))
        code = errno.errorcode.get(exc.errno or 0, exc.errno)
        reason = f"could not {operation} {path}: {exc.strerror or exc} [{code}]"
        raise ModelExpressError(reason, cause=cause, hint=hint) from exc


def write_all(descriptor: int, data: memoryview | bytes, offset: int | None = None) -> None:
    """Write ``data`` at ``offset``, or at the current position, with as many calls as that takes."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        if offset is None:
            done += os.write(descriptor, view[done:])
        else:
            done += os.pwrite(descriptor, view[done:], offset + done)


def allocate(descriptor: int, size: int) -> None:
    """Make a file ``size`` bytes long, and reserve the space if the file system can do that at once.

    Not ``posix_fallocate``: on file systems that cannot, such as NFS before 4.2, it writes a byte into every block.
    """
    if not size:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        number = ctypes.get_errno()
        if number in {errno.EOPNOTSUPP, errno.ENOSYS}:
            os.ftruncate(descriptor, size)
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def check_space(directory: str, needed: int) -> None:
    """Raise if fewer than ``needed`` bytes are free.

    Raises:
        ModelExpressError: There is not enough space.
    """
    with local_errors(directory, "ask for the free space of"):
        stat = os.statvfs(directory)
    free = stat.f_bavail * stat.f_frsize
    if stat.f_blocks and free < needed:  # some network file systems report nothing
        raise ModelExpressError(
            f"{format_bytes(needed)} have to be written below {directory}, but only {format_bytes(free)} are free",
            cause="the disk is too full; a file that is replaced takes space until its new version is complete",
            hint=_SPACE,
        )


@cache
def boot_id() -> str:
    """An identifier that changes with each start of the machine; empty where the system has none."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


@frozen
class Disk:
    """The operations of a disk that fail in ways which no test machine can bring about; tests replace them.

    Attributes:
        allocate: Takes the space of a file before it is written.
        boot_id: Identifies the start of the machine that wrote a journal.
        check_space: Raises where too little space is free.
        fsync: Brings what was written to the disk.
        sync_seconds: How often a file that is being written is synced, so that a loss of power costs little, and
            little is left to do at the end.
    """

    allocate: Callable[[int, int], None] = allocate
    boot_id: Callable[[], str] = boot_id
    check_space: Callable[[str, int], None] = check_space
    fsync: Callable[[int], None] = os.fsync
    sync_seconds: float = 5.0


def digest_of(descriptor: int, algorithm: str, cancelled: threading.Event) -> str:
    """The digest of an open file from its start; meaningless if ``cancelled`` is set before the end."""
    hasher = new_hasher(algorithm)
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    offset = 0
    while not cancelled.is_set() and (count := os.preadv(descriptor, [buffer], offset)):
        hasher.update(buffer[:count])
        offset += count
    return hasher.hexdigest()


def fsync_directory(path: str) -> None:
    """Make renames in the directory ``path`` survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
