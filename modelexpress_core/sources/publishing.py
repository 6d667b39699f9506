"""Publishes the record of a worker, sends its heartbeats, and withdraws the record when the worker ends.

One thread sends everything, so that messages stay in order: no heartbeat follows the message that the record is stale.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import multiprocessing
import multiprocessing.util
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from types import FrameType, TracebackType
from typing import Any

import attrs
from attrs import frozen

from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.errors import BackendError, ModelExpressError
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.wire.proto.modelexpress import p2p_pb2

__all__ = ["Publisher", "PublishingState", "withdraw_on_exit"]

_log = logging.getLogger(__name__)

_INITIALIZING = p2p_pb2.SOURCE_STATUS_INITIALIZING
_READY = p2p_pb2.SOURCE_STATUS_READY
_STALE = p2p_pb2.SOURCE_STATUS_STALE

_WORDS = {_INITIALIZING: "initializing", _READY: "ready", _STALE: "stale"}

#: Upper bound of the wait after the first failed turn; it doubles with each failure.
_BASE_SECONDS = 0.2

#: Largest bound of the wait, as a share of the interval. When a server returns, all its workers publish again within
#: one interval; until then they send only a few requests per interval.
_MAX_WAIT_SHARE = 1 / 3

#: The random numbers of the operating system: engines seed Python's own, all with the same number.
_RANDOM = random.SystemRandom()

#: How long an ending worker waits for the withdrawal of its record.
_WITHDRAWAL_SECONDS = 2.0

#: How often it checks the withdrawal.
_POLL_SECONDS = 0.005


@frozen
class PublishingState:
    """The state of a publication.

    Attributes:
        status: The status that the server accepted last: ``"initializing"``, ``"ready"`` or ``"stale"``; empty if none.
        published: How often the record was published: once, and again each time the server had lost it.
        heartbeats: Number of heartbeats that the server accepted.
        failures: Number of failed turns.
        failures_in_a_row: Number of failed turns since the last successful one.
        last_error: Error of the last turn; empty if it was successful.
        seconds_since_success: Time since the last successful turn; None if there was none.
    """

    status: str = ""
    published: int = 0
    heartbeats: int = 0
    failures: int = 0
    failures_in_a_row: int = 0
    last_error: str = ""
    seconds_since_success: float | None = None


class _RefusedError(ModelExpressError):
    """The server refused the record."""


class Publisher:
    """Publishes one worker, and keeps its record alive until the end of the ``with`` block.

    Args:
        client: Client of the server. The publisher opens a separate connection.
        identity: Identity of the worker's tensors.
        worker: Metadata that readers need. Its status is ignored.
        worker_id: A name that no other process uses.
        interval_seconds: Time between heartbeats, usually ``PublishingSettings.interval_seconds``.
        load: Returns the load of the worker, from 0 to 1, or None if it is unknown. The publisher's thread calls it for
            each heartbeat. It must be quick and must not take a lock that the main thread may hold during SIGTERM.

    Raises:
        ValueError: By the constructor: the interval is not positive.
        SettingsError: By the constructor: certificates cannot be used. Nothing else raises: errors of the server are in
            ``state`` and in the log.
    """

    def __init__(
        self,
        client: ServerClient,
        identity: SourceIdentity,
        worker: p2p_pb2.WorkerMetadata,
        worker_id: str,
        *,
        interval_seconds: float = 30.0,
        load: Callable[[], float | None] | None = None,
    ) -> None:
        if not 0 < interval_seconds < math.inf:
            message = f"interval_seconds is {interval_seconds!r}, which is not positive and finite"
            raise ValueError(message)
        # A separate connection: a signal may arrive while the main thread holds a lock of the other one, and the
        # withdrawal would wait for that lock.
        self._client = client.another()
        self._identity = identity
        self._worker = p2p_pb2.WorkerMetadata()
        self._worker.CopyFrom(worker)
        self._worker_id = worker_id
        self._source_id = identity.source_id
        self._interval_seconds = interval_seconds
        self._load = load
        self._load_failed = False
        self._pid = os.getpid()
        # Signal handlers must be able to wake the thread: SimpleQueue is reentrant, events and conditions are not.
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"mx-publisher-{worker_id}", daemon=True)
        self._ready = False
        self._withdraw_by: float | None = None  # monotonic
        self._ended = False
        self._tried = False
        self._state = PublishingState()
        self._succeeded_at: float | None = None  # monotonic
        self._logged: set[str] = set()  # errors that were logged since the last success

    def __enter__(self) -> Publisher:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.withdraw()

    def start(self) -> None:
        """Start publishing, with the status initializing. Returns at once. Later calls do nothing."""
        if self._thread.ident is None:
            self._pid = os.getpid()
            self._thread.start()

    def ready(self) -> None:
        """Publish at once that others may read the worker. Does nothing after ``withdraw``."""
        if not self._ready:
            self._ready = True
            self._wake.put(None)

    @property
    def state(self) -> PublishingState:
        """The state of the publication."""
        since = None if self._succeeded_at is None else time.monotonic() - self._succeeded_at
        return attrs.evolve(self._state, seconds_since_success=since)

    def withdraw(self, seconds: float = _WITHDRAWAL_SECONDS) -> bool:
        """Mark the record as stale, and stop publishing.

        Does nothing if called again, or in a forked child, whose parent continues.

        Args:
            seconds: Time limit. It includes a heartbeat that is being sent.

        Returns:
            Whether the server accepted it, or had no record.
        """
        self._begin_withdrawal(seconds)
        return self._wait_for_withdrawal(time.monotonic() + seconds)

    # A signal handler also calls the next two methods. It may interrupt a thread that holds a lock, so they take none.

    def _begin_withdrawal(self, seconds: float) -> None:
        if os.getpid() == self._pid and self._withdraw_by is None:
            self._withdraw_by = time.monotonic() + seconds
            self._wake.put(None)

    def _wait_for_withdrawal(self, until: float) -> bool:
        if os.getpid() != self._pid or self._thread.ident is None:
            return True
        while not self._ended and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        return self._ended and (self._state.status == "stale" or not self._tried)

    # The publisher's thread.

    def _run(self) -> None:
        try:
            self._publish_until_withdrawn()
        finally:
            self._ended = True
            self._client.close()

    def _publish_until_withdrawn(self) -> None:
        beat_at: float | None = None
        while self._withdraw_by is None:
            retry_seconds = self._turn()
            if beat_at is None:  # workers that start together must not send heartbeats together
                beat_at = time.monotonic() + _RANDOM.uniform(0, self._interval_seconds)
            while beat_at <= time.monotonic():
                beat_at += self._interval_seconds
            pause = beat_at - time.monotonic()
            self._pause(pause if retry_seconds is None else min(pause, retry_seconds))
        self._mark_stale(self._withdraw_by)

    def _pause(self, seconds: float) -> None:
        with contextlib.suppress(Empty):
            self._wake.get(timeout=max(0.0, seconds))
        with contextlib.suppress(Empty):  # the next turn handles all of them
            while True:
                self._wake.get_nowait()

    def _turn(self) -> float | None:
        """Publish or send a heartbeat. Returns the seconds until a retry, None to wait for the next heartbeat."""
        status = _READY if self._ready else _INITIALIZING
        try:
            self._send(status)
        except Exception as exc:  # noqa: BLE001 - no error stops the worker or its heartbeats
            return self._failed(exc)
        if self._logged:
            _log.info("the server accepts messages of worker %s again", self._worker_id)
            self._logged.clear()
        return None

    def _send(self, status: p2p_pb2.SourceStatus) -> None:
        if self._state.published:
            if self._beat(status):
                return
            _log.info("the server does not know worker %s any more: publishing it again", self._worker_id)
        self._tried = True
        self._worker.status = status
        answer = self._client.publish(self._identity, self._worker, self._worker_id)
        if not answer.success:
            raise _RefusedError(answer.message)
        # Another server may derive ids differently: use the id of the record.
        self._source_id = answer.mx_source_id or self._source_id
        self._state = attrs.evolve(self._state, published=self._state.published + 1)
        self._accepted(status)
        if self._load is not None:  # a published record has no load
            self._beat(status)

    def _beat(self, status: p2p_pb2.SourceStatus) -> bool:
        """Send a heartbeat. Returns whether the server knows the worker."""
        request = p2p_pb2.UpdateStatusRequest(
            mx_source_id=self._source_id,
            worker_rank=self._worker.worker_rank,
            worker_id=self._worker_id,
            status=status,
            source_load=None if status == _STALE else self._current_load(),
        )
        if not self._client.update_status(request).success:
            return False
        self._state = attrs.evolve(self._state, heartbeats=self._state.heartbeats + 1)
        self._accepted(status)
        return True

    def _current_load(self) -> float | None:
        if self._load is None:
            return None
        try:
            load = self._load()
            load = None if load is None else float(load)
        except BaseException as exc:  # noqa: BLE001 - also SystemExit: no load ends the heartbeats
            if not self._load_failed:
                _log.warning("heartbeats of worker %s have no load: %r", self._worker_id, exc, exc_info=exc)
            self._load_failed = True
            return None
        return None if load is None or math.isnan(load) else min(1.0, max(0.0, load))

    def _accepted(self, status: p2p_pb2.SourceStatus) -> None:
        self._succeeded_at = time.monotonic()
        self._state = attrs.evolve(self._state, status=_WORDS[status], failures_in_a_row=0, last_error="")

    def _failed(self, exc: Exception) -> float | None:
        """Record a failure. Returns the seconds until a retry; None if a retry cannot help."""
        in_a_row = self._state.failures_in_a_row + 1
        headline = exc.headline if isinstance(exc, ModelExpressError) else f"{type(exc).__name__}: {exc}"
        self._state = attrs.evolve(
            self._state, failures=self._state.failures + 1, failures_in_a_row=in_a_row, last_error=headline
        )
        retryable = isinstance(exc, BackendError) and exc.retryable
        # Log an outage once, although its messages differ from call to call.
        matter = type(exc).__name__ if retryable else headline
        if matter not in self._logged:
            self._logged.add(matter)
            _log.warning("the server does not accept messages of worker %s: %s", self._worker_id, exc)
        if not retryable:
            return None
        cap = self._interval_seconds * _MAX_WAIT_SHARE
        return _RANDOM.uniform(0, min(cap, _BASE_SECONDS * 2 ** min(in_a_row - 1, 30)))

    def _mark_stale(self, until: float) -> None:
        """Mark the record as stale; at least one attempt."""
        while self._tried:
            try:
                self._beat(_STALE)
            except Exception as exc:  # noqa: BLE001 - the server notices missing heartbeats
                wait = self._failed(exc)
                if wait is None or time.monotonic() + wait >= until:
                    return
                time.sleep(wait)
            else:
                self._accepted(_STALE)  # also if the server does not know the worker
                return


#: Publishers to withdraw when the process ends. The tuple is replaced: a signal handler may read it at any time.
_publishers: tuple[weakref.ref[Publisher], ...] = ()

#: The process that has the exit handlers.
_watched_pid: int | None = None


def withdraw_on_exit(publisher: Publisher) -> None:
    """Withdraw ``publisher`` when the process ends by itself, by an exception, or by SIGTERM.

    SIGTERM keeps its effect: the previous Python handler is called, or else the signal ends the process. A process that
    ignores SIGTERM still ignores it. Python runs handlers in the main thread between two of its instructions, so not
    during a long call of C code. Handlers can be installed from the main thread only.

    Args:
        publisher: A started publisher. It is withdrawn in the process that called this, not in forked children.
    """
    global _publishers  # noqa: PLW0603 - state of the process
    _publishers = (*(each for each in _publishers if each() is not None), weakref.ref(publisher))
    _watch_exit()
    if threading.current_thread() is not threading.main_thread():
        _log.debug("not in the main thread: worker records are not withdrawn on SIGTERM")
        return
    previous = signal.getsignal(signal.SIGTERM)
    # None: a handler that was not installed from Python, and cannot be called.
    if previous in {signal.SIG_IGN, None} or isinstance(previous, _OnTermination):
        return
    signal.signal(signal.SIGTERM, _OnTermination(previous))


def _watch_exit() -> None:
    """Install the exit handler once per process. Children of multiprocessing end without ``atexit``."""
    global _watched_pid  # noqa: PLW0603 - as above
    if _watched_pid == os.getpid():
        return
    _watched_pid = os.getpid()
    atexit.register(_withdraw_all)
    if multiprocessing.parent_process() is not None:
        multiprocessing.util.Finalize(None, _withdraw_all, exitpriority=0)


class _OnTermination:
    """Withdraws all publishers, and keeps the effect of the signal.

    It makes no call itself: the interrupted code may hold the locks of a call.
    """

    def __init__(self, previous: Any) -> None:  # noqa: ANN401 - what signal.getsignal returned
        self._previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        _withdraw_all()
        if callable(self._previous):
            self._previous(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _withdraw_all() -> None:
    publishers = [publisher for publisher in (each() for each in _publishers) if publisher is not None]
    until = time.monotonic() + _WITHDRAWAL_SECONDS
    for publisher in publishers:
        publisher._begin_withdrawal(_WITHDRAWAL_SECONDS)  # noqa: SLF001 - the other half of the publisher
    for publisher in publishers:
        publisher._wait_for_withdrawal(until)  # noqa: SLF001 - as above
