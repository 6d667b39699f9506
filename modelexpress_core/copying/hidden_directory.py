"""The hidden directory of pulls: a lock (one pull at a time), a manifest of the files in place, and unfinished files.

It stays when a pull is done. If the lock were removed, two pulls could hold one each.
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

from modelexpress_core.copying.local import Disk, local_errors, open_file, write_all
from modelexpress_core.copying.partial import Identity, Partial, read_identity
from modelexpress_core.errors import ModelExpressError

__all__ = ["HIDDEN_DIRECTORY", "Entry", "HiddenDirectory", "regular_size"]

_log = logging.getLogger(__name__)

#: Its name below the target directory.
HIDDEN_DIRECTORY = ".mx-pull"


@frozen
class Entry:
    """What the manifest holds of a file in place.

    Attributes:
        root: Redacted URI that was pulled.
        version: Version of the copied object.
        size: Its length in bytes.
        mtime_ns: Its modification time, which changes if something writes to it.
        digest: Algorithm and value of the digest that it was compared with; None if none was published.
    """

    root: str
    version: str | None
    size: int
    mtime_ns: int
    digest: tuple[str, str] | None


class HiddenDirectory:
    """The hidden directory below ``directory``; within the ``with`` block this pull holds its lock.

    Args:
        directory: The target of the pull; made if it does not exist.
        disk: The disk that holds it.
    """

    def __init__(self, directory: str, *, disk: Disk | None = None) -> None:
        self.directory = directory
        self._disk = disk or Disk()
        self._path = os.path.join(directory, HIDDEN_DIRECTORY)
        self._manifest_path = os.path.join(self._path, "manifest")
        self._lock = threading.Lock()
        self._held = -1
        self._entries: dict[str, Entry] = {}

    def __enter__(self) -> HiddenDirectory:
        with local_errors(self._path, "make the directory"):
            os.makedirs(self._path, exist_ok=True)
        self._hold()
        self._entries = self._read_manifest()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def keep_held(self) -> None:
        """Keep the lock until the process ends."""
        self._held = -1

    def _hold(self) -> None:
        path = os.path.join(self._path, "lock")
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
                _log.warning(
                    "%s does not support file locks; make sure that no other pull into it is under way", self.directory
                )
            self._held = descriptor
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    # -- files in place -----------------------------------------------------------------------------------------------

    def target(self, name: str) -> str:
        """The path of the file ``name``."""
        return os.path.join(self.directory, *name.split("/"))

    def unchanged(self, identity: Identity) -> Entry | None:
        """The entry of the file in place, if it is the wanted version and nothing wrote to it since."""
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
        """Add the file with this modification time to the manifest, before it appears."""
        entry = Entry(identity.root, identity.version, identity.size, mtime_ns, digest)
        with self._lock, local_errors(self._manifest_path, "write"):
            self._entries[identity.name] = entry
            descriptor = open_file(self._manifest_path, os.O_WRONLY | os.O_APPEND)
            try:
                write_all(descriptor, _manifest_line(identity.name, entry))
            finally:
                os.close(descriptor)

    def tidy(self) -> None:
        """Rewrite the manifest: one line for each file that still exists."""
        present = {
            name: entry for name, entry in self._entries.items() if regular_size(self.target(name)) == entry.size
        }
        temporary = f"{self._manifest_path}.new"
        with local_errors(self._manifest_path, "write"):
            descriptor = open_file(temporary, os.O_WRONLY | os.O_TRUNC)
            try:
                write_all(descriptor, b"".join(_manifest_line(name, entry) for name, entry in sorted(present.items())))
                self._disk.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, self._manifest_path)

    def _read_manifest(self) -> dict[str, Entry]:
        """Entries by name. Incomplete and unknown lines are ignored."""
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
        """The unfinished file, with the bytes that an earlier pull left."""
        partial = Partial(self._path, identity, disk=self._disk)
        partial.resume()
        return partial

    def discard_superseded(
        self, wanted: Collection[str], missing: Iterable[Identity], *, root: str, everything: bool
    ) -> None:
        """Remove unfinished files that no pull will finish, and remains of files that are in place.

        Args:
            wanted: Names of all files of this pull. Only the unfinished files of ``missing`` ones are kept.
            missing: The wanted files that are not in place.
            root: Redacted URI that is pulled.
            everything: Whether ``wanted`` are all files below ``root``, so that other unfinished files of it are stale.
        """
        keys = {identity.key for identity in missing}
        with local_errors(self._path, "read the directory"):
            found = {os.path.splitext(name) for name in os.listdir(self._path)}
        for key in {stem for stem, suffix in found if suffix in {".part", ".journal"}} - keys:
            journal = os.path.join(self._path, f"{key}.journal")
            identity = read_identity(journal)
            if identity is None or identity.name in wanted or (everything and identity.root == root):
                with local_errors(self._path, "remove unfinished files from"):
                    for path in (journal, os.path.join(self._path, f"{key}.part")):
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(path)


def _manifest_line(name: str, entry: Entry) -> bytes:
    return json.dumps({"name": name, **attrs.asdict(entry)}).encode() + b"\n"


def regular_size(path: str) -> int | None:
    """Length of the regular file at ``path``; None if there is none."""
    try:
        stat = os.lstat(path)
    except OSError:
        return None
    return stat.st_size if modes.S_ISREG(stat.st_mode) else None
