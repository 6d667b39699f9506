"""The hidden directory of pulls: a lock (one pull at a time), a manifest of the files in place, and unfinished files.

It stays when a pull is done. If the lock were removed, two pulls could hold one each.

Other users may write to the target, as in a shared cache. So this directory belongs to the user of the pull, and nobody
else may write to it; it is opened once, and its files are opened relative to it, without following links. What others
put there before is removed, or refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import socket
import stat as modes
import threading
from collections.abc import Collection, Iterable
from types import TracebackType

import attrs
from attrs import field, frozen
from attrs.validators import ge, instance_of, optional

from modelexpress_core.copying.directories import Directory, NotOwnFileError
from modelexpress_core.copying.local import Disk, local_errors, write_all
from modelexpress_core.copying.partial import Identity, Partial, read_identity
from modelexpress_core.copying.selection import reason_to_refuse
from modelexpress_core.errors import ModelExpressError

__all__ = ["HIDDEN_DIRECTORY", "Entry", "HiddenDirectory", "regular_size"]

_log = logging.getLogger(__name__)

#: Its name below the target directory.
HIDDEN_DIRECTORY = ".mx-pull"

_LOCK = "lock"
_MANIFEST = "manifest"
_NEW_MANIFEST = "manifest.new"

#: A longer manifest, of some 100,000 files, is not read: the next pull compares digests, or copies again.
_MAX_MANIFEST_BYTES = 32 << 20

#: A longer line of it is ignored.
_MAX_LINE_BYTES = 64 << 10


def _as_digest(value: object) -> tuple[str, str] | None:
    if value is None:
        return None
    algorithm, digest = value if isinstance(value, (list, tuple)) else ("", None)
    if not isinstance(algorithm, str) or not isinstance(digest, str):
        message = "expected the algorithm and the value of a digest"
        raise TypeError(message)
    return algorithm, digest


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

    root: str = field(validator=instance_of(str))
    version: str | None = field(validator=optional(instance_of(str)))
    size: int = field(validator=[instance_of(int), ge(0)])
    mtime_ns: int = field(validator=instance_of(int))
    digest: tuple[str, str] | None = field(converter=_as_digest)


class HiddenDirectory:
    """The hidden directory below ``directory``; within the ``with`` block this pull holds its lock.

    Args:
        directory: The target of the pull; made if it does not exist.
        disk: The disk that holds it.
    """

    _target: Directory
    _hidden: Directory

    def __init__(self, directory: str, *, disk: Disk | None = None) -> None:
        self.directory = directory
        self._disk = disk or Disk()
        self._path = os.path.join(directory, HIDDEN_DIRECTORY)
        self._lock = threading.Lock()
        self._opened = contextlib.ExitStack()
        self._entries: dict[str, Entry] = {}

    def __enter__(self) -> HiddenDirectory:
        with contextlib.ExitStack() as opened:
            with local_errors(self._path, "make the directory"):
                self._target = opened.enter_context(Directory.at(self.directory))
                self._hidden = opened.enter_context(self._target.private_directory(HIDDEN_DIRECTORY))
            opened.callback(os.close, self._locked())
            self._entries = self._read_manifest()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock."""
        self._opened.close()

    def keep_held(self) -> None:
        """Keep the lock until the process ends."""
        self._opened.pop_all()

    def _locked(self) -> int:
        """The descriptor of the lock, which is held until it is closed."""
        with local_errors(self._hidden.path_of(_LOCK), "lock"):
            descriptor = self._hidden.open_own(_LOCK, os.O_RDWR | os.O_CREAT)
            try:
                self._take(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        return descriptor

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            message = f"another pull into {self.directory} is under way" + (f": {holder}" if holder else "")
            raise ModelExpressError(message, hint="wait for it, end it, or pull into another directory") from None
        except OSError as exc:
            if exc.errno not in {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}:
                raise
            _log.warning(
                "%s does not support file locks; make sure that no other pull into it is under way", self.directory
            )
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
        with self._lock, local_errors(self._hidden.path_of(_MANIFEST), "write"):
            self._entries[identity.name] = entry
            self._append(_manifest_line(identity.name, entry))

    def publish(self, partial: Partial, digest: tuple[str, str] | None) -> None:
        """Put a complete file in place, under the name of its identity."""
        partial.publish(self._target, lambda mtime_ns: self.record(partial.identity, mtime_ns, digest))

    def open_in_place(self, name: str) -> int | None:
        """A descriptor of the regular file ``name`` of the target, for reading; None if there is none."""
        try:
            descriptor = os.open(self.target(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        if modes.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        return None

    def tidy(self) -> None:
        """Rewrite the manifest: one line for each file that still exists."""
        present = {
            name: entry for name, entry in self._entries.items() if regular_size(self.target(name)) == entry.size
        }
        with local_errors(self._hidden.path_of(_MANIFEST), "write"):
            descriptor = self._hidden.create(_NEW_MANIFEST)
            try:
                write_all(descriptor, b"".join(_manifest_line(name, entry) for name, entry in sorted(present.items())))
                self._disk.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._hidden.replace(_NEW_MANIFEST, self._hidden, _MANIFEST)

    def _append(self, content: bytes) -> None:
        descriptor = self._hidden.open_own(_MANIFEST, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            write_all(descriptor, content)
        finally:
            os.close(descriptor)

    def _read_manifest(self) -> dict[str, Entry]:
        """Entries by name. Incomplete and unknown lines are ignored; a manifest that cannot be trusted is removed."""
        path = self._hidden.path_of(_MANIFEST)
        with local_errors(path, "read"):
            try:
                content = self._hidden.read_own(_MANIFEST, _MAX_MANIFEST_BYTES + 1)
            except FileNotFoundError:
                return {}
            except NotOwnFileError as exc:
                _log.warning("removing the manifest of earlier pulls: %s", exc.message)
                self._hidden.unlink(_MANIFEST)
                return {}
        if len(content) > _MAX_MANIFEST_BYTES:
            _log.warning("removing the manifest of earlier pulls: %s is longer than any manifest", path)
            self._hidden.unlink(_MANIFEST)
            return {}
        entries = dict(filter(None, map(_entry_of, io.BytesIO(content))))
        if content and not content.endswith(b"\n"):
            with local_errors(path, "write"):
                self._append(b"\n")
        return entries

    # -- unfinished files ---------------------------------------------------------------------------------------------

    def partial(self, identity: Identity) -> Partial:
        """The unfinished file, with the bytes that an earlier pull left."""
        partial = Partial(self._hidden, identity, disk=self._disk)
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
            found = {os.path.splitext(name) for name in self._hidden.names()}
        for key in {stem for stem, suffix in found if suffix in {".part", ".journal"}} - keys:
            identity = read_identity(self._hidden, f"{key}.journal")
            if identity is None or identity.name in wanted or (everything and identity.root == root):
                with local_errors(self._path, "remove unfinished files from"):
                    self._hidden.unlink(f"{key}.journal")
                    self._hidden.unlink(f"{key}.part")


def _manifest_line(name: str, entry: Entry) -> bytes:
    return json.dumps({"name": name, **attrs.asdict(entry)}).encode() + b"\n"


def _entry_of(line: bytes) -> tuple[str, Entry] | None:
    """Name and entry in a line of the manifest; None if it has none, whatever it has."""
    if not line.startswith(b"{") or len(line) > _MAX_LINE_BYTES:
        return None
    try:
        values = json.loads(line)
        name = values.pop("name")
        return (name, Entry(**values)) if not reason_to_refuse(name) else None
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None


def regular_size(path: str) -> int | None:
    """Length of the regular file at ``path``; None if there is none."""
    try:
        stat = os.lstat(path)
    except OSError:
        return None
    return stat.st_size if modes.S_ISREG(stat.st_mode) else None
