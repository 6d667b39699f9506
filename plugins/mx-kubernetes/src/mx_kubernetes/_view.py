"""Keeps the index by watches, and knows how fresh it is: what it cannot confirm, it does not answer from.

Two watches, of the sources and of the heartbeats that servers write, bring changes within milliseconds. They prove
little by being silent: the other end may be gone, or frozen. Therefore the API server is asked to end each watch after
some seconds, and the next one goes on from there; and every few seconds it is asked for one source from etcd, with the
number of all. The index is as fresh as the oldest of these three signs of life.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence

from modelexpress_core.contracts.metadata_store import StoreUnavailableError
from modelexpress_core.server.deadlines import time_out
from mx_kubernetes._client import Kubernetes, Object, in_background
from mx_kubernetes._errors import ApiError
from mx_kubernetes._index import Index, version_number
from mx_kubernetes._objects import API_VERSION, UNREADABLE, read_source

__all__ = ["HeartbeatObject", "View", "path_of"]

_log = logging.getLogger(__name__)

#: Objects of a page of a list: parsing one holds up the event loop for a few milliseconds.
_PAGE = 100

#: How long the first calls wait for the first lists.
_FIRST_SECONDS = 4.0

_MAX_WAIT_SECONDS = 5.0
_LIST_SECONDS = 10.0

#: Probes in a row that count other objects than the index holds, after which all are listed again.
_MISCOUNTS = 3


def path_of(namespace: str, plural: str, name: str = "") -> str:
    """The path of our objects of one kind, or of one of them."""
    path = f"/apis/{API_VERSION}/namespaces/{namespace}/{plural}"
    return f"{path}/{name}" if name else path


class _Stream:
    """Lists the objects of one kind, and then watches them.

    Args:
        api: The API server.
        path: Path of the objects.
        what: Their name in messages.
        watch_seconds: After how many seconds the API server is to end a watch.
        listed: Called with all objects and the version of the list.
        changed: Called with each change: its type, and the object.

    Attributes:
        heard_at: When the API server last showed that the watch is alive, on the monotonic clock.
        version: Version up to which changes are known; empty before the first list.
        failure: Why it last failed; empty if it works.
    """

    def __init__(
        self,
        api: Kubernetes,
        path: str,
        what: str,
        *,
        watch_seconds: int,
        listed: Callable[[Sequence[Object], int], Awaitable[None]],
        changed: Callable[[str, Object], None],
    ) -> None:
        self._api = api
        self._path = path
        self._what = what
        self._watch_seconds = watch_seconds
        self._listed = listed
        self._changed = changed
        self.heard_at = float("-inf")
        self.version = ""
        self.failure = ""

    async def run(self) -> None:
        """List and watch until cancelled."""
        wait = 0.1
        while True:
            begun = time.monotonic()
            try:
                if not self.version:
                    await self._list()
                await self._watch()
            except ApiError as exc:
                if exc.status == 410:
                    self.version = ""  # it is too old: etcd was compacted, or the API server began anew
                else:
                    if not self.failure:
                        _log.warning("%s; trying again", exc)
                    self.failure = str(exc)
            except Exception:  # noqa: BLE001 - one object that is not understood must not end the watch for good
                _log.exception("watching %s failed", self._what)
                self.version, self.failure = "", f"watching {self._what} failed"
            else:
                self.failure = ""
            if time.monotonic() - begun > 1:
                wait = 0.1
            await asyncio.sleep(random.uniform(wait / 2, wait))  # noqa: S311 - it only spreads requests
            wait = min(2 * wait, _MAX_WAIT_SECONDS)

    async def _list(self) -> None:
        items: list[Object] = []
        query: dict[str, str | int] = {"limit": _PAGE}
        begun = time.monotonic()
        while True:
            page = await self._api.request(
                "GET", self._path, operation=f"list {self._what}", query=query, seconds=_LIST_SECONDS
            )
            items += page.get("items") or ()
            metadata = page.get("metadata", {})
            if not metadata.get("continue"):
                break
            query["continue"] = metadata["continue"]
        version = str(metadata.get("resourceVersion", ""))
        self.heard_at, self.version = begun, version
        await self._listed(items, version_number(version))

    async def _watch(self) -> None:
        events = self._api.watch(
            self._path, operation=f"watch {self._what}", version=self.version, seconds=self._watch_seconds
        )
        async for event in events:
            self.heard_at = time.monotonic()
            if event is None:
                continue
            item = event.get("object") or {}
            if event.get("type") != "BOOKMARK":
                self._changed(str(event.get("type")), item)
            version = item.get("metadata", {}).get("resourceVersion")
            if isinstance(version, str):
                self.version = version
        self.heard_at = time.monotonic()


class HeartbeatObject:
    """An object with heartbeats that another server wrote.

    Args:
        version: Its resource version.
        written_ms: When it was written, on the steady clock.
    """

    def __init__(self, version: str, written_ms: float) -> None:
        self.version = version
        self.written_ms = written_ms


class View:
    """Keeps the index.

    Args:
        api: The API server.
        index: The index.
        namespace: Where the objects are.
        replica: Beginning of the names of the heartbeats that this server writes.
        max_staleness_seconds: The index is not used if nothing has confirmed it for so long.

    Attributes:
        heartbeats: The objects with heartbeats of all servers, by name.
        troubled_at: When the API server last did not answer, on the monotonic clock; at first when this began.
    """

    def __init__(
        self, api: Kubernetes, index: Index, namespace: str, replica: str, max_staleness_seconds: float
    ) -> None:
        self._api = api
        self._index = index
        self._replica = replica
        self._namespace = namespace
        self._max_staleness_seconds = max_staleness_seconds
        watch_seconds = max(1, int(max_staleness_seconds / 3))
        self._sources = _Stream(
            api,
            path_of(namespace, "modelsources"),
            f"modelsources in the namespace {namespace}",
            watch_seconds=watch_seconds,
            listed=self._list_sources,
            changed=self._change_source,
        )
        self._beats = _Stream(
            api,
            path_of(namespace, "sourceheartbeats"),
            f"sourceheartbeats in the namespace {namespace}",
            watch_seconds=watch_seconds,
            listed=self._list_beats,
            changed=self._change_beats,
        )
        self._answered_at = float("-inf")
        self._probe_failure = ""
        self._miscounts = 0
        self.troubled_at = time.monotonic()
        self.heartbeats: dict[str, HeartbeatObject] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._ready = asyncio.Event()
        self._closing = asyncio.Event()

    def start(self) -> None:
        """Begin to list and to watch."""
        self._tasks = [in_background(task) for task in (self._sources.run(), self._beats.run(), self._keep_probing())]

    async def close(self) -> None:
        """End the watches, and the probe once it is answered."""
        self._closing.set()
        for task in self._tasks[:2]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def fresh(self) -> None:
        """Return if the index is fresh, at the beginning as soon as it is complete.

        Raises:
            StoreUnavailableError: It has not been confirmed for too long, or is not complete yet.
        """
        if not self._ready.is_set():
            try:
                await asyncio.wait_for(self._ready.wait(), time_out(_FIRST_SECONDS))
            except asyncio.TimeoutError as exc:
                reason = self._failure() or "Kubernetes: the first list of sources is not complete"
                raise StoreUnavailableError(reason) from exc
        age = self._age_seconds()
        if age > self._max_staleness_seconds:
            reason = self._failure() or "the API server does not answer"
            message = f"Kubernetes: what this server knows has not been confirmed for {age:.0f} s: {reason}"
            raise StoreUnavailableError(message)

    async def probe(self) -> None:
        """Ask the API server for one source, from etcd, and how many there are.

        Raises:
            ApiError: It does not answer.
        """
        begun = time.monotonic()
        known = max(version_number(self._sources.version), version_number(self._beats.version))
        before = self._sources.version, len(self._index)
        answer = await self._api.request(
            "GET",
            path_of(self._namespace, "modelsources"),
            operation=f"list modelsources in the namespace {self._namespace}",
            query={"limit": 1},
        )
        self._answered_at = begun
        metadata = answer.get("metadata", {})
        version = version_number(str(metadata.get("resourceVersion", "")))
        if 0 < version < known:
            _log.warning("the API server was set back to an earlier state; all sources are listed again")
            self._index.forget_versions()
            self._list_again()
            return
        number = len(answer.get("items") or ()) + int(metadata.get("remainingItemCount") or 0)
        if before != (self._sources.version, len(self._index)):  # a change came meanwhile
            return
        self._miscounts = 0 if number == len(self._index) else self._miscounts + 1
        if self._miscounts >= _MISCOUNTS:
            _log.warning("the watch of sources missed changes: %d are known of %d", len(self._index), number)
            self._miscounts = 0
            self._list_again()

    def _list_again(self) -> None:
        if not self._tasks:
            return
        for number, stream in enumerate((self._sources, self._beats)):
            self._tasks[number].cancel()
            stream.version = ""
            self._tasks[number] = in_background(stream.run())

    async def _keep_probing(self) -> None:
        while not self._closing.is_set():
            try:
                await self.probe()
            except ApiError as exc:
                self._probe_failure = str(exc)
                self.troubled_at = time.monotonic()
            except Exception:  # noqa: BLE001 - an answer that is not understood must not end it
                _log.exception("asking the API server for its state failed")
                self.troubled_at = time.monotonic()
            else:
                self._probe_failure = ""
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._max_staleness_seconds / 6)

    def _age_seconds(self) -> float:
        oldest = min(self._sources.heard_at, self._beats.heard_at, self._answered_at)
        age = time.monotonic() - oldest
        if age > self._max_staleness_seconds:
            self.troubled_at = time.monotonic()
        return age

    def _failure(self) -> str:
        return self._probe_failure or self._sources.failure or self._beats.failure

    def _check_ready(self) -> None:
        if self._sources.version and self._beats.version:
            self._answered_at = max(self._answered_at, min(self._sources.heard_at, self._beats.heard_at))
            self._ready.set()

    # -- sources -------------------------------------------------------------------------------------------------------

    async def _list_sources(self, items: Sequence[Object], version: int) -> None:
        names, uids = set(), set()
        for number, item in enumerate(items):
            self._put(item)
            names.add(str(_metadata(item).get("name")))
            uids.add(str(_metadata(item).get("uid")))
            if number % 32 == 31:
                await asyncio.sleep(0)
        self._index.keep_only(names, uids, version)
        self._check_ready()

    def _change_source(self, kind: str, item: Object) -> None:
        if kind == "DELETED":
            self._index.deleted(str(_metadata(item).get("name")), str(_metadata(item).get("uid")), shown=True)
        else:
            self._put(item)

    def _put(self, item: Object) -> None:
        try:
            self._index.put(read_source(item))
        except UNREADABLE:
            spec = item.get("spec")
            spec = spec if isinstance(spec, dict) else {}
            self._index.put_unreadable(str(_metadata(item).get("name")), spec.get("sourceId"), spec.get("modelName"))

    # -- heartbeats ----------------------------------------------------------------------------------------------------

    async def _list_beats(self, items: Sequence[Object], version: int) -> None:  # noqa: ARG002 - as for sources
        known = {str(_metadata(item).get("name")) for item in items}
        self.heartbeats = {name: each for name, each in self.heartbeats.items() if name in known}
        for item in items:
            self._change_beats("ADDED", item)
            await asyncio.sleep(0)
        self._check_ready()

    def _change_beats(self, kind: str, item: Object) -> None:
        name = str(_metadata(item).get("name"))
        if kind == "DELETED":
            self.heartbeats.pop(name, None)
            return
        clock = self._index.clock
        try:
            spec = item["spec"]
            version = str(item["metadata"]["resourceVersion"])
            self.heartbeats[name] = HeartbeatObject(version, clock.steady_ms(spec["writtenAt"]))
            if name.startswith(self._replica):
                return
            for source, text in spec["beats"].items():
                at, _, load = text.partition(" ")
                self._index.heard(source, clock.steady_ms(int(at)), float(load) if load else None)
        except UNREADABLE as exc:
            _log.warning("the heartbeats in %s cannot be read: %s", name, type(exc).__name__)


def _metadata(item: Object) -> Object:
    metadata = item.get("metadata")
    return metadata if isinstance(metadata, dict) else {}
