"""Metadata in custom resources of Kubernetes, which many servers share and which outlives them.

Lists are answered from an index that watches keep, a source is read from the API server, and each write names the
version that it replaces. Heartbeats are kept in this server and written together, every third of the time-out of
heartbeats: if a server is killed, the workers that it heard last look older by so much, until their next heartbeat
comes to another one.

A quota counts what this server knows and what it is about to write: what other servers are writing at the same moment
comes in a moment later. Who deletes objects by hand deletes sources, which come back with the next heartbeats of their
workers, and leases, whose tokens begin with the wall clock's time and so still grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from modelexpress_core.contracts.metadata_store import (
    LeaderLease,
    Listing,
    NotPublisherError,
    Quota,
    Reaped,
    SourceQuery,
    SourceRecord,
    SourceStatus,
    StoredSource,
    StoreFullError,
    StoreUnavailableError,
    UnreadableRecordError,
)
from modelexpress_core.errors import InvalidURIError
from modelexpress_core.server.clock import Clock
from modelexpress_core.server.deadlines import time_out
from modelexpress_core.server.pacing import Pacer
from modelexpress_core.settings import from_env
from mx_kubernetes._client import APPLY, MERGE, Kubernetes, Object, in_background
from mx_kubernetes._errors import ApiError
from mx_kubernetes._heartbeats import HeartbeatWriter
from mx_kubernetes._index import Entry, Index
from mx_kubernetes._leases import Leases
from mx_kubernetes._objects import (
    MANAGER,
    UNREADABLE,
    Content,
    SourceObject,
    content_manifest,
    joined,
    name_of,
    packed,
    parts_of,
    read_source,
    references_to,
    source_manifest,
    status_of,
    unpacked,
)
from mx_kubernetes._view import View, path_of
from mx_kubernetes.settings import StoreSettings

if TYPE_CHECKING:
    from modelexpress_core.uri import ModelURI

__all__ = ["KubernetesStore", "open_kubernetes"]

_log = logging.getLogger(__name__)

#: Requests of all calls that are under way; further ones wait, no longer than this.
_REQUESTS = 32
_TURN_SECONDS = 30.0

#: Times that a call looks again after another server was faster.
_TRIES = 5

#: How long the end waits for parts to be removed.
_CLOSE_SECONDS = 2.0

#: Objects that the reaper changes at once.
_REAPED_AT_ONCE = 8

#: Bytes of publications that are kept for the next caller who asks for them.
_KEPT_BYTES = 32 << 20

#: Publications of more bytes are packed in a thread.
_LARGE_BYTES = 256 << 10

#: Parts that no source names are removed after so long: their server was killed between two writes.
_ORPHAN_SECONDS = 900.0
_SWEEP_SECONDS = 600.0

_METADATA_ALONE = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


def open_kubernetes(uri: ModelURI, settings: Mapping[str, str]) -> KubernetesStore:
    """The store at ``kubernetes://[namespace]``; by default that of the pod, or of the kubeconfig's context.

    Raises:
        InvalidURIError: The URI has more than a namespace.
        SettingsError: No API server is known.
    """
    if uri.path.strip("/") or uri.query or uri.userinfo:
        message = f"{uri} has more than a namespace"
        raise InvalidURIError(message, hint="write kubernetes://namespace, or kubernetes:// for the server's own one")
    wanted = from_env(StoreSettings, settings)
    return KubernetesStore(
        Kubernetes(settings),
        uri.authority,
        max_staleness_seconds=wanted.max_staleness_seconds,
        heartbeat_seconds=min(30.0, wanted.heartbeat_timeout_seconds / 3),
    )


class _Opened:
    """What a store has once it is open."""

    def __init__(
        self, api: Kubernetes, index: Index, namespace: str, max_staleness_seconds: float, heartbeat_seconds: float
    ) -> None:
        replica = secrets.token_hex(8)
        self.namespace = namespace
        self.view = View(api, index, namespace, replica, max_staleness_seconds)
        self.heartbeats = HeartbeatWriter(api, index, namespace, replica, heartbeat_seconds)
        self.leases = Leases(api, namespace)


class KubernetesStore:
    """Sources in the custom resources of one namespace. It is used within one event loop.

    Args:
        api: The API server.
        namespace: The namespace; empty for that of the pod or the kubeconfig.
        max_staleness_seconds: Nothing is answered from what has not been confirmed for so long.
        heartbeat_seconds: How often heartbeats are written.
        clock: The clock.
    """

    def __init__(
        self,
        api: Kubernetes,
        namespace: str = "",
        *,
        max_staleness_seconds: float = 30.0,
        heartbeat_seconds: float = 30.0,
        clock: Clock | None = None,
    ) -> None:
        self._api = api
        self._given_namespace = namespace
        self._max_staleness_seconds = max_staleness_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._index = Index(clock or Clock())
        self._opening = asyncio.Lock()
        self._opened: _Opened | None = None
        self._turns = asyncio.Semaphore(_REQUESTS)
        self._pending: dict[object, tuple[str, str, int]] = {}  # what is being published: name, owner, bytes
        self._kept: OrderedDict[str, tuple[bytes, bytes, bytes]] = OrderedDict()  # by digest
        self._kept_bytes = 0
        self._swept_at = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()

    # -- calls ---------------------------------------------------------------------------------------------------------

    async def publish(self, source: StoredSource, quota: Quota | None = None) -> None:
        """Store ``source``, with the present time, in place of any record with the same ids."""
        async with self._asked(fresh=True) as opened, self._turn():
            record = source.record
            name = name_of(record.source_id, record.worker_id)
            entry = self._index.get(name)
            before = None if entry is None else entry.source
            _check_publisher(before, record)
            with self._reserved(name, source, quota, before):
                references = references_to(source.pod, opened.namespace)
                is_large = len(source.worker) + len(source.identity) > _LARGE_BYTES
                data = await asyncio.to_thread(packed, source) if is_large else packed(source)
                content, pieces = parts_of(name, secrets.token_hex(5), data)
                for part, piece in zip(content.parts, pieces, strict=True):
                    await self._create_part(opened, content_manifest(part, piece, references))
                owner = "" if quota is None else quota.owner
                manifest = source_manifest(source, self._index.clock.wall_ms(), owner, content, references)
                try:
                    replaced = await self._write_source(opened, manifest, before, record)
                except (NotPublisherError, StoreFullError):
                    self._delete_later(opened, content)
                    raise
            if replaced is not None:
                self._delete_later(opened, replaced)

    async def get(self, source_id: str, worker_id: str) -> StoredSource | None:
        """The source with these ids; None if there is none."""
        async with self._asked(fresh=True) as opened:
            name = name_of(source_id, worker_id)
            if self._index.is_unreadable(name):
                raise UnreadableRecordError(source_id, worker_id)
            entry = self._index.get(name)
            for _ in range(_TRIES):
                if entry is None:
                    return None
                source = entry.source
                try:
                    identity, worker, grant_key = await self._content(opened, source.content)
                except UNREADABLE as exc:
                    # Another server may have replaced it since the watch brought it here.
                    entry = await self._look_again(opened, name)
                    if entry is not None and entry.source.content == source.content:
                        raise UnreadableRecordError(source_id, worker_id) from exc
                    continue
                clock = self._index.clock
                offset = clock.offset_ms()
                as_of_ms = int(clock.now_ms() + offset)
                return StoredSource(entry.record(offset), identity, worker, as_of_ms, grant_key)
            message = f"Kubernetes: the source {name} changes at each look"
            raise StoreUnavailableError(message)

    async def list(self, query: SourceQuery) -> Listing:
        """The sources that match ``query``."""
        async with self._asked(fresh=True):
            clock = self._index.clock
            offset = clock.offset_ms()
            records = []
            pacer = Pacer()
            for name in self._index.names(query):
                await pacer.pause()
                entry = self._index.get(name)  # None: removed meanwhile
                if entry is None:
                    continue
                record = entry.source.record
                if (query.model_name is None or record.model_name == query.model_name) and (
                    query.status is None or record.status == query.status
                ):
                    records.append(entry.record(offset))
            return Listing(records, int(clock.now_ms() + offset), self._index.unreadable(query))

    async def update(
        self, source_id: str, worker_id: str, status: int, source_load: float | None, publisher: str
    ) -> bool:
        """Set the state, the time and the load of a source; whether there is such a source."""
        async with self._asked(fresh=True) as opened:
            overdue = opened.heartbeats.overdue_seconds()
            if overdue:
                message = f"Kubernetes: heartbeats have not been written for {overdue:.0f} s"
                raise StoreUnavailableError(message)
            entry = self._index.get(name_of(source_id, worker_id))
            for _ in range(_TRIES):
                if entry is None:
                    return False
                if entry.source.record.publisher not in {"", publisher}:
                    raise NotPublisherError(worker_id)
                if entry.source.record.status == status:
                    self._index.beat(entry, source_load)
                    opened.heartbeats.note(entry)
                    return True
                load = entry.load if source_load is None else source_load
                async with self._turn():
                    if await self._set_status(opened, entry, status, self._index.clock.wall_ms(), load):
                        return True
                    entry = await self._look_again(opened, entry.source.name)
            message = f"Kubernetes: the source of worker {worker_id!r} changes at each try"
            raise StoreUnavailableError(message)

    async def reap(self, stale_after_seconds: float, removed_after_seconds: float) -> Reaped:
        """Mark silent sources as stale, and remove stale sources that have been silent for longer.

        For a while after the API server did not answer, none is marked: other servers may have heartbeats to write.
        """
        async with self._asked(fresh=True) as opened:
            quiet = time.monotonic() - opened.view.troubled_at
            if quiet < min(stale_after_seconds, removed_after_seconds, 2 * self._heartbeat_seconds):
                return Reaped()
            now = self._index.clock.now_ms()
            silent, gone = [], []
            for entry in self._index.entries():
                age_seconds = (now - entry.spoke_ms) / 1000
                if entry.source.record.status == SourceStatus.STALE:
                    if age_seconds >= removed_after_seconds:
                        gone.append(entry)
                elif age_seconds >= stale_after_seconds:
                    silent.append(entry)
            removed = await _each(gone, lambda entry: self._remove(opened, entry))
            stale = await _each(silent, lambda entry: self._mark_stale(opened, entry))
            if stale == len(silent):
                await self._remove_old_heartbeats(opened, now - stale_after_seconds * 1000)
            if time.monotonic() - self._swept_at > _SWEEP_SECONDS:
                self._swept_at = time.monotonic()
                await self._sweep(opened)
            return Reaped(stale, removed)

    async def counts(self) -> Mapping[int, int]:
        """The number of sources in each state."""
        async with self._asked(fresh=True):
            return self._index.counts()

    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        """Take or renew the lease of ``role``; None if another holder has it."""
        async with self._asked() as opened:
            return await opened.leases.lead(role, holder, seconds)

    async def leader(self, role: str) -> LeaderLease | None:
        """The lease of the last one that had ``role``; None if nobody had it."""
        async with self._asked() as opened:
            return await opened.leases.leader(role)

    async def check(self) -> None:
        """Return if the API server answers, and what is known of it is fresh."""
        async with self._asked(fresh=True) as opened:
            await opened.view.probe()

    async def close(self) -> None:
        """Write the last heartbeats, and close the connections."""
        if self._tasks:
            _, waiting = await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        if self._opened is not None:
            await self._opened.heartbeats.close()
            await self._opened.view.close()
            self._opened = None
        await self._api.close()

    # -- one call ------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _asked(self, *, fresh: bool = False) -> AsyncIterator[_Opened]:
        """Open the store if it is not, and raise what the API server refuses as ``StoreUnavailableError``."""
        try:
            async with self._opening:
                if self._opened is None:
                    self._opened = await self._open()
            opened = self._opened
            if fresh:
                await opened.view.fresh()
            yield opened
        except ApiError as exc:
            raise StoreUnavailableError(str(exc)) from exc

    async def _open(self) -> _Opened:
        namespace = self._given_namespace or await self._api.namespace()
        opened = _Opened(self._api, self._index, namespace, self._max_staleness_seconds, self._heartbeat_seconds)
        opened.view.start()
        opened.heartbeats.start()
        return opened

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Let some calls at a time make requests: a thousand workers may publish at once.

        Raises:
            StoreUnavailableError: Those before it take too long.
        """
        seconds = time_out(_TURN_SECONDS)
        try:
            await asyncio.wait_for(self._turns.acquire(), seconds)
        except asyncio.TimeoutError as exc:
            message = f"Kubernetes: other requests to the API server have taken {seconds:.1f} s"
            raise StoreUnavailableError(message) from exc
        try:
            yield
        finally:
            self._turns.release()

    def _delete_later(self, opened: _Opened, content: Content) -> None:
        """Delete parts after the answer; what fails is swept up later."""

        async def deleting() -> None:
            with contextlib.suppress(ApiError, StoreUnavailableError):
                async with self._turn():
                    await self._delete_parts(opened, content)

        task = in_background(deleting())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @contextlib.contextmanager
    def _reserved(
        self, name: str, source: StoredSource, quota: Quota | None, before: SourceObject | None
    ) -> Iterator[None]:
        """Count ``source`` while it is being written.

        Raises:
            StoreFullError: The quota would be exceeded.
        """
        size, owner = source.size_bytes, "" if quota is None else quota.owner
        if quota is not None:
            waiting = [each for each in self._pending.values() if each[0] != name]
            freed = before.size_bytes if before is not None else 0
            freed_of_owner = freed if before is not None and before.owner == owner else 0
            of_owner = self._index.owner_bytes[owner] + sum(each[2] for each in waiting if each[1] == owner)
            in_all = self._index.total_bytes + sum(each[2] for each in waiting)
            if of_owner - freed_of_owner + size > quota.owner_bytes:
                raise StoreFullError(of_owner=True)
            if in_all - freed + size > quota.total_bytes:
                raise StoreFullError(of_owner=False)
        key = object()
        self._pending[key] = (name, owner, size)
        try:
            yield
        finally:
            del self._pending[key]

    # -- objects -------------------------------------------------------------------------------------------------------

    async def _create_part(self, opened: _Opened, manifest: Object) -> None:
        try:
            await self._api.request(
                "POST",
                path_of(opened.namespace, "modelsourcecontents"),
                operation=f"create modelsourcecontents in the namespace {opened.namespace}",
                query={"fieldManager": MANAGER},
                body=manifest,
            )
        except ApiError as exc:
            if exc.status != 409:  # the first try arrived, and its answer was lost
                raise

    async def _write_source(
        self, opened: _Opened, manifest: Object, before: SourceObject | None, record: SourceRecord
    ) -> Content | None:
        """Create the object, or replace ``before``; returns the content that it named before.

        Raises:
            NotPublisherError: Another publisher was faster.
        """
        name = manifest["metadata"]["name"]
        uid, version = (before.uid, before.version) if before is not None else ("", "")
        for _ in range(_TRIES):
            try:
                written = await (self._apply(opened, manifest, uid, version) if uid else self._create(opened, manifest))
            except ApiError as exc:
                if exc.status not in {404, 409}:
                    raise
                found = await self._read(opened, "modelsources", name)
                uid, version, before = "", "", None
                if found is not None:
                    metadata = found["metadata"]
                    uid, version = str(metadata["uid"]), str(metadata["resourceVersion"])
                    before = self._readable(found)
                    _check_publisher(before, record)
                    if before is None and _publisher_of(found) not in {"", record.publisher}:
                        raise NotPublisherError(record.worker_id) from exc
                continue
            source = read_source(written)
            self._index.put(source)
            return before.content if before is not None and before.content != source.content else None
        message = f"Kubernetes: the source of worker {record.worker_id!r} changes at each try"
        raise StoreUnavailableError(message)

    async def _create(self, opened: _Opened, manifest: Object) -> Object:
        return await self._api.request(
            "POST",
            path_of(opened.namespace, "modelsources"),
            operation=f"create modelsources in the namespace {opened.namespace}",
            query={"fieldManager": MANAGER},
            body=manifest,
        )

    async def _apply(self, opened: _Opened, manifest: Object, uid: str, version: str) -> Object:
        """Apply ``manifest`` in place of one version of the object; labels and annotations of others stay."""
        metadata = {**manifest["metadata"], "uid": uid, "resourceVersion": version}
        return await self._api.request(
            "PATCH",
            path_of(opened.namespace, "modelsources", metadata["name"]),
            operation=f"apply modelsources in the namespace {opened.namespace}",
            query={"fieldManager": MANAGER, "force": "true"},
            body={**manifest, "metadata": metadata},
            content_type=APPLY,
        )

    async def _set_status(
        self, opened: _Opened, entry: Entry, status: int, updated_at_ms: int, load: float | None
    ) -> bool:
        """Write the state of a source; whether it was still the version that ``entry`` has."""
        written = {"load": None, **status_of(status, updated_at_ms, load)}
        try:
            changed = await self._api.request(
                "PATCH",
                path_of(opened.namespace, "modelsources", entry.source.name),
                operation=f"patch modelsources in the namespace {opened.namespace}",
                query={"fieldManager": MANAGER},
                body={
                    "metadata": {"uid": entry.source.uid, "resourceVersion": entry.source.version},
                    "status": written,
                },
                content_type=MERGE,
            )
        except ApiError as exc:
            if exc.status not in {404, 409}:
                raise
            return False
        self._index.put(read_source(changed))
        return True

    async def _read(self, opened: _Opened, plural: str, name: str) -> Object | None:
        """An object; None if there is none of that name."""
        try:
            return await self._api.request(
                "GET",
                path_of(opened.namespace, plural, name),
                operation=f"get {plural} in the namespace {opened.namespace}",
            )
        except ApiError as exc:
            if exc.status != 404:
                raise
            return None

    def _readable(self, manifest: Object) -> SourceObject | None:
        """The source in ``manifest``, which the index takes over; None if it cannot be read."""
        try:
            source = read_source(manifest)
        except UNREADABLE:
            return None
        self._index.put(source)
        return source

    async def _look_again(self, opened: _Opened, name: str) -> Entry | None:
        """What the API server has under ``name`` now."""
        found = await self._read(opened, "modelsources", name)
        if found is None:
            entry = self._index.get(name)
            if entry is not None:
                self._index.deleted(name, entry.source.uid)
            return None
        self._readable(found)
        return self._index.get(name)

    async def _content(self, opened: _Opened, content: Content) -> tuple[bytes, bytes, bytes]:
        """Identity, metadata and key of a source.

        Raises:
            Exception: One of ``UNREADABLE``: its parts are gone, or are others.
        """
        kept = self._kept.get(content.sha256)
        if kept is not None:
            self._kept.move_to_end(content.sha256)
            return kept
        async with self._turn():
            parts = [await self._part(opened, part) for part in content.parts]
        fields = unpacked(joined(content, parts))
        if content.sha256 not in self._kept:
            self._kept[content.sha256] = fields
            self._kept_bytes += sum(map(len, fields))
            while self._kept_bytes > _KEPT_BYTES:
                _, forgotten = self._kept.popitem(last=False)
                self._kept_bytes -= sum(map(len, forgotten))
        return fields

    async def _part(self, opened: _Opened, name: str) -> Object:
        part = await self._read(opened, "modelsourcecontents", name)
        if part is None:
            raise LookupError(name)
        return part

    async def _delete_parts(self, opened: _Opened, content: Content) -> None:
        for name in content.parts:
            await self._delete_part(opened, name)

    async def _delete_part(self, opened: _Opened, name: str) -> None:
        try:
            await self._api.request(
                "DELETE",
                path_of(opened.namespace, "modelsourcecontents", name),
                operation=f"delete modelsourcecontents in the namespace {opened.namespace}",
            )
        except ApiError as exc:
            if exc.status != 404:
                raise

    # -- the reaper ----------------------------------------------------------------------------------------------------

    async def _mark_stale(self, opened: _Opened, entry: Entry) -> bool:
        before, status = entry.spoke_ms, entry.source.record.status
        updated_at_ms = int(entry.spoke_ms + self._index.clock.offset_ms())
        done = await self._set_status(opened, entry, SourceStatus.STALE, updated_at_ms, entry.load)
        if done and entry.spoke_ms > before:  # a heartbeat came meanwhile
            await self._set_status(opened, entry, status, self._index.clock.wall_ms(), entry.load)
            return False
        return done

    async def _remove(self, opened: _Opened, entry: Entry) -> bool:
        source = entry.source
        try:
            await self._api.request(
                "DELETE",
                path_of(opened.namespace, "modelsources", source.name),
                operation=f"delete modelsources in the namespace {opened.namespace}",
                body={"preconditions": {"uid": source.uid, "resourceVersion": source.version}},
            )
        except ApiError as exc:
            if exc.status not in {404, 409}:
                raise
            return False
        self._index.deleted_here(source)
        await self._delete_parts(opened, source.content)
        return True

    async def _remove_old_heartbeats(self, opened: _Opened, before_ms: float) -> None:
        """Remove what servers wrote that are gone: all of it is in the sources that were marked, or is superseded."""
        for name, each in [*opened.view.heartbeats.items()]:
            if each.written_ms < before_ms:
                try:
                    await self._api.request(
                        "DELETE",
                        path_of(opened.namespace, "sourceheartbeats", name),
                        operation=f"delete sourceheartbeats in the namespace {opened.namespace}",
                        body={"preconditions": {"resourceVersion": each.version}},
                    )
                except ApiError as exc:
                    if exc.status not in {404, 409}:
                        raise

    async def _sweep(self, opened: _Opened) -> None:
        """Remove parts of publications that were never completed, and leases that nobody renews."""
        known = {part for entry in self._index.entries() for part in entry.source.content.parts}
        before = time.time() - _ORPHAN_SECONDS
        query: dict[str, str | int] = {"limit": 500}
        while True:
            page = await self._api.request(
                "GET",
                path_of(opened.namespace, "modelsourcecontents"),
                operation=f"list modelsourcecontents in the namespace {opened.namespace}",
                query=query,
                accept=_METADATA_ALONE,
            )
            for item in page.get("items") or ():
                name = item["metadata"]["name"]
                source = name.partition("-")[0]
                if name not in known and not self._index.is_unreadable(source) and _made_at(item) < before:
                    await self._delete_part(opened, name)
            query["continue"] = page.get("metadata", {}).get("continue") or ""
            if not query["continue"]:
                break
        await opened.leases.remove_old()


async def _each(entries: Sequence[Entry], change: Callable[[Entry], Awaitable[bool]]) -> int:
    """Call ``change`` for all entries, a few at once; returns how many were changed."""
    waiting = iter(entries)
    changed = 0

    async def changing() -> None:
        nonlocal changed
        for entry in waiting:
            done = await change(entry)
            changed += done  # read after the await, during which other tasks change it

    await asyncio.gather(*(changing() for _ in range(min(_REAPED_AT_ONCE, len(entries)))))
    return changed


def _check_publisher(before: SourceObject | None, record: SourceRecord) -> None:
    if before is not None and before.record.publisher not in {"", record.publisher}:
        raise NotPublisherError(record.worker_id)


def _publisher_of(manifest: Object) -> object:
    """The publisher in an object that cannot be read as a whole."""
    spec = manifest.get("spec")
    return spec.get("publisher", "") if isinstance(spec, dict) else ""


def _made_at(item: Object) -> float:
    """When an object was made, in seconds since 1970, by the API server's clock."""
    return dt.datetime.strptime(item["metadata"]["creationTimestamp"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
