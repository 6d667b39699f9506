"""Writes the heartbeats that this server received: one object for all of its workers, every half minute.

An object for each heartbeat would be the most that a control plane writes: a thousand workers, 33 writes a second.
Here a thousand workers are one write of 60 KB. A heartbeat that changes the state of a worker changes its own object
at once; that is rare.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from mx_kubernetes._client import APPLY, Kubernetes, Object, in_background
from mx_kubernetes._errors import ApiError
from mx_kubernetes._index import Entry, Index
from mx_kubernetes._objects import API_VERSION, MANAGER
from mx_kubernetes._view import path_of

__all__ = ["HeartbeatWriter"]

_log = logging.getLogger(__name__)

#: Heartbeats of one object: 300 KB of the 1.5 MiB that etcd takes.
_OBJECT_BEATS = 4096

#: If the last heartbeat that other servers can see is older than this many intervals, they get the new one at once: the
#: worker has been another server's, which is gone.
_URGENT_INTERVALS = 1.5

#: After so many intervals without a write that succeeds, heartbeats are no longer accepted.
_OVERDUE_INTERVALS = 1.5


class HeartbeatWriter:
    """Writes at intervals, as long as there is something to write.

    Args:
        api: The API server.
        index: Has the heartbeats.
        namespace: Where the objects go.
        replica: Beginning of their names.
        seconds: The interval.
    """

    def __init__(self, api: Kubernetes, index: Index, namespace: str, replica: str, seconds: float) -> None:
        self._api = api
        self._index = index
        self._namespace = namespace
        self._replica = replica
        self._seconds = seconds
        self._waiting_since: float | None = None
        self._urgent = asyncio.Event()
        self._waiting = asyncio.Event()
        self._objects = 1
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write."""
        self._task = in_background(self._run())

    async def close(self) -> None:
        """Write what waits, once, and end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            try:
                await self._write()
            except ApiError as exc:
                _log.warning("the last heartbeats are lost: %s", exc)

    def note(self, entry: Entry) -> None:
        """Have a heartbeat of ``entry`` written with the next ones."""
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
            self._waiting.set()
        if entry.spoke_ms - entry.visible_ms > _URGENT_INTERVALS * self._seconds * 1000:
            self._urgent.set()

    def overdue_seconds(self) -> float:
        """For how long heartbeats have been waiting, if that is too long; else 0."""
        if self._waiting_since is None:
            return 0.0
        waiting = time.monotonic() - self._waiting_since
        return waiting if waiting > _OVERDUE_INTERVALS * self._seconds + 1 else 0.0

    async def _run(self) -> None:
        pause = min(5.0, self._seconds / 6)
        while True:
            await self._waiting.wait()
            since = self._waiting_since or time.monotonic()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._urgent.wait(), max(0.0, since + self._seconds - time.monotonic()))
            self._urgent.clear()
            try:
                await self._write()
            except ApiError as exc:
                _log.warning("heartbeats cannot be written, and are tried again: %s", exc)
            except Exception:  # noqa: BLE001 - the next one may succeed
                _log.exception("heartbeats cannot be written")
            await asyncio.sleep(pause)  # also after urgent ones, which come together

    async def _write(self) -> None:
        if self._waiting_since is None:
            return
        since = self._waiting_since
        self._waiting.clear()
        self._waiting_since = None
        entries = [*self._index.own_beats()]
        self._index.forget_early()
        self._objects = max(self._objects, -(-len(entries) // _OBJECT_BEATS))
        parts: list[list[Entry]] = [[] for _ in range(self._objects)]
        for entry in entries:
            parts[int(entry.source.name[:8], 16) % self._objects].append(entry)
        try:
            for number, part in enumerate(parts):
                await self._write_object(f"{self._replica}-{number}", part)
        except BaseException:
            self._waiting_since = since
            self._waiting.set()
            raise

    async def _write_object(self, name: str, entries: list[Entry]) -> None:
        offset = self._index.clock.offset_ms()
        spoke = [entry.spoke_ms for entry in entries]
        beats = {}
        for entry in entries:
            load = "" if entry.load is None else f" {entry.load!r}"
            beats[entry.source.name] = f"{int(entry.spoke_ms + offset)}{load}"
        body: Object = {
            "apiVersion": API_VERSION,
            "kind": "SourceHeartbeats",
            "metadata": {"name": name, "labels": {"app.kubernetes.io/managed-by": MANAGER}},
            "spec": {"writtenAt": self._index.clock.wall_ms(), "workers": len(beats), "beats": beats},
        }
        await self._api.request(
            "PATCH",
            path_of(self._namespace, "sourceheartbeats", name),
            operation=f"apply sourceheartbeats in the namespace {self._namespace}",
            query={"fieldManager": MANAGER, "force": "true"},
            body=body,
            content_type=APPLY,
        )
        for entry, spoke_ms in zip(entries, spoke, strict=True):
            entry.visible_ms = max(entry.visible_ms, spoke_ms)
