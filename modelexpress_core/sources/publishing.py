"""Publishes a worker's record to a server, sends its heartbeats, and withdraws the record when the worker ends.

One thread sends all messages of a worker, so they arrive in order: no heartbeat follows the message that marks the
record stale.
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
from modelexpress_core.contracts.metadata_store import PodReference
from modelexpress_core.errors import BackendError, ModelExpressError
from modelexpress_core.resources import start_thread
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.wire.grants import GrantAuthenticator
from modelexpress_core.wire.proto.modelexpress import p2p_pb2

__all__ = ["Publisher", "PublishingState", "withdraw_on_exit"]

_log = logging.getLogger(__name__)

_INITIALIZING = p2p_pb2.SOURCE_STATUS_INITIALIZING
_READY = p2p_pb2.SOURCE_STATUS_READY
_STALE = p2p_pb2.SOURCE_STATUS_STALE

_STATUS_NAMES = {_INITIALIZING: "initializing", _READY: "ready", _STALE: "stale"}

#: Upper bound of the first retry delay; it doubles with each failure.
_FIRST_RETRY_SECONDS = 0.2

#: Largest retry delay, as a share of the heartbeat interval. Low enough that all workers reconnect well within one
#: interval of the server's return; high enough that a fleet does not overload a server that is down, since each
#: worker tries only a few times per interval.
_MAX_RETRY_INTERVAL_SHARE = 1 / 3

#: Random numbers of the operating system: engines seed Python's generator, all with the same seed.
_RANDOM = random.SystemRandom()

#: How long a worker that ends waits until its record is withdrawn.
_WITHDRAWAL_SECONDS = 2.0

#: Time between two checks whether the record is withdrawn.
_POLL_SECONDS = 0.005


@frozen
class PublishingState:
    """What a publisher has done so far.

    Attributes:
        status: Last status that the server accepted: ``"initializing"``, ``"ready"`` or ``"stale"``; empty before.
        published: How often the record was published: once, and again each time the server had lost it.
        heartbeats: Heartbeats that the server accepted.
        failures: Attempts that failed.
        failures_in_a_row: Failed attempts since the last success.
        last_error: Why the last attempt failed; empty if it succeeded.
        seconds_since_success: Seconds since the server last accepted a message; None if it never did.
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

    Only the constructor raises: failures of calls to the server are in ``state`` and in the log.

    Args:
        client: The server. The publisher opens a second connection to it.
        identity: Identity of the tensors that the worker holds.
        worker: The record that readers need. Its status is ignored.
        worker_id: A name that no other process uses.
        interval_seconds: Time between heartbeats, normally ``PublishingSettings.interval_seconds``.
        load: Returns how busy the worker is, from 0 to 1, or None if unknown. The publisher's thread calls it for each
            heartbeat: it must be quick, and must take no lock, because a thread that SIGTERM interrupts may hold it.
        grants: Verifies read grants; gets the key and the time that the server answers with.
        pod: The worker's pod.
        published: Whether the caller has published the record already, as initializing.

    Raises:
        ValueError: The interval is not above zero.
        SettingsError: Certificates cannot be used.
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
        grants: GrantAuthenticator | None = None,
        pod: PodReference | None = None,
        published: bool = False,
    ) -> None:
        if not 0 < interval_seconds < math.inf:
            message = f"interval_seconds must be above zero and finite: {interval_seconds!r}"
            raise ValueError(message)
        # A separate connection: a signal may arrive while the main thread holds a lock of the caller's connection, and
        # the withdrawal, which the signal handler waits for, would wait for that lock.
        self._client = client.another()
        self._identity = identity
        self._worker = p2p_pb2.WorkerMetadata()
        self._worker.CopyFrom(worker)
        self._worker_id = worker_id
        self._source_id = identity.source_id
        self._interval_seconds = interval_seconds
        self._load = load
        self._load_failed = False
        self._grants = grants
        self._pod = pod
        self._pid = os.getpid()
        # A signal handler must be able to wake the thread. SimpleQueue is reentrant; events and conditions are not.
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"mx-publisher-{worker_id}", daemon=True)
        self._ready = False
        self._withdraw_by: float | None = None  # monotonic
        self._expires_at: float | None = None  # monotonic
        self._released = False
        self._ended = False
        self._publish_attempted = published
        self._state = PublishingState("initializing", published=1) if published else PublishingState()
        self._succeeded_at: float | None = None  # monotonic
        self._logged: set[str] = set()  # failures that were logged since the last success

    def __enter__(self) -> Publisher:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.withdraw()

    def start(self) -> None:
        """Start the thread that publishes the worker, as initializing first. Further calls do nothing.

        Raises:
            ResourceError: The system starts no more threads; another call tries again.
        """
        if self._thread.ident is None:
            self._pid = os.getpid()
            start_thread(self._thread, "publish the worker")

    def ready(self) -> None:
        """Publish at once that the worker is ready to be read. Does nothing after ``withdraw``."""
        if not self._ready:
            self._ready = True
            self._wake.put(None)

    def expire_after(self, seconds: float | None) -> None:
        """Withdraw the record by itself after ``seconds``; None to keep it."""
        self._expires_at = None if seconds is None else time.monotonic() + seconds
        self._wake.put(None)

    def release(self, seconds: float = _WITHDRAWAL_SECONDS) -> bool:
        """Stop, and leave the record as it is to another publisher of this process.

        Returns:
            True if no message about the worker follows. False if one is still under way after ``seconds``, or if the
            record was withdrawn before.
        """
        if os.getpid() != self._pid or self._withdraw_by is not None:
            return False
        self._released = True
        self._begin_withdrawal(seconds)
        self._wait_for_withdrawal(time.monotonic() + seconds)
        return self._ended

    @property
    def is_running(self) -> bool:
        """Whether it keeps the record alive: it was started, and neither withdrawn nor released."""
        return self._thread.ident is not None and self._withdraw_by is None and not self._ended

    @property
    def state(self) -> PublishingState:
        """What the publisher has done so far."""
        since = None if self._succeeded_at is None else time.monotonic() - self._succeeded_at
        return attrs.evolve(self._state, seconds_since_success=since)

    def withdraw(self, seconds: float = _WITHDRAWAL_SECONDS) -> bool:
        """Mark the record stale and stop: no message about the worker follows.

        Further calls do nothing, and neither does a call in a forked child: the record belongs to the parent.

        Args:
            seconds: How long to try. This time includes a heartbeat that is already under way.

        Returns:
            True if the server marked the record stale, or the record was never published.
        """
        self._begin_withdrawal(seconds)
        return self._wait_for_withdrawal(time.monotonic() + seconds)

    # A signal handler calls these two as well. It may have interrupted code that holds a lock, so they take none.

    def _begin_withdrawal(self, seconds: float) -> None:
        if os.getpid() == self._pid and self._withdraw_by is None:
            self._withdraw_by = time.monotonic() + seconds
            self._wake.put(None)

    def _wait_for_withdrawal(self, until: float) -> bool:
        if os.getpid() != self._pid or self._thread.ident is None:
            return True
        while not self._ended and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        return self._ended and (self._state.status == "stale" or not self._publish_attempted)

    # The thread.

    def _run(self) -> None:
        try:
            self._publish_until_withdrawn()
        finally:
            self._ended = True
            self._client.close()

    def _publish_until_withdrawn(self) -> None:
        beat_at: float | None = None
        while self._withdraw_by is None:
            retry_seconds = self._update()
            if beat_at is None:  # spread the heartbeats of workers that started together
                beat_at = time.monotonic() + _RANDOM.uniform(0, self._interval_seconds)
            while beat_at <= time.monotonic():
                beat_at += self._interval_seconds
            pause = beat_at - time.monotonic()
            self._pause(pause if retry_seconds is None else min(pause, retry_seconds))
            if self._has_expired():
                self._begin_withdrawal(_WITHDRAWAL_SECONDS)
        if not self._released:
            self._mark_stale(self._withdraw_by)

    def _has_expired(self) -> bool:
        expires_at = self._expires_at
        return expires_at is not None and expires_at <= time.monotonic()

    def _pause(self, seconds: float) -> None:
        if self._expires_at is not None:
            seconds = min(seconds, self._expires_at - time.monotonic())
        with contextlib.suppress(Empty):
            self._wake.get(timeout=max(0.0, seconds))
        with contextlib.suppress(Empty):  # one update handles all wake-ups
            while True:
                self._wake.get_nowait()

    def _update(self) -> float | None:
        """Publish or send a heartbeat; return seconds until a retry, or None to wait for the next heartbeat."""
        status = _READY if self._ready else _INITIALIZING
        try:
            self._publish_or_beat(status)
        except Exception as exc:  # noqa: BLE001 - no failure may end the heartbeats
            return self._record_failure(exc)
        if self._logged:
            _log.info("the server accepts the record of worker %s again", self._worker_id)
            self._logged.clear()
        return None

    def _publish_or_beat(self, status: p2p_pb2.SourceStatus) -> None:
        if self._state.published:
            if self._beat(status):
                return
            _log.info("the server no longer knows worker %s: publishing it again", self._worker_id)
        self._publish_attempted = True
        self._worker.status = status
        answer = self._client.publish(self._identity, self._worker, self._worker_id, self._pod)
        if not answer.success:
            raise _RefusedError(answer.message)
        if self._grants is not None:
            self._grants.accept_server_time(answer.server_time_ms)
            self._grants.accept_key(answer.grant_key)
        # Another server may derive ids differently: heartbeats need the id under which it stored the record.
        self._source_id = answer.mx_source_id or self._source_id
        self._state = attrs.evolve(self._state, published=self._state.published + 1)
        self._record_success(status)
        if self._load is not None:  # the published record has no field for the load: a heartbeat carries it
            self._beat(status)

    def _beat(self, status: p2p_pb2.SourceStatus) -> bool:
        """Send a heartbeat; return whether the server knows the worker."""
        request = p2p_pb2.UpdateStatusRequest(
            mx_source_id=self._source_id,
            worker_rank=self._worker.worker_rank,
            worker_id=self._worker_id,
            status=status,
            source_load=None if status == _STALE else self._current_load(),
        )
        answer = self._client.update_status(request)
        if not answer.success:
            return False
        if self._grants is not None:
            self._grants.accept_server_time(answer.server_time_ms)
        self._state = attrs.evolve(self._state, heartbeats=self._state.heartbeats + 1)
        self._record_success(status)
        return True

    def _current_load(self) -> float | None:
        if self._load is None:
            return None
        try:
            load = self._load()
            load = None if load is None else float(load)
        except BaseException as exc:  # noqa: BLE001 - not even SystemExit from the callback may end the heartbeats
            if not self._load_failed:
                _log.warning(
                    "heartbeats of worker %s carry no load, because its callback failed: %r",
                    self._worker_id,
                    exc,
                    exc_info=exc,
                )
            self._load_failed = True
            return None
        return None if load is None or math.isnan(load) else min(1.0, max(0.0, load))

    def _record_success(self, status: p2p_pb2.SourceStatus) -> None:
        self._succeeded_at = time.monotonic()
        self._state = attrs.evolve(self._state, status=_STATUS_NAMES[status], failures_in_a_row=0, last_error="")

    def _record_failure(self, exc: Exception) -> float | None:
        """Count and log the failure; return seconds until a retry, or None if a retry cannot help."""
        in_a_row = self._state.failures_in_a_row + 1
        headline = exc.headline if isinstance(exc, ModelExpressError) else f"{type(exc).__name__}: {exc}"
        self._state = attrs.evolve(
            self._state, failures=self._state.failures + 1, failures_in_a_row=in_a_row, last_error=headline
        )
        retryable = isinstance(exc, BackendError) and exc.retryable
        # Log one outage once, although its messages differ from call to call.
        failure = type(exc).__name__ if retryable else headline
        if failure not in self._logged:
            self._logged.add(failure)
            _log.warning("the server does not accept the record of worker %s: %s", self._worker_id, exc)
        if not retryable:
            return None
        cap = self._interval_seconds * _MAX_RETRY_INTERVAL_SHARE
        return _RANDOM.uniform(0, min(cap, _FIRST_RETRY_SECONDS * 2 ** min(in_a_row - 1, 30)))

    def _mark_stale(self, until: float) -> None:
        """Mark the record stale; try at least once."""
        while self._publish_attempted:
            try:
                self._beat(_STALE)
            except Exception as exc:  # noqa: BLE001 - the server will notice that heartbeats end
                wait = self._record_failure(exc)
                if wait is None or time.monotonic() + wait >= until:
                    return
                time.sleep(wait)
            else:
                self._record_success(_STALE)  # a server that does not know the worker does not offer it either
                return


