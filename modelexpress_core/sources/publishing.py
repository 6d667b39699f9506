"""Telling a server what a worker holds and that it is alive, and taking it back at once when the worker ends.

One thread talks, for as long as the worker lives. What it says is therefore in order: once it has said that the record
is stale, no heartbeat that was on its way comes after it.
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

#: First bound of the time until a failed turn is taken again.
_BASE_SECONDS = 0.2

#: Highest bound, as a part of the interval: where a server comes back, so do all its workers, well within one interval.
#: High enough that a fleet that cannot be served asks a few times an interval, and does not keep its server down.
_CAP_OF_INTERVAL = 1 / 3

#: The random numbers of the operating system: engines seed Python's own, all with the same number.
_RANDOM = random.SystemRandom()

#: How long a worker that ends waits for its record to be taken back.
_WITHDRAWAL_SECONDS = 2.0

#: How often whoever waits for that looks.
_POLL_SECONDS = 0.005


@frozen
class PublishingState:
    """What a publisher has done until now.

    Attributes:
        status: What the server took last: ``"initializing"``, ``"ready"`` or ``"stale"``; empty before that.
        published: How often the record was published: once, and again where the server had lost it.
        heartbeats: Heartbeats that the server took.
        failures: Turns that failed.
        failures_in_a_row: Those since the last that went well.
        last_error: Why the last of them failed; empty where the last turn went well.
        seconds_since_success: Since the server took something; None where it never did.
    """

    status: str = ""
    published: int = 0
    heartbeats: int = 0
    failures: int = 0
    failures_in_a_row: int = 0
    last_error: str = ""
    seconds_since_success: float | None = None


class _RefusedError(ModelExpressError):
    """The server answered that it does not take the record."""


class Publisher:
    """Publishes one worker, and keeps its record alive until the end of the ``with`` block.

    Args:
        client: The server. The publisher has a connection of its own to it.
        identity: What the worker holds.
        worker: What others need to read it. Its status is left out of account.
        worker_id: Who it is: a name that no other process uses.
        interval_seconds: Time between heartbeats, ``PublishingSettings.interval_seconds`` as a rule.
        load: How busy the worker is, from 0 to 1, or None where it cannot say. Called for each heartbeat by the
            publisher's own thread: it has to be quick, and takes no lock, which a thread that SIGTERM interrupts may
            hold.

    Raises:
        ValueError: By the constructor, for an interval that is not above zero. Nothing else raises: what goes wrong
            with the server is in ``state`` and in the log.
        SettingsError: By the constructor, where certificates cannot be used.
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
            message = f"interval_seconds is {interval_seconds!r}, which is no time between heartbeats"
            raise ValueError(message)
        # One of its own: a signal may come while the main thread holds a lock of the other, and the last words, which
        # are waited for then, would wait for that lock.
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
        # Signal handlers must be able to wake the thread: this queue is made for that, events and conditions are not.
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"mx-publisher-{worker_id}", daemon=True)
        self._ready = False
        self._withdraw_by: float | None = None  # monotonic
        self._ended = False
        self._tried = False
        self._state = PublishingState()
        self._succeeded_at: float | None = None  # monotonic
        self._said: set[str] = set()  # what was logged since the last success

    def __enter__(self) -> Publisher:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.withdraw()

    def start(self) -> None:
        """Publish the worker as initializing, and go on from there; returns at once. Does nothing a second time."""
        if self._thread.ident is None:
            self._pid = os.getpid()
            self._thread.start()

    def ready(self) -> None:
        """Others may read the worker from now on: told at once. Changes nothing after ``withdraw``."""
        if not self._ready:
            self._ready = True
            self._wake.put(None)

    @property
    def state(self) -> PublishingState:
        """What was done until now."""
        since = None if self._succeeded_at is None else time.monotonic() - self._succeeded_at
        return attrs.evolve(self._state, seconds_since_success=since)

    def withdraw(self, seconds: float = _WITHDRAWAL_SECONDS) -> bool:
        """Have the record marked as stale, and end: nothing is said of the worker after that.

        Does nothing a second time, nor in a forked child, whose parent goes on.

        Args:
            seconds: How long to try. A heartbeat that is under way is waited for.

        Returns:
            Whether the server was told, or had nothing to be told.
        """
        self._begin_withdrawal(seconds)
        return self._wait_for_withdrawal(time.monotonic() + seconds)

    # What follows is also called by a signal handler, which may have interrupted whoever holds a lock: it takes none.

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

    # The thread.

    def _run(self) -> None:
        try:
            self._talk()
        finally:
            self._ended = True
            self._client.close()

    def _talk(self) -> None:
        beat_at: float | None = None
        while self._withdraw_by is None:
            retry_seconds = self._turn()
            if beat_at is None:  # the fleet was started together, and is not to speak in step
                beat_at = time.monotonic() + _RANDOM.uniform(0, self._interval_seconds)
            while beat_at <= time.monotonic():
                beat_at += self._interval_seconds
            pause = beat_at - time.monotonic()
            self._pause(pause if retry_seconds is None else min(pause, retry_seconds))
        self._mark_stale(self._withdraw_by)

    def _pause(self, seconds: float) -> None:
        with contextlib.suppress(Empty):
            self._wake.get(timeout=max(0.0, seconds))
        with contextlib.suppress(Empty):  # whatever it was, the next turn sees it
            while True:
                self._wake.get_nowait()

    def _turn(self) -> float | None:
        """Say what is to be said now; seconds until it is to be tried again, None where that can wait for its turn."""
        status = _READY if self._ready else _INITIALIZING
        try:
            self._tell(status)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the worker goes on, and so do heartbeats
            return self._failed(exc)
        if self._said:
            _log.info("the server takes what worker %s says again", self._worker_id)
            self._said.clear()
        return None

    def _tell(self, status: p2p_pb2.SourceStatus) -> None:
        if self._state.published:
            if self._beat(status):
                return
            _log.info("the server does not know worker %s any more: publishing it again", self._worker_id)
        self._tried = True
        self._worker.status = status
        answer = self._client.publish(self._identity, self._worker, self._worker_id)
        if not answer.success:
            raise _RefusedError(answer.message)
        # Another server may derive ids otherwise: what counts is under which the record is.
        self._source_id = answer.mx_source_id or self._source_id
        self._state = attrs.evolve(self._state, published=self._state.published + 1)
        self._took(status)
        if self._load is not None:  # which a record does not hold when it is published
            self._beat(status)

    def _beat(self, status: p2p_pb2.SourceStatus) -> bool:
        """Whether the server knows the worker."""
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
        self._took(status)
        return True

    def _current_load(self) -> float | None:
        if self._load is None:
            return None
        try:
            load = self._load()
            load = None if load is None else float(load)
        except BaseException as exc:  # noqa: BLE001 - also SystemExit: no load ends the heartbeats
            if not self._load_failed:
                _log.warning("heartbeats of worker %s go without its load: %r", self._worker_id, exc, exc_info=exc)
            self._load_failed = True
            return None
        return None if load is None or math.isnan(load) else min(1.0, max(0.0, load))

    def _took(self, status: p2p_pb2.SourceStatus) -> None:
        self._succeeded_at = time.monotonic()
        self._state = attrs.evolve(self._state, status=_WORDS[status], failures_in_a_row=0, last_error="")

    def _failed(self, exc: Exception) -> float | None:
        """Note it; seconds until trying again can help, None where it cannot."""
        in_a_row = self._state.failures_in_a_row + 1
        headline = exc.headline if isinstance(exc, ModelExpressError) else f"{type(exc).__name__}: {exc}"
        self._state = attrs.evolve(
            self._state, failures=self._state.failures + 1, failures_in_a_row=in_a_row, last_error=headline
        )
        retryable = isinstance(exc, BackendError) and exc.retryable
        # An outage is one matter, though its messages differ from call to call.
        matter = type(exc).__name__ if retryable else headline
        if matter not in self._said:
            self._said.add(matter)
            _log.warning("the server does not take what worker %s says: %s", self._worker_id, exc)
        if not retryable:
            return None
        cap = self._interval_seconds * _CAP_OF_INTERVAL
        return _RANDOM.uniform(0, min(cap, _BASE_SECONDS * 2 ** min(in_a_row - 1, 30)))

    def _mark_stale(self, until: float) -> None:
        """The last words, which are tried once at least."""
        while self._tried:
            try:
                self._beat(_STALE)
            except Exception as exc:  # noqa: BLE001 - the server will notice that heartbeats end
                wait = self._failed(exc)
                if wait is None or time.monotonic() + wait >= until:
                    return
                time.sleep(wait)
            else:
                self._took(_STALE)  # a server that does not know the worker does not offer it either
                return


