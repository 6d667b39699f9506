"""The story of a pull: list, compare with the directory, fetch what is missing, verify, put in place.

1. **List.** Everything below the URI except hidden files. Names that no file can have are refused.
2. **Compare.** Files that are in place in this version, or with the published digest, are skipped. Of files that an
   earlier pull began, only the missing bytes are fetched. There must be space for all of them.
3. **Fetch.** The engine reads ranges of all files at once; the threads that read also write, and keep the journal.
4. **Verify.** As soon as a file is complete, it is read from the page cache and compared with the published digest,
   while others are still being fetched. A file that differs is fetched once more.
5. **Put in place.** A file is synced, then renamed: under its name it is always complete.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import cast

from attrs import evolve, frozen

from modelexpress_core.checkpoint import CheckpointFile
from modelexpress_core.contracts.candidates import Candidate
from modelexpress_core.contracts.storage import Compared, ComparingStorage, ObjectInfo
from modelexpress_core.copying.hidden_directory import HiddenDirectory, regular_size
from modelexpress_core.copying.local import Disk, digest_of, fsync_directory, local_errors
from modelexpress_core.copying.partial import Identity, Partial
from modelexpress_core.copying.selection import WEIGHT_SUFFIXES, Selection, select, with_stat
from modelexpress_core.errors import IntegrityError, ModelExpressError
from modelexpress_core.fetch import FetchEngine, ProgressReporter, Range, RetryingStorage, RetryPolicy, Segment, Ticket
from modelexpress_core.fetch.digests import best_digest
from modelexpress_core.loader import Loader
from modelexpress_core.loads.context import redacted_uris
from modelexpress_core.plugins import STORAGE, PluginManager
from modelexpress_core.providers import StorageProvider
from modelexpress_core.registry import Registered
from modelexpress_core.report import PulledFile, PullReport
from modelexpress_core.resources import starting_threads
from modelexpress_core.uri import ModelURI

__all__ = ["FileProgress", "Pull", "PullProgress", "pull"]

#: Begins a URI, perhaps with a slash that is missing.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

#: Threads that verify files and put them in place; digests are computed without the GIL.
_MAX_VERIFYING = min(4, os.cpu_count() or 1)


@frozen
class FileProgress:
    """A file that has begun and is not in place yet.

    Attributes:
        name: Path below the directory.
        bytes_done: Bytes of it that were written.
        size: Its length in bytes.
    """

    name: str
    bytes_done: int
    size: int


@frozen
class PullProgress:
    """How far a pull is.

    Attributes:
        bytes_done: Bytes that were written, in this pull or before.
        bytes: Bytes of all files.
        files_done: Files in place.
        files: Files in all.
        bytes_per_second: Bytes that arrived, over the last few seconds.
        active: Files that have begun and are not in place yet.
    """

    bytes_done: int
    bytes: int
    files_done: int
    files: int
    bytes_per_second: float
    active: Sequence[FileProgress]


def pull(
    uri: str | os.PathLike[str] | ModelURI,
    directory: str | os.PathLike[str],
    *,
    weights: bool = True,
    on_progress: Callable[[PullProgress], None] | None = None,
    environ: Mapping[str, str] | None = None,
    plugins: PluginManager | None = None,
    disk: Disk | None = None,
) -> PullReport:
    """Copy the files at ``uri`` into ``directory``, except those that are there in the same version.

    A file appears under its name when it is complete, compared with the digest that the storage publishes (if any),
    and on disk. Another call resumes a pull that ended early, for whatever reason. Files of ``directory`` that are not
    at ``uri`` are left alone. The state is in the hidden directory ``.mx-pull`` below ``directory``.

    Args:
        uri: A directory (everything below it is copied, except hidden files), or one file, as a URI or a path.
        directory: The target; made if it does not exist.
        weights: Whether files of weights are copied; without them: configuration and tokenizer.
        on_progress: Called a few times a second by fetching threads: it must be fast. An exception in it ends the pull.
        environ: Variables to read settings from; by default the process's.
        plugins: Plugins to use; by default all that are installed and allowed.
        disk: Operations of the disk, for tests that replace some of them.

    Raises:
        ResolveError: The URI leads nowhere.
        BackendError: The storage failed; IntegrityError if bytes differ from the published digest.
        CheckpointError: Names of objects cannot be names of files in one directory.
        ModelExpressError: The directory cannot be written to, has no space, or another pull is under way there.
    """
    loader = Loader(environ, plugins)
    text = os.fspath(directory)
    if not text or "\0" in text or _SCHEME.match(text):
        message = f"no directory to copy into: {text!r}"
        raise ModelExpressError(
            message, cause="URI and directory in the wrong order", hint="first the URI, then a path"
        )
    target = os.path.abspath(os.path.expanduser(text))

    def attempt(candidate: Candidate) -> PullReport:
        with Pull(loader, candidate.uri, target, weights=weights, on_progress=on_progress, disk=disk) as pull:
            return pull.run()

    return loader.first(loader.request(uri), attempt)


class _Copy:
    """One file to fetch."""

    def __init__(self, info: ObjectInfo, unfinished: Partial) -> None:
        self.name = unfinished.identity.name
        self.info = info
        self.partial = unfinished
        self.ticket = Ticket()
        self.resumed_bytes = unfinished.present_bytes
        self.wrong_digest = ""

    def ranges(self, most: int, on_written: Callable[[], None]) -> list[Range]:
        """Reads of the missing bytes, of at most ``most`` each; ``on_written`` is called after each."""

        def write(data: memoryview, offset: int) -> None:
            self.partial.write(data, offset)
            on_written()

        # The digest is computed from the file on disk, which earlier pulls may have begun, not by the engine.
        file = CheckpointFile(self.info.path, self.name, self.info.size, self.info.version, 0)
        self.ticket = Ticket()
        ranges = []
        for offset, length in self.partial.missing(most):
            segment = Segment(offset, length, self.ticket, consume=partial(write, offset=offset))
            ranges.append(Range(file, offset, length, [segment]))
        return ranges


class Pull:
    """One attempt to pull from one place, in a ``with`` block.

    Its files can be read while they arrive: ``open_file`` and ``has`` may be called in other threads.

    Args:
        loader: Settings and plugins.
        uri: A directory, or one file.
        directory: The target, as an absolute path.
        weights: Whether files of weights are copied.
        on_progress: As for ``pull``.
        on_written: Called after each write, and when files are in place or the pull ends.
        on_file: Called with the name of each file, in any thread, before it is in place, and with its path.
        disk: The disk.

    Attributes:
        selection: What is copied, once ``select`` has returned.
    """

    selection: Selection

    def __init__(
        self,
        loader: Loader,
        uri: ModelURI,
        directory: str,
        *,
        weights: bool = True,
        on_progress: Callable[[PullProgress], None] | None = None,
        on_written: Callable[[], None] = lambda: None,
        on_file: Callable[[str, str], None] = lambda _name, _path: None,
        disk: Disk | None = None,
    ) -> None:
        self._disk = disk or Disk()
        self._loader = loader
        self._uri = uri
        self._directory = directory
        self._weights = weights
        self._on_progress = on_progress
        self._on_written = on_written
        self._on_file = on_file
        self._begun = time.monotonic()
        self._verify = loader.settings.verify_digests
        self._hidden = HiddenDirectory(directory, disk=self._disk)
        self._engine: FetchEngine | None = None
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._progress = ProgressReporter(self._report_progress)
        self._unfinished: dict[str, _Copy] = {}
        self._in_place: dict[str, PulledFile] = {}
        self._resumed_bytes = 0
        self._verified: Counter[str] = Counter()
        self._begun_again: Counter[str] = Counter()
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Pull:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the storage."""
        self._opened.close()

    def into(self, directory: str, *, on_written: Callable[[], None], on_file: Callable[[str, str], None]) -> Pull:
        """This pull, into another directory and with other functions; for callers that select first."""
        self._directory = directory
        self._hidden = HiddenDirectory(directory, disk=self._disk)
        self._on_written = on_written
        self._on_file = on_file
        return self

    def like(self, loader: Loader, uri: ModelURI) -> Pull:
        """A pull from another place, into the same directory and with the same functions."""
        return Pull(
            loader,
            uri,
            self._directory,
            weights=self._weights,
            on_progress=self._on_progress,
            on_written=self._on_written,
            on_file=self._on_file,
            disk=self._disk,
        )

    def select(self) -> Selection:
        """Open the storage, and list what is copied. Nothing is written yet.

        Raises:
            ResolveError, BackendError, CheckpointError: As ``pull``.
        """
        self._registered, self._storage = self._loader.plugins.open(STORAGE, self._uri, self._loader.environ)
        self._opened.callback(self._storage.close)
        self._budget = self._loader.new_budget()
        self._retrying = RetryingStorage(
            self._storage,
            RetryPolicy.from_settings(self._loader.settings),
            self._budget,
            uri_of=redacted_uris(self._uri),
        )
        name = self._registered.provider.name
        self.selection = select(self._retrying, self._uri, weights=self._weights, provider=name)
        return self.selection

    def is_restricted(self) -> bool:
        """Whether some readers may not read what was selected, as far as its storage tells.

        Raises:
            BackendError: The storage failed.
        """
        if not self._registered.provider.capabilities.restriction:
            return False
        return self._retrying.is_restricted(self._uri.path)

    def leave_out_weights(self) -> None:
        """Copy no files of weights, of those that were selected."""
        files = self.selection.files
        light = tuple(each for each in files if not each[0].lower().endswith(WEIGHT_SUFFIXES))
        weights = self.selection.weights + len(files) - len(light)
        self.selection = evolve(self.selection, files=light, weights=weights)
        self._weights = False

    def run(self) -> PullReport:
        """Copy what was selected; select first, where that was not done."""
        if not hasattr(self, "selection"):
            self.select()
        self._check_directory()
        with self._hidden:
            copies = self._compare(self._retrying, self._registered)
            engine = FetchEngine(
                self._storage,
                self._loader.settings,
                self._registered.provider.capabilities,
                on_arrival=self._progress.arrived,
                budget=self._budget,
                uri_of=redacted_uris(self._uri),
            )
            self._engine = engine
            self._fetch(copies, engine)
            self._complete_directory()
            compares = self._registered.provider.capabilities.compares
            compared = cast("ComparingStorage", self._storage).compared() if compares else Compared()
            return self._report(self._registered, engine, compared)

    def abort(self, exc: BaseException) -> None:
        """End ``run`` in another thread, which raises ``exc``."""
        self._cancelled.set()
        engine = self._engine
        if engine is not None:
            engine.abort(exc)

    # -- reading what arrives -----------------------------------------------------------------------------------------

    def open_file(self, name: str) -> int | None:
        """A descriptor of a file, for reading; its missing bytes are holes. None if it has not begun yet.

        The descriptor stays that of the file when the file is put in place.
        """
        with self._lock:
            copy = self._unfinished.get(name)
        if copy is not None:
            try:
                return copy.partial.open()
            except FileNotFoundError:  # it was put in place just now, or it begins again
                pass
        return self._hidden.open_in_place(name) if name in self._in_place else None

    def times_begun_again(self, name: str) -> int:
        """How often a file was discarded and begun again, since its digest was wrong."""
        return self._begun_again[name]

    def has(self, name: str, start: int, end: int) -> bool:
        """Whether the bytes of a file from ``start`` to ``end`` are there."""
        with self._lock:
            if name in self._in_place:
                return True
            copy = self._unfinished.get(name)
        return copy is not None and copy.partial.covers(start, end)

    @property
    def present_bytes(self) -> int:
        """Bytes of all files that are there."""
        with self._lock:
            in_place = sum(file.size for file in self._in_place.values())
            unfinished = list(self._unfinished.values())
        return in_place + sum(copy.partial.present_bytes for copy in unfinished)

    # -- before anything is written -----------------------------------------------------------------------------------

    def _check_directory(self) -> None:
        """Raise if a file cannot be put in place, for a reason that is known before the fetch."""
        self._check_apart()
        devices = {self._directory: self._device(self._directory)}
        for name, _ in self.selection.files:
            target = self._hidden.target(name)
            with local_errors(target, "write"):
                if os.path.isdir(target):
                    raise self._in_the_way(target, "a directory")
                if os.path.lexists(target) and not (os.path.isfile(target) or os.path.islink(target)):
                    raise self._in_the_way(target, "no regular file")
                parent = os.path.dirname(target)
                if parent not in devices:
                    devices[parent] = self._device(parent)
        if len({device for device in devices.values() if device is not None}) > 1:
            message = f"{self._uri} has files for several disks, because directories below {self._directory} are mounts"
            raise ModelExpressError(message, hint="pull the files for each disk separately, or into an empty directory")

    def _check_apart(self) -> None:
        if self._uri.scheme != "file":
            return
        source = os.path.realpath(self._uri.path if self.selection.directory else os.path.dirname(self._uri.path))
        target = os.path.realpath(self._directory)
        inside = self.selection.directory and os.path.commonpath([source, target]) == source
        if inside or source == target:
            message = f"{self._directory} is, or is in, the directory to copy: {source}"
            raise ModelExpressError(message, hint="pull into another directory")

    def _device(self, parent: str) -> int | None:
        """The device of a directory, or of the directory in which it will be made."""
        while not os.path.lexists(parent) and parent != os.path.dirname(self._directory):
            parent = os.path.dirname(parent)
        if not os.path.lexists(parent):
            return None
        if not os.path.isdir(parent):
            raise self._in_the_way(parent, "no directory")
        below = parent
        while len(below) > len(self._directory):
            if os.path.islink(below):
                raise self._in_the_way(below, "a link to a directory")
            below = os.path.dirname(below)
        if not os.access(parent, os.W_OK | os.X_OK):
            message = f"nothing can be written to {parent}"
            raise ModelExpressError(
                message, cause="this user may not write, or it is mounted read-only", hint="check it with ls -ld"
            )
        return os.stat(parent).st_dev

    def _in_the_way(self, path: str, what: str) -> ModelExpressError:
        message = f"{self._uri} cannot be copied into {self._directory}: {path} is there, and is {what}"
        return ModelExpressError(message, hint="move it away, or pull into another directory")

    # -- comparing with the directory ---------------------------------------------------------------------------------

    def _compare(self, storage: RetryingStorage, registered: Registered[StorageProvider]) -> list[_Copy]:
        """Skip files that are in place; returns those to fetch, with space for all of them."""
        root = str(self._uri)
        listed = dict(self.selection.files)
        wanted = {name: Identity(root, name, info.version, info.size) for name, info in listed.items()}
        for identity in wanted.values():
            entry = self._hidden.unchanged(identity)
            if entry is not None:
                self._skip(identity, entry.digest)
        changed = {name: info for name, info in listed.items() if name not in self._in_place}
        if self._verify and registered.provider.capabilities.stat_digests:
            changed = with_stat(storage, changed)
            wanted |= {name: Identity(root, name, info.version, info.size) for name, info in changed.items()}
        self._skip_equal(wanted, changed)
        everything = self._weights and self.selection.directory
        missing = [identity for name, identity in wanted.items() if name not in self._in_place]
        self._hidden.discard_superseded(wanted, missing, root=root, everything=everything)
        copies = [_Copy(changed[identity.name], self._hidden.partial(identity)) for identity in missing]
        needed = sum(max(0, copy.info.size - copy.partial.allocated_bytes) for copy in copies)
        self._disk.check_space(self._directory, needed)
        try:
            for copy in copies:
                copy.partial.reserve()
        except BaseException:
            for copy in copies:
                copy.partial.close()
            raise
        return copies

    def _skip(self, identity: Identity, digest: tuple[str, str] | None) -> None:
        self._on_file(identity.name, self._hidden.target(identity.name))
        file = PulledFile(identity.name, identity.size, identity.version, "skipped", digest)
        with self._lock:
            self._in_place[identity.name] = file

    def _skip_equal(self, wanted: Mapping[str, Identity], infos: Mapping[str, ObjectInfo]) -> None:
        """Skip files that are not in the manifest, if they have the published size and digest."""

        def compare(name: str) -> None:
            path = self._hidden.target(name)
            published = best_digest(infos[name].digests)
            if published is None or regular_size(path) != infos[name].size:
                return
            descriptor = self._hidden.open_in_place(name)
            if descriptor is None:
                return
            try:
                with local_errors(path, "read"):
                    before = os.fstat(descriptor)
                    actual = digest_of(descriptor, published[0], self._cancelled)
                    after = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            unchanged = (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)
            if actual == published[1] and unchanged and not self._cancelled.is_set():
                self._hidden.record(wanted[name], after.st_mtime_ns, published)
                self._skip(wanted[name], published)
                with self._lock:
                    self._verified[published[0]] += 1

        if not self._verify:
            return
        with self._finishers() as pool:
            for _ in pool.map(compare, infos):
                pass

    @contextlib.contextmanager
    def _finishers(self) -> Iterator[ThreadPoolExecutor]:
        """Threads that verify; they end soon when the pull ends."""
        pool = ThreadPoolExecutor(_MAX_VERIFYING, thread_name_prefix="mx-verify")
        try:
            with starting_threads("verify the files"):
                yield pool
        except BaseException:
            self._cancelled.set()
            raise
        finally:
            pool.shutdown(cancel_futures=self._cancelled.is_set())

    # -- fetching -----------------------------------------------------------------------------------------------------

    def _fetch(self, copies: list[_Copy], engine: FetchEngine) -> None:
        with self._lock:
            self._unfinished = {copy.name: copy for copy in copies}
        self._on_written()
        try:
            with self._finishers() as pool:
                wrong = self._fetch_once(copies, engine, pool)
                for copy in wrong:
                    copy.resumed_bytes = 0
                    self._begun_again[copy.name] += 1
                    copy.partial.restart()
                self._refuse(self._fetch_once(wrong, engine, pool))
            engine.finish()
        except BaseException as exc:
            stopped = engine.abort(exc)
            for copy in copies:
                copy.partial.close()
            if not stopped:
                self._hidden.keep_held()  # a thread may still write to the unfinished files
            raise
        self._progress.report_now()

    def _fetch_once(self, copies: Sequence[_Copy], engine: FetchEngine, pool: ThreadPoolExecutor) -> list[_Copy]:
        """Fetch the missing bytes of ``copies`` and put them in place; returns those with a wrong digest."""
        ranges = {copy.name: copy.ranges(engine.chunk_bytes, self._on_written) for copy in copies}
        engine.submit([[range_] for of_file in ranges.values() for range_ in of_file])
        finished: list[tuple[_Copy, Future[bool]]] = []
        for copy in copies:
            if ranges[copy.name]:
                engine.wait([copy.ticket])
            finished.append((copy, pool.submit(self._finish, copy, engine)))
        return [copy for copy, future in finished if not future.result()]

    def _finish(self, copy: _Copy, engine: FetchEngine) -> bool:
        """Verify a complete file and put it in place; False if its digest is wrong."""
        try:
            return self._verified_in_place(copy)
        except BaseException as exc:
            self._cancelled.set()
            engine.abort(exc)
            raise

    def _verified_in_place(self, copy: _Copy) -> bool:
        unfinished = copy.partial
        if not unfinished.complete or unfinished.file_bytes != copy.info.size:
            message = f"{copy.name!r} is incomplete although all its bytes arrived"
            raise ModelExpressError(message, hint="this is a bug in ModelExpress; please report it")
        published = best_digest(copy.info.digests) if self._verify else None
        if published is not None:
            with local_errors(unfinished.path, "read"):
                descriptor = unfinished.open()
                try:
                    actual = digest_of(descriptor, published[0], self._cancelled)
                finally:
                    os.close(descriptor)
            if self._cancelled.is_set():
                raise ModelExpressError("the pull has ended")
            if actual != published[1]:
                copy.wrong_digest = f"{published[0]} {actual}, not {published[1]}"
                return False
        self._on_file(copy.name, unfinished.path)
        self._hidden.publish(unfinished, published)
        file = PulledFile(
            copy.name, copy.info.size, copy.info.version, "resumed" if copy.resumed_bytes else "copied", published
        )
        with self._lock:
            if published is not None:
                self._verified[published[0]] += 1
            self._in_place[copy.name] = file
            self._resumed_bytes += copy.resumed_bytes
            del self._unfinished[copy.name]
        self._progress.arrived()
        self._on_written()
        return True

    def _refuse(self, wrong: Sequence[_Copy]) -> None:
        """Raise if files that were fetched twice are wrong; nothing of them is kept."""
        for copy in wrong:
            copy.partial.discard()
        if not wrong:
            return
        copy = wrong[0]
        raise IntegrityError(
            f"fetched twice, the bytes have the digest {copy.wrong_digest}, which the storage publishes",
            uri=str(self._uri.with_path(copy.info.path)),
            operation="verify the copy",
            cause="a cache or proxy in between returns other bytes, or the stored object is damaged",
            hint="compare with another copy of the object; MX_VERIFY_DIGESTS=0 copies it unverified",
        )

    def _complete_directory(self) -> None:
        """Sync the directories, so that names survive a loss of power, and keep only the state of later pulls."""
        directories = {self._directory, os.path.dirname(self._directory)}
        for file in self._in_place.values():
            directory = os.path.dirname(self._hidden.target(file.name))
            while file.status != "skipped" and directory not in directories:
                directories.add(directory)
                directory = os.path.dirname(directory)
        self._hidden.tidy()
        for directory in directories:
            with local_errors(directory, "sync"):
                fsync_directory(directory)

    # -- progress and report ------------------------------------------------------------------------------------------

    def _report_progress(self) -> None:
        if self._on_progress is None or self._engine is None:
            return
        with self._lock:
            in_place = list(self._in_place.values())
            unfinished = list(self._unfinished.values())
        begun = [(copy, count) for copy in unfinished if (count := copy.partial.present_bytes)]
        files = self.selection.files
        self._on_progress(
            PullProgress(
                bytes_done=sum(file.size for file in in_place) + sum(count for _, count in begun),
                bytes=sum(info.size for _, info in files),
                files_done=len(in_place),
                files=len(files),
                bytes_per_second=self._engine.ledger.rate(),
                active=tuple(FileProgress(copy.name, count, copy.info.size) for copy, count in begun),
            )
        )

    def _report(self, registered: Registered[StorageProvider], engine: FetchEngine, compared: Compared) -> PullReport:
        seconds = time.monotonic() - self._begun
        ledger = engine.ledger
        files = [self._in_place[name] for name, _ in self.selection.files]
        return PullReport(
            uri=str(self._uri),
            directory=self._directory,
            storage={"plugin": registered.plugin.name, "version": registered.plugin.version},
            files=len(files),
            bytes=sum(file.size for file in files),
            bytes_copied=ledger.arrived_bytes,
            bytes_skipped=sum(file.size for file in files if file.status == "skipped"),
            bytes_resumed=self._resumed_bytes,
            left_out={"hidden": self.selection.hidden, "weights": self.selection.weights},
            seconds=seconds,
            bytes_per_second=ledger.arrived_bytes / seconds,
            requests=ledger.requests,
            retries=ledger.retries,
            concurrency=ledger.most_in_flight,
            verified_digests=dict(self._verified),
            file_list=tuple(files),
            bytes_compared=compared.here_bytes,
            bytes_compared_by_server=compared.by_server_bytes,
            channel=compared.channel,
        )
