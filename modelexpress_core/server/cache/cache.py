"""The model cache: finds, downloads, keeps and removes versions of models."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from attrs import define, field, frozen

from modelexpress_core.copying.local import Disk, local_errors
from modelexpress_core.copying.puller import Pull
from modelexpress_core.errors import (
    AccessDeniedError,
    ModelExpressError,
    ResolveError,
    SourceChangedError,
    UnavailableError,
)
from modelexpress_core.loader import Loader
from modelexpress_core.plugins import PluginManager
from modelexpress_core.report import format_bytes
from modelexpress_core.server.cache import leftovers
from modelexpress_core.server.cache.checking import Damage, described, validate
from modelexpress_core.server.cache.downloads import Download, put_back, record_path, remove_files
from modelexpress_core.server.cache.layout import OWN
from modelexpress_core.server.cache.places import HUB, Place, Sources
from modelexpress_core.server.cache.records import CachedFile, Record, StoredFile, is_commit, key_of, version_of
from modelexpress_core.server.cache.replica_pulls import DownloadLease, always, claim_all, nearest
from modelexpress_core.server.cache.snapshots import Snapshot
from modelexpress_core.server.settings import CacheSettings
from modelexpress_core.settings import from_env
from modelexpress_core.uri import ModelURI

__all__ = ["CacheStats", "ModelCache"]

_log = logging.getLogger(__name__)

#: For so long the version of a branch is not asked for again.
_RESOLVED_SECONDS = 5.0

#: A download that failed is not begun again for so long, doubled with each failure in a row.
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0

#: Who has read a file lately goes on reading, with requests of its own for each range.
_IN_USE_SECONDS = 600.0

#: A download that ended early is removed if nobody went on with it for so long.
_ABANDONED_SECONDS = 7 * 86400.0

_UNKNOWN_FREE_BYTES = 1 << 60

#: So many answers are remembered; older ones are asked for again.
_MAX_RESOLVED = 1000


@frozen
class CacheStats:
    """What the cache holds and did since it was opened.

    Attributes:
        directory: Its directory.
        models: Versions that are complete.
        size_bytes: Bytes of their files; what several share counts once.
        limit_bytes: Their limit; None for none.
        free_bytes: Free bytes of the disk.
        hits: Requests for versions that were there.
        misses: Requests that began a download, or joined one.
        origin_bytes: Bytes that were downloaded from storages.
        replica_bytes: Bytes that were downloaded from other replicas.
        sent_bytes: Bytes that readers got.
        evictions: Versions that were removed to keep the limits.
        downloads: Downloads under way.
        failures: Downloads that failed.
    """

    directory: str
    models: int
    size_bytes: int
    limit_bytes: int | None
    free_bytes: int
    hits: int
    misses: int
    origin_bytes: int
    replica_bytes: int
    sent_bytes: int
    evictions: int
    downloads: int
    failures: int


@define
class _Failure:
    """A download that failed.

    Attributes:
        error: Why.
        until: When it may begin again, by the monotonic clock.
        pause: How long it paused.
    """

    error: ModelExpressError
    until: float
    pause: float


@define
class _Resolved:
    """The version that a name had when it was asked for last.

    Attributes:
        version: The version.
        at: When, by the monotonic clock.
    """

    version: str
    at: float


@define
class _Question:
    """A name whose version is being asked for.

    Attributes:
        lock: Held while the storage is asked.
        callers: How many wait for the answer.
        error: Why the storage gave none.
        failed_at: When, by the monotonic clock.
    """

    lock: threading.Lock = field(factory=threading.Lock)
    callers: int = 0
    error: ModelExpressError | None = None
    failed_at: float = 0.0


class _OwnerLimitError(AccessDeniedError):
    """The owner of a download has as much in the cache as it may have."""


class ModelCache:
    """The models in a directory. Thread-safe; one process uses a directory at a time.

    Args:
        directory: The directory; made if it does not exist.
        settings: What may be downloaded, and the limits.
        environ: Variables of downloads; by default the process's.
        plugins: Plugins to download with; by default all that are installed and allowed.
        lease: Agrees with other replicas on who downloads; None for one server.
        disk: The disk, for tests.

    Raises:
        ModelExpressError: The directory cannot be used, or another process uses it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        settings: CacheSettings | None = None,
        environ: Mapping[str, str] | None = None,
        plugins: PluginManager | None = None,
        lease: DownloadLease | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.directory = os.path.abspath(os.path.expanduser(os.fspath(directory)))
        self.loader = Loader(environ, plugins)
        self.settings = settings or from_env(CacheSettings, self.loader.environ)
        self.sources = Sources(_patterns(self.settings, self.loader.environ))
        self._lease = lease
        self._disk = disk or Disk()
        self._lock = threading.RLock()
        self._records: dict[str, Record] = {}
        self._used: dict[str, float] = {}  # by key: when it was read last, by the wall clock
        self._held: Counter[str] = Counter()
        self._downloads: dict[str, Download] = {}
        self._failures: dict[str, _Failure] = {}
        self._resolved: dict[tuple[str, str, bool], _Resolved] = {}
        self._questions: dict[tuple[str, str, bool], _Question] = {}
        self._counts: Counter[str] = Counter()
        #: Held while files get the names that they keep, and while versions are removed: versions share files.
        self._publishing = threading.Lock()
        self._closed = False
        self._lock_file = self._locked()
        try:
            self._read_records()
            leftovers.sweep(self.directory, self._records.values())
        except BaseException:
            os.close(self._lock_file)
            raise

    def close(self) -> None:
        """End downloads, whose bytes stay, and release the directory. May be called more than once."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            downloads = list(self._downloads.values())
        for download in downloads:
            download.cancel(UnavailableError("the server ends", hint="ask again when it runs"))
        for download in downloads:
            download.join()
        os.close(self._lock_file)

    def __enter__(self) -> ModelCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the directory ------------------------------------------------------------------------------------------------

    def _locked(self) -> int:
        own = os.path.join(self.directory, OWN)
        with local_errors(own, "make the directory of the cache"):
            os.makedirs(own, exist_ok=True)
            descriptor = os.open(os.path.join(own, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()}\n".encode(), 0)
        except BlockingIOError as exc:
            holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise ModelExpressError(
                f"another server uses the cache in {self.directory}" + (f": {holder}" if holder else ""),
                cause="one process at a time may change the files of a cache",
                hint="ask that server (mx models --url), or give this one a directory of its own",
            ) from exc
        except OSError:
            os.close(descriptor)
            with local_errors(own, "lock"):
                raise
        return descriptor

    def _read_records(self) -> None:
        directory = os.path.join(self.directory, OWN, "records")
        if not os.path.isdir(directory):
            return
        with local_errors(directory, "read"):
            names = [name for name in os.listdir(directory) if name.endswith(".json")]
        for name in names:
            path = os.path.join(directory, name)
            try:
                with open(path, "rb") as file:
                    record = Record.parse(file.read())
                used = os.stat(path).st_mtime
            except (OSError, ValueError) as exc:
                _log.warning("%s is left out of the cache: %s", path, exc)
                continue
            if f"{record.key}.json" == name:
                self._records[record.key] = record
                self._used[record.key] = used

    # -- finding ------------------------------------------------------------------------------------------------------

    def place(self, path: str, revision: str | None = None) -> Place:
        """What the path of an ``mx`` URI names.

        Raises:
            InvalidURIError: It names no model.
            AccessDeniedError: The source is not allowed.
        """
        return self.sources.place(path, revision or "")

    def find(
        self, path: str, *, revision: str | None = None, version: str | None = None, weights: bool = True
    ) -> Snapshot | None:
        """The version of a model that is there, without asking its storage; None if there is none.

        Raises:
            InvalidURIError, AccessDeniedError: As ``place``.
        """
        place = self.place(path, revision)
        with self._lock:
            found = self._find(place, version or _pinned(revision), weights=weights)
            if found is None and not version:
                resolved = self._resolved.get((place.name, revision or "", weights))
                latest = resolved.version if resolved else self._version_of_latest(place.name, revision or "")
                found = self._find(place, latest, weights=weights)
        return found

    def begin(
        self,
        path: str,
        *,
        revision: str | None = None,
        version: str | None = None,
        weights: bool = True,
        owner: str = "",
    ) -> Snapshot:
        """A version of a model: one that is there, or one whose download has begun.

        Returns when its files are known, not when they have arrived. The storage is asked what a branch points at; if
        it cannot be reached, the version that the branch had last is served.

        Args:
            path: The path of an ``mx`` URI.
            revision: A branch, tag or commit; None for the default.
            version: Only this version.
            weights: Whether files of weights are needed.
            owner: Who asks, whose bytes have a limit (MX_CACHE_MAX_CALLER_BYTES); empty for nobody.

        Raises:
            InvalidURIError, AccessDeniedError: As ``place``; also if the limit of the owner is reached.
            SourceChangedError: The storage has another version than ``version``.
            ModelExpressError: The storage failed, or the download failed a moment ago.
        """
        place = self.place(path, revision)
        pinned = version or _pinned(revision)
        if pinned:
            with self._lock:
                found = self._find(place, pinned, weights=weights)
            if found is not None:
                self._count("hits")
                return found
        if version and _pinned(version) and place.name.startswith(f"{HUB}/"):
            revision = version  # also where no branch points at it any more
            place = self.place(path, revision)
        return self._begin(place, revision or "", version, weights=weights, owner=owner)

    def _find(self, place: Place, version: str | None, *, weights: bool) -> Snapshot | None:
        """A complete version, or one that arrives; the lock is held."""
        if not version:
            return None
        for record in self._records.values():
            if (record.place, record.version) == (place.name, version) and (record.weights or not weights):
                return self._snapshot(record=record)
        for download in self._downloads.values():
            if (download.place, download.version) == (place.name, version) and (download.weights or not weights):
                return self._snapshot(download=download)
        return None

    def _snapshot(self, *, record: Record | None = None, download: Download | None = None) -> Snapshot:
        return Snapshot(self.directory, record=record, download=download, on_damage=self._forget)

    def _version_of_latest(self, name: str, revision: str) -> str | None:
        """The version that a revision had when it was downloaded last."""
        found = [
            (self._used[key], record.version)
            for key, record in self._records.items()
            if (record.place, record.revision) == (name, revision)
        ]
        return max(found)[1] if found else None

    def _begin(self, place: Place, revision: str, version: str | None, *, weights: bool, owner: str) -> Snapshot:
        name = (place.name, revision, weights)
        since = time.monotonic()
        with self._lock:
            self._check_open()
            question = self._questions.setdefault(name, _Question())
            question.callers += 1
        try:
            with question.lock:  # one question at a time for each name
                if question.error is not None and question.failed_at >= since:
                    raise question.error  # it was asked for this caller too
                resolved = self._resolved.get(name)
                if resolved is not None and time.monotonic() - resolved.at < _RESOLVED_SECONDS:
                    with self._lock:
                        found = self._find(place, resolved.version, weights=weights)
                    if found is not None and version in {None, resolved.version}:
                        self._count("hits" if found.complete else "misses")
                        return found
                try:
                    return self._resolve(place, revision, version, name, weights=weights, owner=owner)
                except (SourceChangedError, _OwnerLimitError):  # of the version, or the limit, of this caller alone
                    raise
                except ModelExpressError as exc:
                    question.error, question.failed_at = exc, time.monotonic()
                    raise
        finally:
            with self._lock:
                question.callers -= 1
                if not question.callers:
                    self._questions.pop(name, None)

    def _note_resolved(self, name: tuple[str, str, bool], version: str) -> None:
        now = time.monotonic()
        with self._lock:
            if len(self._resolved) >= _MAX_RESOLVED:
                oldest = sorted(self._resolved, key=lambda each: self._resolved[each].at)
                for each in oldest[: _MAX_RESOLVED // 2]:
                    del self._resolved[each]
            self._resolved[name] = _Resolved(version, now)

    def _resolve(
        self,
        place: Place,
        revision: str,
        version: str | None,
        name: tuple[str, str, bool],
        *,
        weights: bool,
        owner: str,
    ) -> Snapshot:
        """Ask the storage which files the model has now."""
        pull = Pull(self.loader, place.uri, self.directory, disk=self._disk)
        try:
            selection = pull.select()
        except (UnavailableError, ResolveError) as exc:
            pull.close()
            latest = self._latest_of(place, revision, version, exc, weights=weights)
            if version is None:
                self._note_resolved(name, latest.version)  # other callers do not wait for the storage again
            return latest
        except BaseException:
            pull.close()
            raise
        found = version_of(info for _, info in selection.files)
        if not weights:
            pull.leave_out_weights()
            selection = pull.selection
        files = [CachedFile(name, info.size, info.version, info.digests) for name, info in selection.files]
        self._note_resolved(name, found)
        if version and found != version:
            pull.close()
            raise SourceChangedError(
                f"{place.uri} has the version {found[:12]} now, and {version[:12]} is not in the cache any more",
                uri=str(place.uri),
                cause="the model was changed, or its branch moved",
                hint="start the load again, for the new version",
            )
        with self._lock:
            there = self._find(place, found, weights=weights)
            if there is not None:
                pull.close()
                self._count("hits" if there.complete else "misses")
                return there
        self._count("misses")
        try:
            restricted = pull.is_restricted()
        except BaseException:
            pull.close()
            raise
        return self._download(place, revision, found, files, pull, weights=weights, restricted=restricted, owner=owner)

    def _latest_of(
        self, place: Place, revision: str, version: str | None, exc: ModelExpressError, *, weights: bool
    ) -> Snapshot:
        """The version that a name had last, where its storage cannot be asked."""
        with self._lock:
            latest = version or self._version_of_latest(place.name, revision)
            found = self._find(place, latest, weights=weights)
        if found is None:
            raise exc
        _log.warning("%s cannot be asked for its version, so %s is served: %s", place.uri, found.version[:12], exc)
        self._count("hits")
        return found

    # -- downloading --------------------------------------------------------------------------------------------------

    def _download(
        self,
        place: Place,
        revision: str,
        version: str,
        files: Sequence[CachedFile],
        pull: Pull,
        *,
        weights: bool,
        restricted: bool = False,
        owner: str = "",
    ) -> Snapshot:
        key = key_of(place.name, version, weights=weights)
        with self._lock:
            self._check_open()
            failed = self._failures.get(key)
            if failed is not None and time.monotonic() < failed.until:
                pull.close()
                raise failed.error
        replica, lasts = "", always
        if self._lease is not None:
            pull, replica, lasts = nearest(
                self._lease, pull, loader=self.loader, place=place, version=version, files=files, key=key
            )
        download = Download(
            self.directory,
            self.loader,
            place.uri,
            place=place.name,
            source=str(place.uri),
            version=version,
            revision=revision,
            weights=weights,
            restricted=restricted,
            owner=owner,
            pull=lambda download: pull.into(
                download.directory, on_written=download.written, on_file=download.file_complete
            ),
            files=files,
            on_end=self._ended,
            stored=self._stored,
            publish=self._publish,
            replica=replica,
            lasts=lasts,
            disk=self._disk,
        )
        with self._lock:
            present = self._downloads.setdefault(download.key, download)
        if present is not download:  # asked for under another revision at the same time
            pull.close()
            return self._snapshot(download=present)
        try:
            self._check_owner(download)
            self._make_room(sum(file.size for file in files), download)
            download.start()
        except BaseException:
            with self._lock:
                del self._downloads[download.key]
            pull.close()
            raise
        _log.info("downloading %s at %s from %s", place.shown, version[:12], replica or place.uri)
        return self._snapshot(download=download)

    def claim_complete(self) -> None:
        """Tell the other replicas which versions this one has; to be called after a start."""
        with self._lock:
            keys = list(self._records)
        if self._lease is not None:
            claim_all(self._lease, keys)

    def _stored(self, blob: str) -> Sequence[StoredFile]:
        with self._lock:
            return [each for record in self._records.values() for each in record.files if each.blob == blob]

    def _publish(self, make: Callable[[], Record]) -> Record:
        with self._publishing:
            record = make()
            with self._lock:
                self._records[record.key] = record
                self._used[record.key] = time.time()
        return record

    def _ended(self, download: Download) -> None:
        with self._lock:
            self._downloads.pop(download.key, None)
            self._counts["replica_bytes" if download.replica else "origin_bytes"] += download.pulled_bytes
            if download.record is not None:
                self._failures.pop(download.key, None)
                _log.info("%s at %s is complete", download.place, download.version[:12])
            elif download.error is not None:
                self._counts["failures"] += 1
                last = self._failures.get(download.key)
                pause = min(_LONGEST_PAUSE_SECONDS, 2 * last.pause if last else _FIRST_PAUSE_SECONDS)
                self._failures[download.key] = _Failure(download.error, time.monotonic() + pause, pause)
                _log.warning("the download of %s failed: %s", download.place, download.error)
                if self._lease is not None:
                    self._lease.release(download.key)

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("the server ends", hint="ask again when it runs")

    # -- keeping ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def hold(self, snapshot: Snapshot) -> Iterator[None]:
        """Keep a version from being removed in the ``with`` block, and for some minutes after it."""
        with self._lock:
            self._held[snapshot.key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[snapshot.key] -= 1
                if not self._held[snapshot.key]:
                    del self._held[snapshot.key]
            self.touch(snapshot)

    def touch(self, snapshot: Snapshot) -> None:
        """Note that a version is read now."""
        with self._lock:
            before = self._used.get(snapshot.key, 0.0)
            self._used[snapshot.key] = now = time.time()
        if now - before > 1 and snapshot.complete:
            with contextlib.suppress(OSError):
                os.utime(record_path(self.directory, snapshot.key))

    def sent(self, nbytes: int) -> None:
        """Note that readers got bytes."""
        with self._lock:
            self._counts["sent_bytes"] += nbytes

    def in_use(self, key: str) -> bool:
        """Whether somebody reads a version, or has a moment ago."""
        with self._lock:
            if key in self._held or key in self._downloads:
                return True
            read = self._used.get(key)
            return read is not None and time.time() - read < _IN_USE_SECONDS

    def snapshots(self) -> Sequence[tuple[Snapshot, float]]:
        """All versions, complete or arriving, and how many seconds ago each was read; the latest first."""
        now = time.time()
        with self._lock:
            complete = [
                (self._snapshot(record=record), max(0.0, now - self._used[key]))
                for key, record in self._records.items()
            ]
            arriving = [(self._snapshot(download=download), 0.0) for download in self._downloads.values()]
        return sorted([*arriving, *complete], key=lambda each: each[1])

    def _forget(self, snapshot: Snapshot) -> None:
        """Drop a version whose files are not those any more that were verified."""
        with self._publishing:
            with self._lock:
                record = self._records.get(snapshot.key)
                if record is None or record != snapshot.record:  # it was downloaded again since
                    return
                self._drop([record])
            _log.warning("%s at %s was changed on disk, and is forgotten", record.place, record.version[:12])
            for stored in record.files:  # a changed file must not be taken for a known one again
                path = os.path.join(self.directory, stored.blob)
                with contextlib.suppress(OSError):
                    found = os.stat(path)
                    if not any(each.is_unchanged(found) for each in (stored, *self._stored(stored.blob))):
                        os.unlink(path)
            self._put_back([record])

    def _drop(self, records: Sequence[Record]) -> None:
        """Forget versions; the lock is held."""
        for record in records:
            del self._records[record.key]
            self._used.pop(record.key, None)
            with contextlib.suppress(OSError):
                os.unlink(record_path(self.directory, record.key))

    def _put_back(self, dropped: Sequence[Record]) -> None:
        """Keep what is right of versions that were dropped for their next downloads."""
        with self._lock:
            others = list(self._records.values())
        for record in dropped:
            put_back(self.directory, record)
        for record in dropped:
            if record.directory.startswith(f"{OWN}/"):  # other programs use the rest of the Hub's
                remove_files(self.directory, record, others)

    def remove(self, snapshot: Snapshot) -> int:
        """Remove a version; returns the bytes that were freed. Files that other versions share stay.

        Raises:
            ModelExpressError: It is being downloaded.
        """
        with self._publishing, self._lock:
            if snapshot.key in self._downloads:
                message = f"{snapshot.place} at {snapshot.version[:12]} is being downloaded"
                raise ModelExpressError(message, hint="wait for the end of the download")
            record = self._records.pop(snapshot.key, None)
            self._used.pop(snapshot.key, None)
            if record is None:
                return 0
            with local_errors(self.directory, "remove a model from"), contextlib.suppress(FileNotFoundError):
                os.unlink(record_path(self.directory, record.key))
            others = list(self._records.values())
            freed = remove_files(self.directory, record, others)
        if self._lease is not None:
            self._lease.release(record.key)
        return freed

    # -- validating and importing -------------------------------------------------------------------------------------

    def validate(
        self, snapshot: Snapshot, on_progress: Callable[[int], None] = lambda _bytes: None
    ) -> Sequence[Damage]:
        """Read all files of a version, and compare them with the digests of its storage and of its chunk manifest.

        A version with a damaged file is forgotten: it is downloaded again when it is asked for.

        Args:
            snapshot: A complete version.
            on_progress: Called with the bytes that were compared so far; an exception in it ends the comparison.

        Returns:
            The damaged files.
        """
        # Without its function for damage: all files are compared before it is forgotten.
        compared = Snapshot(self.directory, record=snapshot.record) if snapshot.record is not None else snapshot
        with self.hold(snapshot):
            damaged = validate(compared, on_progress)
        if damaged:
            self._forget_damaged(snapshot, {each.path for each in damaged})
        return damaged

    def _forget_damaged(self, snapshot: Snapshot, paths: AbstractSet[str]) -> None:
        """Remove damaged files of a version, and drop all versions that share them."""
        record = snapshot.record
        assert record is not None  # noqa: S101 - for the type checker: only complete versions are validated
        damaged = {(stored.blob, stored.inode) for stored in record.files if stored.file.path in paths}
        with self._publishing:
            with self._lock:
                dropped = [
                    each
                    for each in self._records.values()
                    if any((stored.blob, stored.inode) in damaged for stored in each.files)
                ]
                self._drop(dropped)
            for each in dropped:
                _log.warning("%s at %s is damaged on disk, and is forgotten", each.place, each.version[:12])
            for blob, _ in damaged:
                path = os.path.join(self.directory, blob)
                with contextlib.suppress(OSError):
                    found = os.stat(path)
                    if not any(each.is_unchanged(found) for each in self._stored(blob)):
                        os.unlink(path)
            self._put_back(dropped)

    def import_directory(
        self,
        directory: str | os.PathLike[str],
        path: str,
        *,
        revision: str | None = None,
        on_begin: Callable[[Snapshot], None] = lambda _snapshot: None,
    ) -> Snapshot:
        """Fill the cache from a directory, as if the model had been downloaded from its storage.

        Args:
            directory: Has the files of the model under their names.
            path: The path of an ``mx`` URI, which names the model.
            revision: For the Hub: the commit that the files are of. A directory of the Hub's own cache has it in its
                name, and one that ``hf download --local-dir`` filled in its notes.
            on_begin: Called with the version once its files are known.

        Raises:
            IntegrityError: A file is not the one that the Hub published.
            ModelExpressError: The directory cannot be read, or it is unknown which commit it has.
        """
        place = self.place(path)
        files, version = described(os.path.abspath(os.path.expanduser(os.fspath(directory))), place, revision)
        with self._lock:
            found = self._find(place, version, weights=True)
        if found is not None and found.complete:
            return found
        uri = ModelURI("file", path=os.path.abspath(os.path.expanduser(os.fspath(directory))))
        pull = Pull(self.loader, uri, self.directory, disk=self._disk)
        try:
            pull.select()
        except BaseException:
            pull.close()
            raise
        named = "" if revision is None or revision == version else revision
        snapshot = self._download(place, named, version, files, pull, weights=True)
        on_begin(snapshot)
        while not snapshot.wait(1.0):
            pass
        damaged = self.validate(snapshot)
        if damaged:
            raise SourceChangedError(
                f"{damaged[0].path!r} was changed while it was imported: {damaged[0].reason}",
                uri=str(uri),
                hint="import the directory again when nothing writes to it",
            )
        return snapshot

    # -- limits -------------------------------------------------------------------------------------------------------

    def _check_owner(self, download: Download) -> None:
        """Raise unless the owner of a download, which is in the list of downloads, is within its limit.

        Raises:
            AccessDeniedError: It is not.
        """
        limit = self.settings.max_caller_bytes
        if limit is None or not download.owner:
            return
        with self._lock:
            complete = sum(each.size_bytes for each in self._records.values() if each.owner == download.owner)
            arriving = [each.files for each in self._downloads.values() if each.owner == download.owner]
        used = complete + sum(file.size for files in arriving for file in files)
        if used > limit:
            raise _OwnerLimitError(
                f"{download.owner!r} would have {format_bytes(used)} in the cache with {download.place}",
                cause=f"MX_CACHE_MAX_CALLER_BYTES is {format_bytes(limit)}",
                hint="have the server's operator raise it, or remove models",
            )

    def _make_room(self, nbytes: int, download: Download) -> None:
        """Remove versions until ``nbytes`` fit, the ones first that were read least recently.

        Raises:
            ModelExpressError: They do not fit.
        """
        limit = self.settings.max_bytes
        if limit is not None and nbytes > limit:
            raise ModelExpressError(
                f"{download.place} has {format_bytes(nbytes)}, more than the whole cache may hold",
                cause=f"MX_CACHE_MAX_BYTES is {format_bytes(limit)}",
                hint="raise MX_CACHE_MAX_BYTES",
            )
        needed = max(0, nbytes - leftovers.disk_bytes(download.directory))
        self.evict(needed)
        free, reserve = self.free_bytes(), self.settings.min_free_bytes
        if free < needed + reserve:
            raise ModelExpressError(
                f"{download.place} needs {format_bytes(needed)} more on the disk, and {format_bytes(free)} are free",
                cause=f"{format_bytes(reserve)} stay free (MX_CACHE_MIN_FREE_BYTES), and what else is in the cache is "
                "being read, or was a moment ago",
                hint="free space, choose a larger disk, or lower MX_CACHE_MIN_FREE_BYTES",
            )
        if limit is not None and self.size_bytes() > limit:
            raise ModelExpressError(
                f"there is no room for {download.place} ({format_bytes(nbytes)}) in the cache",
                cause="all models in it are being read, or were a moment ago",
                hint="raise MX_CACHE_MAX_BYTES, or try again later",
            )

    def evict(self, incoming_bytes: int = 0) -> int:
        """Remove abandoned downloads and versions until the limits hold; returns how many versions were removed.

        Args:
            incoming_bytes: Bytes that downloads under way still need on the disk.
        """
        removed = 0
        idle = self.settings.max_idle_seconds
        for path, seconds in leftovers.abandoned(self.directory, self._active()):
            if seconds > min(idle or math.inf, _ABANDONED_SECONDS) or self._over_limits(incoming_bytes):
                leftovers.remove(path)
        for snapshot, seconds in sorted(self.snapshots(), key=lambda each: -each[1]):
            too_old = idle is not None and seconds > idle
            if not (too_old or self._over_limits(incoming_bytes)):
                break
            if self.in_use(snapshot.key) or not snapshot.complete:
                continue
            freed = self.remove(snapshot)
            removed += 1
            self._count("evictions")
            _log.info(
                "removed %s at %s to keep the limits: %s, not read for %.0f s",
                snapshot.place,
                snapshot.version[:12],
                format_bytes(freed),
                seconds,
            )
        return removed

    def _over_limits(self, incoming_bytes: int) -> bool:
        limit = self.settings.max_bytes
        if limit is not None and self.size_bytes() > limit:
            return True
        return self.free_bytes() < incoming_bytes + self.settings.min_free_bytes

    def size_bytes(self) -> int:
        """Bytes of complete versions, of what arrives and of ended downloads; what several share counts once."""
        abandoned = sum(leftovers.disk_bytes(path) for path, _ in leftovers.abandoned(self.directory, self._active()))
        with self._lock:
            blobs = {stored.blob: stored.file.size for each in self._records.values() for stored in each.files}
            arriving = sum(file.size for download in self._downloads.values() for file in download.files)
        return sum(blobs.values()) + arriving + abandoned

    def _active(self) -> AbstractSet[str]:
        """The keys of the downloads under way."""
        with self._lock:
            return set(self._downloads)

    def free_bytes(self) -> int:
        """Free bytes of the disk."""
        with local_errors(self.directory, "ask for the free space of"):
            found = os.statvfs(self.directory)
        # Some network file systems report nothing.
        return found.f_bavail * found.f_frsize if found.f_blocks else _UNKNOWN_FREE_BYTES

    def stats(self) -> CacheStats:
        """What the cache holds, and did since it was opened."""
        with self._lock:
            counts, models, downloads = Counter(self._counts), len(self._records), len(self._downloads)
        return CacheStats(
            directory=self.directory,
            models=models,
            size_bytes=self.size_bytes(),
            limit_bytes=self.settings.max_bytes,
            free_bytes=self.free_bytes(),
            hits=counts["hits"],
            misses=counts["misses"],
            origin_bytes=counts["origin_bytes"],
            replica_bytes=counts["replica_bytes"],
            sent_bytes=counts["sent_bytes"],
            evictions=counts["evictions"],
            downloads=downloads,
            failures=counts["failures"],
        )

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1


def _patterns(settings: CacheSettings, environ: Mapping[str, str]) -> tuple[str, ...]:
    model = environ.get("MX_MODEL_URI", "")
    if "://" not in model:
        return settings.sources
    uri = ModelURI.parse(model)
    return (*settings.sources, str(ModelURI(uri.scheme, uri.authority, uri.path)))


def _pinned(revision: str | None) -> str | None:
    """The version that a revision names by itself: a commit."""
    return revision if revision and is_commit(revision) else None