#: Publishers to withdraw when the process ends: replaced as a whole, since a signal handler may read it at any time.
_publishers: tuple[weakref.ref[Publisher], ...] = ()

#: The process in which exits are watched.
_watched_pid: int | None = None


def withdraw_on_exit(publisher: Publisher) -> None:
    """Withdraw ``publisher`` when the process ends by itself, by an exception, or by SIGTERM.

    SIGTERM goes on as it would have without this: a handler of Python that was there is called, and where there was
    none the process is ended by the signal. A process that ignores SIGTERM goes on ignoring it. Python runs handlers
    in the main thread and between two of its steps: not while that thread is in a long call of C. From another thread
    than the main one, SIGTERM cannot be asked for.

    Args:
        publisher: One that is started. It is withdrawn in the process that called this, not in forked children.
    """
    global _publishers  # noqa: PLW0603 - there is one end of a process
    _publishers = (*(each for each in _publishers if each() is not None), weakref.ref(publisher))
    _watch_exit()
    if threading.current_thread() is not threading.main_thread():
        _log.debug("not in the main thread: worker records are not withdrawn on SIGTERM")
        return
    previous = signal.getsignal(signal.SIGTERM)
    # None: a handler that Python does not know, and could not call.
    if previous in {signal.SIG_IGN, None} or isinstance(previous, _OnTermination):
        return
    signal.signal(signal.SIGTERM, _OnTermination(previous))


def _watch_exit() -> None:
    """Once for each process. Children that multiprocessing forks end without ``atexit``, and by a way of their own."""
    global _watched_pid  # noqa: PLW0603 - as above
    if _watched_pid == os.getpid():
        return
    _watched_pid = os.getpid()
    atexit.register(_withdraw_all)
    if multiprocessing.parent_process() is not None:
        multiprocessing.util.Finalize(None, _withdraw_all, exitpriority=0)


class _OnTermination:
    """Withdraws all publishers, and lets the signal do what it would have done.

    It does not speak itself: the interrupted code may hold the locks that a call takes.
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
