"""The hidden directory of a pull: one pull at a time, what is known of the files that are there, unfinished ones.

It stays when a pull is done, with the lock (removing it would let two pulls hold one each) and the manifest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat as modes
import threading
from collections.abc import Collection, Iterable
from types import TracebackType

import attrs
from attrs import frozen

from modelexpress_core.copying.local import local_errors, open_file, write_all
from modelexpress_core.copying.partial import Identity, Partial, read_identity
from modelexpress_core.errors import ModelExpressError

__all__ = ["HIDDEN_DIRECTORY", "Entry", "Workplace", "regular_size"]

_log = logging.getLogger(__name__)

#: Below the directory that is pulled into.
HIDDEN_DIRECTORY = ".mx-pull"


@frozen
class Entry:
    """What is known of a file that was put in place.

    Attributes:
        root: Redacted URI that was pulled.
        version: Version of the object that it is a copy of.
        size: Its length in bytes.
        mtime_ns: Its modification time: one that somebody wrote to has another.
        digest: Algorithm and value that it was compared with; None where there was nothing to compare with.
    """

    root: str
    version: str | None
    size: int
    mtime_ns: int
    digest: tuple[str, str] | None


class Workplace:
    """The hidden directory below ``directory``, held by this pull within its ``with`` block.

    Args:
        directory: Where the files go; made where it is not there.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._hidden = os.path.join(directory, HIDDEN_DIRECTORY)
        self._manifest_path = os.path.join(self._hidden, "manifest")
        self._lock = threading.Lock()
        self._held = -1
        self._entries: dict[str, Entry] = {}

    def __enter__(self) -> Workplace:
        with local_errors(self._hidden, "make the directory"):
            os.makedirs(self._hidden, exist_ok=True)
        self._hold()
        self._entries = self._read_manifest()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Let another pull begin."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def keep_held(self) -> None:
        """Let no other pull begin before this process ends."""
        self._held = -1

    def _hold(self) -> None:
        path = os.path.join(self._hidden, "lock")
        with local_errors(path, "lock"):
            descriptor = open_file(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                message = f"another pull into {self.directory} is under way" + (f": {holder}" if holder else "")
                raise ModelExpressError(message, hint="wait for it, end it, or pull into another directory") from None
            except OSError as exc:
                if exc.errno not in {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}:
                    os.close(descriptor)
                    raise
                _log.warning("%s can lock no files; see to it that no other pull into it is under way", self.directory)
            self._held = descriptor
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    # -- what is there ------------------------------------------------------------------------------------------------

    def target(self, name: str) -> str:
        """Where the file ``name`` goes."""
        return os.path.join(self.directory, *name.split("/"))

    def unchanged(self, identity: Identity) -> Entry | None:
        """What is known of the file that is in place, where it is just what is wanted and nobody wrote to it."""
        entry = self._entries.get(identity.name)
        if entry is None or identity.version is None:
            return None
        if (entry.root, entry.version, entry.size) != (identity.root, identity.version, identity.size):
            return None
        with contextlib.suppress(OSError):
            stat = os.lstat(self.target(identity.name))
            if modes.S_ISREG(stat.st_mode) and (stat.st_size, stat.st_mtime_ns) == (entry.size, entry.mtime_ns):
                return entry
        return None

    def record(self, identity: Identity, mtime_ns: int, digest: tuple[str, str] | None) -> None:
        """Remember what the file with this time is, before it appears."""
        entry = Entry(identity.root, identity.version, identity.size, mtime_ns, digest)
        with self._lock, local_errors(self._manifest_path, "write"):
            self._entries[identity.name] = entry
            descriptor = open_file(self._manifest_path, os.O_WRONLY | os.O_APPEND)
            try:
                write_all(descriptor, _manifest_line(identity.name, entry))
            finally:
                os.close(descriptor)

    def tidy(self) -> None:
        """Leave one line for each file that is still there."""
        there = {name: entry for name, entry in self._entries.items() if regular_size(self.target(name)) == entry.size}
        temporary = f"{self._manifest_path}.new"
        with local_errors(self._manifest_path, "write"):
            descriptor = open_file(temporary, os.O_WRONLY | os.O_TRUNC)
            try:
                write_all(descriptor, b"".join(_manifest_line(name, entry) for name, entry in sorted(there.items())))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, self._manifest_path)

    def _read_manifest(self) -> dict[str, Entry]:
        """By name. A line that is not whole, or of another kind, counts for nothing."""
        entries = {}
        with local_errors(self._manifest_path, "read"):
            try:
                with open(self._manifest_path, "rb") as file:
                    content = file.read()
            except FileNotFoundError:
                return {}
        for line in content.splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                values = json.loads(line)
                name, digest = values.pop("name"), values.pop("digest")
                entries[name] = Entry(digest=None if digest is None else (digest[0], digest[1]), **values)
        if content and not content.endswith(b"\n"):
            with local_errors(self._manifest_path, "write"), open(self._manifest_path, "ab") as file:
                file.write(b"\n")
        return entries

    # -- unfinished files ---------------------------------------------------------------------------------------------

    def partial(self, identity: Identity) -> Partial:
        """The unfinished file, with what is left of it from an earlier pull."""
        partial = Partial(self._hidden, identity)
        partial.resume()
        return partial

    def discard_superseded(
        self, wanted: Collection[str], missing: Iterable[Identity], *, root: str, everything: bool
    ) -> None:
        """Remove unfinished files that nobody will finish, and what was left of those that were just put in place.

        Args:
            wanted: Names of all files of this pull: of each only what is ``missing`` is kept.
            missing: Those that are not in place.
            root: Redacted URI that is pulled.
            everything: Whether unfinished files below ``root`` that are not wanted are no longer there at all.
        """
        keys = {identity.key for identity in missing}
        with local_errors(self._hidden, "read the directory"):
            found = {os.path.splitext(name) for name in os.listdir(self._hidden)}
        for key in {stem for stem, suffix in found if suffix in {".part", ".journal"}} - keys:
            journal = os.path.join(self._hidden, f"{key}.journal")
            identity = read_identity(journal)
            if identity is None or identity.name in wanted or (everything and identity.root == root):
                with local_errors(self._hidden, "remove unfinished files from"):
                    for path in (journal, os.path.join(self._hidden, f"{key}.part")):
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(path)


def _manifest_line(name: str, entry: Entry) -> bytes:
    return json.dumps({"name": name, **attrs.asdict(entry)}).encode() + b"\n"


def regular_size(path: str) -> int | None:
    """Length of the regular file at ``path``; None where there is none."""
    try:
        stat = os.lstat(path)
    except OSError:
        return None
    return stat.st_size if modes.S_ISREG(stat.st_mode) else None