#: Publishers to withdraw when the process ends. Replaced, never changed: a signal handler may read it at any time.
_publishers: tuple[weakref.ref[Publisher], ...] = ()

#: The process that has the exit handlers.
_watched_pid: int | None = None


def withdraw_on_exit(publisher: Publisher) -> None:
    """Withdraw ``publisher`` when the process exits, raises an exception, or receives SIGTERM.

    After that, SIGTERM has its usual effect: a Python handler that was installed before is called; without one the
    signal ends the process. A process that ignores SIGTERM still ignores it. Python runs signal handlers in the main
    thread, between two bytecodes: not during a long call into C. A call of this function from another thread cannot
    install the handler.

    Args:
        publisher: A started publisher. It is withdrawn in the process that called this, not in forked children.
    """
    global _publishers  # noqa: PLW0603 - there is one end of a process
    _publishers = (*(each for each in _publishers if each() is not None), weakref.ref(publisher))
    _watch_exit()
    if threading.current_thread() is not threading.main_thread():
        _log.debug("called outside the main thread: worker records are not withdrawn on SIGTERM")
        return
    previous = signal.getsignal(signal.SIGTERM)
    # None: a handler that was not installed from Python, which Python cannot call.
    if previous in {signal.SIG_IGN, None} or isinstance(previous, _OnTermination):
        return
    signal.signal(signal.SIGTERM, _OnTermination(previous))


def _watch_exit() -> None:
    """Register exit handlers, once per process. Children of multiprocessing skip ``atexit`` and run finalizers."""
    global _watched_pid  # noqa: PLW0603 - as above
    if _watched_pid == os.getpid():
        return
    _watched_pid = os.getpid()
    atexit.register(_withdraw_all)
    if multiprocessing.parent_process() is not None:
        multiprocessing.util.Finalize(None, _withdraw_all, exitpriority=0)


class _OnTermination:
    """Withdraws all publishers, then lets the signal have its usual effect.

    The handler makes no call itself: the interrupted code may hold the locks that a call takes.
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
