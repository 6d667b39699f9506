"""Directories that others may write to: entries are reached through an open directory, and links are not followed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat as modes
from collections.abc import Iterator

from modelexpress_core.errors import ModelExpressError

__all__ = ["Directory", "NotOwnFileError"]

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

#: Others may write to a directory with one of these bits.
_WRITABLE_BY_OTHERS = modes.S_IWGRP | modes.S_IWOTH

#: Errors of file systems that cannot create files without a name.
_NO_UNNAMED_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT})

_KINDS = {
    modes.S_IFLNK: "a link",
    modes.S_IFDIR: "a directory",
    modes.S_IFIFO: "a pipe",
    modes.S_IFSOCK: "a socket",
    modes.S_IFBLK: "a device",
    modes.S_IFCHR: "a device",
    modes.S_IFREG: "a regular file",
}


class NotOwnFileError(ModelExpressError):
    """Something else has the name of a file of the pull: a link, a pipe, a file of another user."""


class Directory:
    """An open directory.

    Its entries are reached through its descriptor. If somebody replaces the directory by a link, the entries stay those
    of the directory that was opened.

    Args:
        path: Its path, for messages.
        descriptor: Its descriptor, which ``close`` closes.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    @classmethod
    def at(cls, path: str) -> Directory:
        """Open the directory at ``path``, which is made if it does not exist. Links in ``path`` are followed."""
        os.makedirs(path, exist_ok=True)
        return cls(path, os.open(path, _OPEN_DIRECTORY))

    def close(self) -> None:
        """Close the descriptor."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def path_of(self, name: str) -> str:
        """The path of the entry ``name``, for messages."""
        return os.path.join(self.path, name)

    # -- directories below --------------------------------------------------------------------------------------------

    def subdirectory(self, name: str) -> Directory:
        """Open the directory ``name``, which is made if it does not exist.

        Raises:
            ModelExpressError: It is a link, or no directory.
        """
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=self.descriptor)
        return self._opened(name)

    def private_directory(self, name: str) -> Directory:
        """Open the directory ``name``, to which this user alone may write. It is made if it does not exist.

        Raises:
            ModelExpressError: It is a link, or no directory, or belongs to another user.
        """
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=self.descriptor)
        opened = self._opened(name)
        try:
            self._make_private(opened)
        except BaseException:
            opened.close()
            raise
        return opened

    def _make_private(self, opened: Directory) -> None:
        found = os.fstat(opened.descriptor)
        if found.st_uid != os.geteuid() and found.st_uid != self._uid_of_new_files():
            raise ModelExpressError(
                f"{opened.path} belongs to user {found.st_uid}, and this process runs as user {os.geteuid()}",
                cause="another user pulled into this directory, and can change files there during a pull",
                hint="pull as that user, or into another directory",
            )
        if found.st_mode & _WRITABLE_BY_OTHERS:
            # On file systems without modes this fails; files there are still checked one by one.
            with contextlib.suppress(OSError):
                os.fchmod(opened.descriptor, 0o700)

    @contextlib.contextmanager
    def parent_of(self, name: str) -> Iterator[tuple[Directory, str]]:
        """The directory of the file ``name`` below this one, and the last part of its name. Makes directories.

        Raises:
            ModelExpressError: A part is a link, or no directory.
        """
        *parts, last = name.split("/")
        parent = Directory(self.path, os.dup(self.descriptor))
        try:
            for part in parts:
                below = parent.subdirectory(part)
                parent.close()
                parent = below
            yield parent, last
        finally:
            parent.close()

    def _opened(self, name: str) -> Directory:
        path = self.path_of(name)
        try:
            return Directory(path, os.open(name, _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=self.descriptor))
        except OSError as exc:
            if exc.errno not in {errno.ELOOP, errno.ENOTDIR}:
                raise
            kind = "a link" if os.path.islink(path) else "no directory"
            raise ModelExpressError(
                f"{path} is {kind}, and a pull writes only to directories below {self.path}",
                cause="another user or program put it there",
                hint="look at it with ls -ld; move it away, or pull into another directory",
            ) from exc

    def _uid_of_new_files(self) -> int:
        """The user to whom files belong that this process creates here: network file systems may choose another one."""
        try:
            descriptor = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=self.descriptor)
        except OSError as exc:
            if exc.errno not in _NO_UNNAMED_FILES:
                raise
            name = f".mx-owner-{secrets.token_hex(8)}"
            descriptor = self.create(name)
            self.unlink(name)
        try:
            return os.fstat(descriptor).st_uid
        finally:
            os.close(descriptor)

    # -- files --------------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The names of all entries."""
        return os.listdir(self.descriptor)

    def stat(self, name: str) -> os.stat_result:
        """What the system knows of the entry ``name``; of a link, not of its target."""
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)

    def exists(self, name: str) -> bool:
        """Whether there is an entry ``name``, of any kind."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def open_own(self, name: str, flags: int) -> int:
        """A descriptor of this user's regular file ``name``. It is created if ``flags`` say so.

        The mode of a new file is the one that the umask allows. Nothing is opened that waits, such as a pipe.

        Raises:
            NotOwnFileError: The name is that of something else, or of a file that has other names, too.
        """
        with contextlib.suppress(FileNotFoundError):
            self._check_own(name, self.stat(name))
        descriptor = os.open(name, flags | _SAFELY, 0o666, dir_fd=self.descriptor)
        try:
            self._check_own(name, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def read_own(self, name: str, most: int) -> bytes:
        """The first ``most`` bytes of this user's regular file ``name``.

        Raises:
            NotOwnFileError: The name is that of something else, or of a file that has other names, too.
        """
        with open(self.open_own(name, os.O_RDONLY), "rb") as file:
            return file.read(most)

    def create(self, name: str) -> int:
        """A descriptor of a new file ``name``, for writing. What had that name loses it."""
        self.unlink(name)
        return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFELY, 0o666, dir_fd=self.descriptor)

    def unlink(self, name: str) -> None:
        """Remove the entry ``name``, if there is one.

        Raises:
            NotOwnFileError: It is a directory.
        """
        try:
            os.unlink(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            pass
        except IsADirectoryError as exc:
            raise self._not_own(name, "is a directory") from exc

    def replace(self, name: str, target: Directory, new_name: str) -> None:
        """Move the entry ``name`` to ``target``, in place of what has the name ``new_name`` there."""
        os.replace(name, new_name, src_dir_fd=self.descriptor, dst_dir_fd=target.descriptor)

    def _check_own(self, name: str, found: os.stat_result) -> None:
        kind = _KINDS.get(modes.S_IFMT(found.st_mode), "of an unknown kind")
        owner = os.fstat(self.descriptor).st_uid
        if not modes.S_ISREG(found.st_mode):
            raise self._not_own(name, f"is {kind}, not a regular file")
        if found.st_uid not in {owner, os.geteuid()}:
            raise self._not_own(name, f"belongs to user {found.st_uid}")
        if found.st_nlink > 1:
            raise self._not_own(name, "has other names, too (hard links)")

    def _not_own(self, name: str, wrong: str) -> NotOwnFileError:
        return NotOwnFileError(
            f"{self.path_of(name)} {wrong}, so the pull does not write to it",
            cause="another user or program put it there",
            hint="look at it with ls -l, and remove it; it is not needed if no pull is under way",
        )
