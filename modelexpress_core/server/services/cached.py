"""What the services of the model cache share: finding and beginning versions, rights, errors and waits."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NoReturn, TypeVar

import grpc
import grpc.aio

from modelexpress_core.bulk.output import PRESENT_BYTES
from modelexpress_core.bulk.requests import Run
from modelexpress_core.contracts.rights import ENSURE, READ, Rights
from modelexpress_core.errors import (
    AccessDeniedError,
    DeadlineError,
    IntegrityError,
    InvalidURIError,
    ModelExpressError,
    NotFoundError,
    ResourceError,
    SourceChangedError,
    UnavailableError,
)
from modelexpress_core.messages import hide_credentials_of_urls, printable, with_hint
from modelexpress_core.resources import start_thread
from modelexpress_core.server.services.authorization import require_right
from modelexpress_core.server.services.streams import Streams
from modelexpress_core.wire.authentication import caller
from modelexpress_core.wire.peers import peer_host
from modelexpress_core.wire.rpc import RpcContext

if TYPE_CHECKING:
    from modelexpress_core.server.cache import CachedFileReader, ModelCache, Snapshot
    from modelexpress_core.server.cache.places import Place
    from modelexpress_core.server.metrics import CacheMetrics
    from modelexpress_core.server.services.cache_bulk import CacheBulk

__all__ = ["CacheServing", "abort_with", "message_of", "shown", "status_of_error"]

_R = TypeVar("_R")

_Code = grpc.StatusCode

#: The first class that fits counts.
_STATUS: tuple[tuple[type[ModelExpressError], grpc.StatusCode], ...] = (
    (InvalidURIError, _Code.INVALID_ARGUMENT),
    (NotFoundError, _Code.NOT_FOUND),
    (AccessDeniedError, _Code.PERMISSION_DENIED),
    (SourceChangedError, _Code.FAILED_PRECONDITION),
    (UnavailableError, _Code.UNAVAILABLE),
    (DeadlineError, _Code.UNAVAILABLE),
    (IntegrityError, _Code.DATA_LOSS),
    (ResourceError, _Code.RESOURCE_EXHAUSTED),
)

_MAX_MESSAGE_CHARACTERS = 2000

#: Questions to storages for versions at the same time: each takes as long as its storage.
_MOST_QUESTIONS = 16

#: Threads that read files and compare digests. Two compare at most, so that the others go on reading.
_READING_THREADS = 6

#: How often bytes that arrive are looked for, and for how long.
_LOOK_SECONDS = 0.1
_WAIT_SECONDS = 20.0


def status_of_error(exc: ModelExpressError) -> grpc.StatusCode:
    """The status with which a call ends that failed with ``exc``."""
    return next((code for cls, code in _STATUS if isinstance(exc, cls)), _Code.FAILED_PRECONDITION)


def message_of(exc: ModelExpressError) -> str:
    """What a caller reads of ``exc``, without credentials."""
    return printable(hide_credentials_of_urls(with_hint(exc.headline, exc.hint)))[:_MAX_MESSAGE_CHARACTERS]


async def abort_with(context: RpcContext, exc: ModelExpressError) -> NoReturn:
    """End the call with the status and the message of ``exc``."""
    await context.abort(status_of_error(exc), message_of(exc))


class CacheServing:
    """The cache of a server, as its services use it from the event loop.

    Args:
        cache: The cache; closed with this.
        rights: What callers may do.
        metrics: Counts what was sent.
        may_delete: Whether callers may remove models.

    Attributes:
        cache: As above.
        metrics: As above.
        may_delete: As above.
        bulk: The bulk channel; None if there is none.
        streams: Streams that carry content of files.
    """

    def __init__(self, cache: ModelCache, *, rights: Rights, metrics: CacheMetrics, may_delete: bool) -> None:
        self.cache = cache
        self.metrics = metrics
        self.may_delete = may_delete
        self.bulk: CacheBulk | None = None
        self.streams = Streams()
        self._rights = rights
        self._asking = asyncio.Semaphore(_MOST_QUESTIONS)
        self._reading = ThreadPoolExecutor(_READING_THREADS, thread_name_prefix="mx-cache-read")
        self._begun: dict[tuple[str, str, str, bool, str], asyncio.Future[Snapshot]] = {}
        self._present: dict[str, tuple[float, int]] = {}

    def close(self) -> None:
        """End downloads and the bulk channel; blocks until nothing reads the cache any more."""
        if self.bulk is not None:
            self.bulk.close()
        self.cache.close()
        self._reading.shutdown(wait=True, cancel_futures=True)

    # -- rights --------------------------------------------------------------------------------------------------------

    async def place(self, path: str, revision: str, right: str, context: RpcContext) -> Place:
        """What ``path`` names, for a caller who has ``right`` for it; else the call ends."""
        try:
            place = self.cache.place(path, revision or None)
        except ModelExpressError as exc:
            await abort_with(context, exc)
        await self.require(place, right, context)
        return place

    async def require(self, place: Place, right: str, context: RpcContext) -> None:
        """End the call unless its caller has ``right`` for a model."""
        await require_right(self._rights, right, place.shown, context)

    def allows(self, name: str, right: str, snapshot: Snapshot) -> bool:
        """Whether the caller ``name`` has ``right`` for a version."""
        return self._rights.allows(name, right, shown(snapshot.place)) and not self._lacks_rule(name, snapshot)

    def _lacks_rule(self, name: str, snapshot: Snapshot) -> bool:
        """Whether a version needs a rule that there is not: its storage gives it to some readers alone."""
        return snapshot.restricted and bool(name) and not self._rights.rules

    async def check_restriction(self, snapshot: Snapshot, context: RpcContext) -> None:
        """End the call where callers are authenticated, and only a rule can say who of them may have the version."""
        if self._lacks_rule(caller.get(), snapshot):
            reason = (
                f"{shown(snapshot.place)} is gated or private, and the server has no rules of who may read it from its "
                "cache: its operator has to set MX_AUTH_RIGHTS"
            )
            await context.abort(_Code.PERMISSION_DENIED, reason)

    # -- versions ------------------------------------------------------------------------------------------------------

    async def begin(
        self, place: Place, revision: str, version: str, context: RpcContext, *, weights: bool = True
    ) -> Snapshot:
        """A version that is there, or whose download has begun.

        Callers that ask for the same share one question, which goes on when they leave. A caller without the right to
        ensure a model gets what is there already, as its storage or the cache knows it.

        Raises:
            ModelExpressError: As ``ModelCache.begin``.
        """
        path = place.name
        found = self.cache.find(path, revision=revision or None, version=version or None, weights=weights)
        if found is None:
            await require_right(self._rights, ENSURE, place.shown, context)
        elif not self._may_ensure(place):
            await self.check_restriction(found, context)
            return found
        # Only a limit of callers makes a difference between those who ask for the same.
        owner = (caller.get() or peer_host(context.peer())) if self.cache.settings.max_caller_bytes else ""
        key = (path, revision, version, weights, owner)
        begun = self._begun.get(key)
        if begun is None:
            begun = asyncio.ensure_future(
                self._asked(
                    lambda: self.cache.begin(
                        path, revision=revision or None, version=version or None, weights=weights, owner=owner
                    )
                )
            )
            self._begun[key] = begun
            begun.add_done_callback(lambda done: self._answered(key, done))
        snapshot = await asyncio.shield(begun)
        await self.check_restriction(snapshot, context)
        return snapshot

    def _may_ensure(self, place: Place) -> bool:
        return self._rights.allows(caller.get(), ENSURE, place.shown)

    def _answered(self, key: tuple[str, str, str, bool, str], done: asyncio.Future[Snapshot]) -> None:
        del self._begun[key]
        if not done.cancelled():
            done.exception()  # somebody has seen it, or everybody has left

    async def version(self, path: str, version: str, context: RpcContext, *, file: str = "") -> tuple[Place, Snapshot]:
        """The version of a model that a call is about, and its place; it is downloaded again if it is not there.

        Args:
            path: The place in the request.
            version: The version in the request.
            context: The call, which ends if there is none.
            file: A file that the version has to have, if it is not empty.
        """
        place = await self.place(path, "", READ, context)
        if not version:
            await context.abort(_Code.INVALID_ARGUMENT, "the request names no version: OpenModel tells it")
        for weights in (True, False):
            found = self.cache.find(place.name, version=version, weights=weights)
            if found is not None and (weights or not file or file in found.files):
                await self.check_restriction(found, context)
                return place, found
        try:
            return place, await self.begin(place, "", version, context)
        except ModelExpressError as exc:
            code = status_of_error(exc)
            if code is _Code.NOT_FOUND:  # it was there, when OpenModel told the version
                code = _Code.FAILED_PRECONDITION
            reason = f"{version[:12]} of {place.shown} is not in the cache any more: {message_of(exc)}"
            await context.abort(code, reason)

    # -- waiting -------------------------------------------------------------------------------------------------------

    def present_bytes(self, snapshot: Snapshot) -> int:
        """Bytes of a version that are there; counted at most a few times a second for all callers."""
        if snapshot.complete:
            return snapshot.size_bytes
        now = time.monotonic()
        at, present = self._present.get(snapshot.key, (0.0, 0))
        if now - at >= _LOOK_SECONDS:
            present = snapshot.present_bytes
            self._present = {key: each for key, each in self._present.items() if now - each[0] < 1}
            self._present[snapshot.key] = (now, present)
        return present

    async def progress(self, snapshot: Snapshot, *, every_seconds: float = 1.0) -> AsyncIterator[int]:
        """Bytes that are there: at once, again when more have come, and each few seconds; ends when it is complete.

        Raises:
            ModelExpressError: The download failed.
        """
        while True:
            if snapshot.error is not None:
                raise snapshot.error
            if snapshot.complete:
                return
            yield self.present_bytes(snapshot)
            end = time.monotonic() + every_seconds
            # Threads of the download change it, and so there is no event of asyncio's.
            while time.monotonic() < end and not snapshot.complete and snapshot.error is None:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_SECONDS)

    async def opened(self, snapshot: Snapshot, path: str, context: RpcContext) -> CachedFileReader:
        """A file of a version; the call ends with UNAVAILABLE if the download does not reach it in time.

        Raises:
            ModelExpressError: The download failed, or the file cannot be opened.
        """
        deadline = time.monotonic() + _WAIT_SECONDS
        while (reader := await self.in_thread(lambda: snapshot.try_open_file(path, 0))) is None:
            if time.monotonic() > deadline:
                await self.abort_not_there(snapshot, context)
            await asyncio.sleep(_LOOK_SECONDS)
        return reader

    async def wait_for_bytes(
        self, reader: CachedFileReader, start: int, end: int, snapshot: Snapshot, context: RpcContext
    ) -> None:
        """Wait until bytes of a file are there; the call ends with UNAVAILABLE if they do not come in time.

        Raises:
            ModelExpressError: The download failed.
        """
        deadline = time.monotonic() + _WAIT_SECONDS
        while not reader.wait(start, end, 0):
            if time.monotonic() > deadline:
                await self.abort_not_there(snapshot, context)
            await asyncio.sleep(_LOOK_SECONDS)

    async def abort_not_there(self, snapshot: Snapshot, context: RpcContext) -> NoReturn:
        """End the call: what it asks for is still arriving."""
        present = self.present_bytes(snapshot)
        reason = f"not there yet: {present} of {snapshot.size_bytes} bytes of {shown(snapshot.place)} have arrived"
        await context.abort(_Code.UNAVAILABLE, reason, ((PRESENT_BYTES, str(present)),))

    async def made(
        self,
        reader: CachedFileReader,
        parts: Iterable[tuple[int, Run]],
        make: Callable[[int, Run], _R],
        snapshot: Snapshot,
        context: RpcContext,
    ) -> AsyncGenerator[tuple[Run, _R]]:
        """What ``make`` returns for each part of a file, in another thread: the next one is made while one is used.

        A part that is not there yet is waited for when those before it have been used.

        Raises:
            ModelExpressError: The download failed, or ``make`` raised it.
        """
        begun: tuple[Run, asyncio.Future[_R]] | None = None
        try:
            for position, part in parts:
                if begun is not None and not reader.wait(part.offset, part.end, 0):
                    yield begun[0], await begun[1]
                    begun = None
                await self.wait_for_bytes(reader, part.offset, part.end, snapshot, context)
                before, begun = begun, (part, self._making(make, position, part))
                if before is not None:
                    yield before[0], await before[1]
            if begun is not None:
                yield begun[0], await begun[1]
        finally:
            if begun is not None and not begun[1].done():
                await asyncio.wait([begun[1]])  # it reads a file that is closed next

    def _making(self, make: Callable[[int, Run], _R], position: int, part: Run) -> asyncio.Future[_R]:
        making = asyncio.ensure_future(self.in_thread(lambda: make(position, part)))
        making.add_done_callback(lambda done: done.cancelled() or done.exception())  # also if nobody waits for it
        return making

    def count_sent(self, nbytes: int) -> None:
        """Count bytes that went over gRPC."""
        self.cache.sent(nbytes)
        self.metrics.sent("grpc", nbytes)

    # -- threads -------------------------------------------------------------------------------------------------------

    async def in_thread(self, work: Callable[[], _R]) -> _R:
        """What ``work`` returns, which reads files."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, work)

    async def _asked(self, ask: Callable[[], Snapshot]) -> Snapshot:
        """What ``ask`` returns. It may wait for a storage for long, and the end of the server does not wait for it."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Snapshot] = loop.create_future()

        def answer(snapshot: Snapshot | None, exc: BaseException | None) -> None:
            if answered.done():
                return
            if snapshot is not None:
                answered.set_result(snapshot)
            else:
                answered.set_exception(exc or RuntimeError("no answer"))

        def run() -> None:
            snapshot, error = None, None
            try:
                snapshot = ask()
            except Exception as exc:  # noqa: BLE001 - whoever waits gets it
                error = exc
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(answer, snapshot, error)

        async with self._asking:
            start_thread(threading.Thread(target=run, name="mx-cache-ask", daemon=True), "ask a storage")
            return await answered


def shown(place: str) -> str:
    """The name of a model for people and rules, from its canonical name."""
    from modelexpress_core.server.cache.places import HUB

    return place.removeprefix(f"{HUB}/")
