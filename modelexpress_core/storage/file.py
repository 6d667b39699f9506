"""Files of this machine (and of whatever is mounted on it): ``file://`` and plain paths."""

from __future__ import annotations

import errno
import os
import stat as modes
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    NotFoundError,
    SourceChangedError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.messages import byte_range
from modelexpress_core.storage.file_runs import fill, fill_runs
from modelexpress_core.uri import ModelURI

__all__ = ["FileStorage", "open_file"]

_PROVIDER = "modelexpress-core"

#: A file is first read this long after its last change: a second change in the same tick of the kernel's clock (at most
#: 10 ms) leaves the times as they are, and a call that writes sets the times before it writes.
_SETTLING_SECONDS = 0.02

#: errno -> (class, likely cause, next step); anything else is a plain BackendError.
_ERRORS: Mapping[int, tuple[type[BackendError], str, str]] = {
    errno.ENOENT: (NotFoundError, "the path is misspelt or not mounted", "check it with ls"),
    errno.ENOTDIR: (NotFoundError, "a part of the path is a file", "check it with ls"),
    errno.EACCES: (AccessDeniedError, "this user may not read it", "check owner and mode with ls -l"),
    errno.EPERM: (AccessDeniedError, "this user may not read it", "check owner and mode with ls -l"),
    errno.ELOOP: (NotFoundError, "links lead in a circle", "check it with ls -l"),
    errno.EISDIR: (UnsupportedError, "it is a directory", "name a file in it"),
    errno.EIO: (UnavailableError, "the disk or the network file system has a fault", "look at dmesg"),
    errno.ESTALE: (SourceChangedError, "the network file system replaced the file", "start the load again"),
    errno.ETIMEDOUT: (UnavailableError, "the network file system does not answer", "check the mount"),
    errno.EMFILE: (UnavailableError, "too many open files", "raise the limit with ulimit -n"),
}


def _content_version(stat: os.stat_result) -> str:
    """The version without the time of the last change, which also moves when a name of the file is removed."""
    return f"{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}"


def _version(stat: os.stat_result) -> str:
    return f"{_content_version(stat)}-{stat.st_ctime_ns}"


def _translated(exc: OSError, path: str, operation: str) -> BackendError:
    cls, cause, hint = _ERRORS.get(exc.errno or 0, (BackendError, None, None))
    if exc.errno == errno.ENOENT and os.path.islink(path):
        cause, hint = f"it is a link to {os.readlink(path)}, which is not there", "copy or download what is missing"
    return cls(
        f"{exc.strerror or exc} [{errno.errorcode.get(exc.errno or 0, exc.errno)}]",
        uri=str(ModelURI("file", path=path)),
        operation=operation,
        provider=_PROVIDER,
        cause=cause,
        hint=hint,
    )


class _OpenFile:
    """A file that is open in one version. Threads may use it at the same time.

    Args:
        descriptor: Open for reading.
        version: The version that is read; None for any.

    Attributes:
        descriptor: As above.
        settled_at: When it may be read, by ``time.monotonic``; 0 for at once.
    """

    def __init__(self, descriptor: int, version: str | None) -> None:
        self.descriptor = descriptor
        self.settled_at = 0.0
        self._version = version
        self._renamed: dict[int, str] = {}  # by the number of names that are left: the version then
        if version is not None:
            stat = os.fstat(descriptor)
            self._links = stat.st_nlink
            age = time.time() - stat.st_ctime_ns / 1e9
            if age < _SETTLING_SECONDS:  # a file server's clock may be ahead
                self.settled_at = time.monotonic() + _SETTLING_SECONDS - max(0.0, age)

    def is_unchanged(self) -> bool:
        """Whether the file still has its version, or has lost nothing but names.

        Replacing a file by renaming removes the name of the old one, which changes its ctime, and nothing else.
        """
        if self._version is None:
            return True
        stat = os.fstat(self.descriptor)
        found = _version(stat)
        if found == self._version:
            return True
        if stat.st_nlink >= self._links or not self._version.startswith(f"{_content_version(stat)}-"):
            return False
        return self._renamed.setdefault(stat.st_nlink, found) == found


