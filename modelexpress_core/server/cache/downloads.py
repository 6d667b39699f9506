"""One download into the cache: a pull, whose files can be read while they arrive, and what makes a version of them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Sequence

import attrs

from modelexpress_core.checkpoint.manifest import ChunkDigests, Manifest, ManifestFile
from modelexpress_core.copying.local import Disk, fsync_directory, local_errors
from modelexpress_core.copying.puller import Pull
from modelexpress_core.errors import ModelExpressError, SourceChangedError, UnavailableError
from modelexpress_core.loader import Loader
from modelexpress_core.resources import start_thread
from modelexpress_core.server.cache.chunk_tables import digests_of
from modelexpress_core.server.cache.layout import OWN, Layout, layout_of
from modelexpress_core.server.cache.records import CachedFile, Record, StoredFile, key_of
from modelexpress_core.server.cache.snapshots import CachedFileReader, manifest_directory, wait_for
from modelexpress_core.uri import ModelURI

__all__ = ["Download", "write_manifest", "write_record"]

_log = logging.getLogger(__name__)


class Download:
    """Brings one version of a model into the cache, in a thread of its own.

    Args:
        root: The directory of the cache.
        loader: Settings and plugins.
        uri: Where the bytes come from.
        place: Canonical name of the model.
        source: Redacted URI of the model's storage.
        version: Its version.
        revision: What was asked for.
        weights: Whether files of weights are copied.
        restricted: Whether the storage gives the model to some readers alone.
        owner: Who asked for it.
        pull: The pull, which has selected its files; None to select them again.
        files: The files.
        on_end: Called when it has ended, with this object.
        stored: Returns what other versions have stored in a blob.
        publish: Calls a function that makes the record of the version, while no version is removed.
        replica: Address of the replica that the bytes come from; empty for the storage of the model.
        lasts: Whether this replica still is the one that downloads the version.
        disk: The disk.

    Attributes:
        record: What is known of the version, once it is complete.
        error: Why it failed.
        changed: Notified when bytes have arrived.
        replica: As above.
        pulled_bytes: Bytes that it fetched.
    """

    def __init__(
        self,
        root: str,
        loader: Loader,
        uri: ModelURI,
        *,
        place: str,
        source: str,
        version: str,
        revision: str,
        weights: bool,
        restricted: bool,
        owner: str,
        pull: Callable[[Download], Pull],
        files: Sequence[CachedFile],
        on_end: Callable[[Download], None],
        stored: Callable[[str], Sequence[StoredFile]],
        publish: Callable[[Callable[[], Record]], Record],
        replica: str = "",
        lasts: Callable[[], bool] = lambda: True,
        disk: Disk | None = None,
    ) -> None:
        self.place = place
        self.source = source
        self.version = version
        self.revision = revision
        self.weights = weights
        self.restricted = restricted
        self.owner = owner
        self.files = tuple(files)
        self.record: Record | None = None
        self.error: ModelExpressError | None = None
        self.changed = threading.Condition()
        self.pulled_bytes = 0
        self._root = root
        self._loader = loader
        self._uri = uri
        self._on_end = on_end
        self._stored = stored
        self._publish = publish
        self.replica = replica
        self._lasts = lasts
        self._disk = disk or Disk()
        self._digests: dict[str, tuple[ManifestFile, ChunkDigests]] = {}
        self._lock = threading.Lock()
        self._cancelled: ModelExpressError | None = None
        self._pull = pull(self)
        self._thread = threading.Thread(target=self._run, name="mx-cache-download", daemon=True)

    @property
    def key(self) -> str:
        """Names its files on disk."""
        return key_of(self.place, self.version, weights=self.weights)

    @property
    def directory(self) -> str:
        """Where files arrive."""
        return download_directory(self._root, self.key)

    @property
    def ended(self) -> bool:
        """Whether it is complete, or failed."""
        return self.record is not None or self.error is not None

    @property
    def present_bytes(self) -> int:
        """Bytes that are there."""
        return self._pull.present_bytes

    def start(self) -> None:
        """Begin.

        Raises:
            ResourceError: The system starts no more threads.
        """
        start_thread(self._thread, "download a model")

    def cancel(self, exc: ModelExpressError) -> None:
        """End it with ``exc``; what has arrived stays for the next download."""
        self._cancelled = exc
        self._pull.abort(exc)

    def join(self) -> None:
        """Wait for its end."""
        if self._thread.ident is not None:
            self._thread.join()

    # -- reading what arrives -----------------------------------------------------------------------------------------

    def wait(self, met: Callable[[], bool], seconds: float) -> bool:
        """Wait until ``met``, for at most ``seconds``; returns whether it is.

        Raises:
            ModelExpressError: The download failed.
        """

        def met_or_failed() -> bool:
            if met():
                return True
            if self.error is not None:
                raise self.error
            return False

        return wait_for(self.changed, met_or_failed, seconds)

    def open_file(self, file: CachedFile, seconds: float) -> CachedFileReader | None:
        """Open a file that arrives; None if it does not begin within ``seconds``."""
        opened: list[int] = []

        begun_again = self._pull.times_begun_again(file.path)

        def has_begun() -> bool:
            try:
                descriptor = self._pull.open_file(file.path)
            except OSError as exc:
                if exc.errno != errno.EBADF:
                    raise
                descriptor = None  # the pull has ended, and its files are being put in place
            if descriptor is None and self.record is not None:
                [blob] = [stored.blob for stored in self.record.files if stored.file.path == file.path]
                descriptor = os.open(os.path.join(self._root, blob), os.O_RDONLY | os.O_CLOEXEC)
            opened.extend(() if descriptor is None else (descriptor,))
            return bool(opened)

        if not self.wait(has_begun, seconds):
            return None
        [descriptor] = opened

        def wait(start: int, end: int, seconds: float) -> bool:
            there = self.wait(lambda: self.record is not None or self._pull.has(file.path, start, end), seconds)
            # That it is gone from its directory says nothing: the cache may have had its content already.
            if there and self._pull.times_begun_again(file.path) != begun_again:
                raise SourceChangedError(
                    f"{file.path!r} is downloaded once more, because its digest was wrong",
                    uri=self.source,
                    hint="ask again",
                )
            return there

        return CachedFileReader(descriptor, file.size, wait)

    def file_complete(self, name: str, path: str) -> None:
        """Take the digests of the chunks of a file that is complete and verified; called by the threads of the pull."""
        with local_errors(path, "read"):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                found = digests_of(descriptor, name, os.fstat(descriptor).st_size)
            finally:
                os.close(descriptor)
        with self._lock:
            self._digests[name] = found
        if not self._lasts():
            raise UnavailableError("another replica of the server has taken this download over", hint="ask again")

    def written(self) -> None:
        """Bytes have arrived."""
        with self.changed:
            self.changed.notify_all()

    # -- the download -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.record = self._completed()
        except ModelExpressError as exc:
            self.error = self._cancelled or exc
        except Exception as exc:  # noqa: BLE001 - of a plugin, say; whoever waits for the download gets the error
            _log.exception("the download of %s failed", self.place)
            self.error = ModelExpressError(
                f"the download of {self.place} failed: {exc}", hint="look at the server's log"
            )
        finally:
            self._on_end(self)
            self.written()

    def _completed(self) -> Record:
        layout = layout_of(self.place, self.version, self.key)
        with self._pull as pull:
            self._take_known(layout)
            report = pull.run()
        self.pulled_bytes = report.bytes_copied
        with local_errors(self._root, "put the files of a version into"):
            record = self._publish(lambda: self._published(layout))
        shutil.rmtree(self.directory, ignore_errors=True)
        return record

    def _take_known(self, layout: Layout) -> None:
        """Let the pull find files that the cache has already, from another version or written by another program."""
        for file in self.files:
            blob = layout.known_blob(file)
            target = os.path.join(self.directory, file.path)
            if blob is None or os.path.lexists(target):
                continue
            with contextlib.suppress(OSError):
                found = os.path.realpath(os.path.join(self._root, blob))
                if os.path.getsize(found) == file.size:
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    os.link(found, target)

    def _kept_blob(self, blob: str) -> os.stat_result | None:
        """The facts of a blob that another version has, if it is the file that was verified for that."""
        with contextlib.suppress(OSError):
            found = os.stat(os.path.join(self._root, blob))
            if any(stored.is_unchanged(found) for stored in self._stored(blob)):
                return found
        return None

    def _published(self, layout: Layout) -> Record:
        stored: list[StoredFile] = []
        blobs: set[str] = set()
        put: dict[str, os.stat_result] = {}  # files with equal bytes have one blob
        for file in self.files:
            _, digests = self._digests[file.path]
            blob = layout.blob(file, content_address(file.size, digests))
            path = os.path.join(self._root, blob)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            found = put.get(blob) or self._kept_blob(blob) or _put(os.path.join(self.directory, file.path), path)
            put[blob] = found
            stored.append(StoredFile(file, blob, found.st_ino, found.st_mtime_ns))
            blobs.add(os.path.dirname(path))
        for directory in blobs:
            fsync_directory(directory)
        described = (
            (attrs.evolve(found, version=file.version or "", digests=file.digests), digests)
            for file, (found, digests) in ((file, self._digests[file.path]) for file in self.files)
        )
        digest = write_manifest(self._root, self.key, described)
        layout.publish(self._root, {each.file.path: each.blob for each in stored})
        if self.revision != self.version:
            layout.name_revision(self._root, self.revision or "main", self.version)
        record = Record(
            self.place,
            self.source,
            self.version,
            self.revision,
            self.weights,
            tuple(stored),
            layout.directory,
            digest,
            self.restricted,
            self.owner,
        )
        write_record(self._root, record)
        return record


def _put(path: str, blob: str) -> os.stat_result:
    """Give the file at ``path`` the name ``blob`` too, in place of what has it; returns its facts.

    Where the blob is that file already, it stays: other programs link blobs to stores of their own.
    """
    with contextlib.suppress(OSError):
        if os.path.samefile(path, blob):
            return os.stat(blob)
    new = f"{blob}.mx-new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    try:
        os.link(path, new)
    except OSError:  # a file system without hard links
        os.rename(path, new)
    os.replace(new, blob)
    return os.stat(blob)


def content_address(size: int, digests: ChunkDigests) -> str:
    """A digest of the bytes of a file, from those of its chunks: SHA-256 in hex."""
    return hashlib.sha256(b"mx-file-1\0%d\0" % size + digests.rows("blake3")).hexdigest()


def download_directory(root: str, key: str) -> str:
    """Where the files of a version arrive."""
    return os.path.join(root, OWN, "downloads", key)


def record_path(root: str, key: str) -> str:
    """The file with the record of a version."""
    return os.path.join(root, OWN, "records", f"{key}.json")


def write_manifest(root: str, key: str, files: Iterable[tuple[ManifestFile, ChunkDigests]]) -> str:
    """Write the chunk manifest of a version; returns its digest."""
    manifest, tables = Manifest.of_files(files)
    directory = manifest_directory(root, key)
    os.makedirs(directory, exist_ok=True)
    for name, content in (*tables.items(), ("index", manifest.text)):
        _write(os.path.join(directory, name), content)
    fsync_directory(directory)
    return manifest.digest


def write_record(root: str, record: Record) -> None:
    """Write the record of a version: from now on it is complete, also after a restart."""
    path = record_path(root, record.key)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    _write(path, record.text)
    fsync_directory(os.path.dirname(path))


def _write(path: str, content: bytes) -> None:
    new = f"{path}.new"
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def put_back(root: str, record: Record) -> None:
    """Give the files of a version, whose record is gone, to its next download, which compares them with their digests.

    The Hub's files need that not: downloads find them by their names.
    """
    if layout_of(record.place, record.version, record.key).by_etag:
        return
    for stored in record.files:
        target = os.path.join(download_directory(root, record.key), stored.file.path)
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.link(os.path.join(root, stored.blob), target)


def remove_files(root: str, record: Record, others: Collection[Record]) -> int:
    """Remove a version whose record is gone; returns the bytes that were freed.

    Args:
        root: The directory of the cache.
        record: The version.
        others: All other versions; their files and names stay.
    """
    layout = layout_of(record.place, record.version, record.key)
    kept = {stored.file.path for each in others if each.directory == record.directory for stored in each.files}
    layout.remove_names(root, [stored.file.path for stored in record.files if stored.file.path not in kept])
    referenced = {stored.blob for each in others for stored in each.files}.union(layout.linked_blobs(root))
    freed = 0
    for blob in {stored.blob for stored in record.files} - referenced:
        path = os.path.join(root, blob)
        with contextlib.suppress(OSError):
            # A link leads to a store of another program, which keeps the bytes.
            size = 0 if os.path.islink(path) else os.path.getsize(path)
            os.unlink(path)
            freed += size
    layout.tidy(root)
    shutil.rmtree(manifest_directory(root, record.key), ignore_errors=True)
    return freed