class FileStorage:
    """Reads with ``preadv`` into the caller's memory, through the page cache.

    A file's version is its inode, size, modification time and change time (``ctime``, which no program can set back).
    Descriptors stay open until ``close``, so a file that is replaced by renaming, or removed, goes on being read in
    the version that the load began with, while a later load reads the new one.

    A file that changes in place is noticed after each read, and at the end of a load once more (``check_unchanged``).
    Three changes leave no trace in time, and are not noticed:

    - stores through a shared mapping to pages that are dirty already (on tmpfs: to any page): the kernel moves the
      times when a clean page is first written to;
    - the rest of a call that began to write before the load and takes longer than 20 ms: the kernel moves the times
      when the call begins;
    - on network file systems: changes by other machines until the attributes are fetched again (NFS: ``acregmin``).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[tuple[str, str | None], _OpenFile] = {}
        self._in_use = 0
        self._closed = False
        self._closing = threading.Event()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The regular files below the directory ``prefix``, and links to such files.

        Hidden directories and links to directories (which may lead in a circle) are left out. A link that leads
        nowhere is listed as empty; asking for it raises NotFoundError.
        """
        try:
            with os.scandir(prefix or "/") as entries:
                children = sorted(entries, key=lambda entry: entry.name)
        except OSError as exc:
            if exc.errno in {errno.ENOENT, errno.ENOTDIR}:
                return
            raise _translated(exc, prefix, "list the files") from exc
        for entry in children:
            try:
                if entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith("."):
                        yield from self.list(entry.path)
                    continue
                stat = entry.stat()
            except OSError as exc:
                if not entry.is_symlink():
                    raise _translated(exc, entry.path, "read the size") from exc
                # It leads nowhere, which matters only to whoever needs it: reading it says so.
                yield ObjectInfo(entry.path, 0)
                continue
            if modes.S_ISREG(stat.st_mode):
                yield ObjectInfo(entry.path, stat.st_size, _version(stat))

    def stat(self, path: str) -> ObjectInfo:
        """The regular file at ``path``."""
        try:
            stat = os.stat(path)
        except OSError as exc:
            raise _translated(exc, path, "read the size") from exc
        if modes.S_ISDIR(stat.st_mode):
            raise _translated(OSError(errno.EISDIR, "Is a directory"), path, "read the size")
        if not modes.S_ISREG(stat.st_mode):
            reason = "a pipe, socket or device, not a regular file"
            raise UnsupportedError(
                reason,
                uri=str(ModelURI("file", path=path)),
                operation="read the size",
                provider=_PROVIDER,
                hint="copy what it holds into a file",
            )
        return ObjectInfo(path, stat.st_size, _version(stat))

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        """Read into ``buffer``; the version is compared after reading, so a change in between is seen."""
        operation = f"read {byte_range(offset, len(buffer))}"
        return self._reading(path, version, operation, lambda descriptor: fill(descriptor, buffer, offset))

    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        """Read runs into ``buffer``."""
        last = offset + (len(buffer) // run_bytes - 1) * stride_bytes + run_bytes - 1
        operation = f"read runs of {run_bytes} bytes in {offset}-{last}"
        return self._reading(
            path, version, operation, lambda descriptor: fill_runs(descriptor, buffer, offset, run_bytes, stride_bytes)
        )

    def check_unchanged(self, path: str, *, version: str) -> None:
        """Raise SourceChangedError unless the file that was read at ``path`` still has ``version``."""
        self._reading(path, version, "compare the version", lambda _descriptor: 0)

    def _reading(self, path: str, version: str | None, operation: str, read: Callable[[int], int]) -> int:
        try:
            file = self._open(path, version)
            try:
                if file.settled_at:
                    self._closing.wait(max(0.0, file.settled_at - time.monotonic()))
                done = read(file.descriptor)
                unchanged = file.is_unchanged()
            finally:
                self._release()
        except OSError as exc:
            raise _translated(exc, path, operation) from exc
        if not unchanged:
            reason = "the file was changed or replaced since the load began"
            raise SourceChangedError(
                reason,
                uri=str(ModelURI("file", path=path)),
                operation=operation,
                provider=_PROVIDER,
                cause="a program writes to it; chmod, chown, ln and mv count as changes too",
                hint="start the load again when nothing writes to the model",
            )
        return done

    def _open(self, path: str, version: str | None) -> _OpenFile:
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, "the storage is closed")
            file = self._files.get((path, version))
            if file is None:
                # A pipe would block the open, and with it every other read, until someone writes to it.
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    file = _OpenFile(descriptor, version)
                except BaseException:
                    os.close(descriptor)
                    raise
                self._files[path, version] = file
            self._in_use += 1
            return file

    def _release(self) -> None:
        with self._lock:
            self._in_use -= 1
            if self._closed and not self._in_use:
                self._close_files()

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1].descriptor)

    def close(self) -> None:
        """Close the files: at once, or when the last read that is under way has ended."""
        self._closing.set()
        with self._lock:
            self._closed = True
            if not self._in_use:
                self._close_files()


def open_file(uri: ModelURI, settings: Mapping[str, str]) -> FileStorage:  # noqa: ARG001 - the factory's signature
    """The storage for ``file`` URIs and plain paths."""
    return FileStorage()
