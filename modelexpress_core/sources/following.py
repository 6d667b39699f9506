"""Lets workers that start together read storage once: the first one loads from it, the others wait for that worker.

A worker announces itself before it loads, with a record in the status INITIALIZING. The records of equal tensors form a
queue. Its order needs no clock: each worker takes a number above all that it sees, and says before that it takes one
(Lamport, "A New Solution of Dijkstra's Concurrent Programming Problem", 1974). The worker at the head reads storage.
The others wait until a worker is ready, until all before them are gone, or until ``MX_FOLLOW`` is over. A worker leaves
the queue if its load fails, or if its heartbeats stop. After a load it stays, until it is ready to be read.

The queue saves reads. Nothing relies on it to be right: if two workers read storage, both load the same weights.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attrs import field, frozen

from modelexpress_core.contracts.candidates import LoadRequest
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.contracts.metadata_store import PodReference
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import BackendError, InvalidURIError, ModelExpressError
from modelexpress_core.messages import printable
from modelexpress_core.settings import from_env
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.discovery.finding import asks_server
from modelexpress_core.sources.discovery.server import ENDPOINT_KEY
from modelexpress_core.sources.publishing import Publisher, withdraw_on_exit
from modelexpress_core.sources.settings import (
    FollowSettings,
    PodSettings,
    PublishingSettings,
    ServerAddress,
    TrustSettings,
)
from modelexpress_core.sources.trust import Claim, reason_to_distrust, reason_to_distrust_publisher
from modelexpress_core.wire.identities import identity_to_message
from modelexpress_core.wire.proto.modelexpress import p2p_pb2

__all__ = ["FOLLOW_KEY", "Announcement", "Waited", "in_turn", "take_announcement", "withdraw_announcements"]

_log = logging.getLogger(__name__)

#: Key in a worker's topology for its number in the queue; 0 while it takes one.
FOLLOW_KEY = "mx_follow"

#: Numbers have so many digits: a worker with the largest one does not keep others from taking one.
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)
_LARGEST_NUMBER = 999_999_999

#: Time between two looks at the queue.
_LOOK_SECONDS = 1.0

#: How long a server may fail to answer before a worker no longer waits.
_SILENT_SECONDS = 30.0

#: How long a worker looks for its own record: replicas of a server may see it a little later.
_VISIBLE_SECONDS = 5.0

#: Random numbers of the operating system: engines seed Python's generator, all with the same seed.
_RANDOM = random.SystemRandom()


@frozen
class Waited:
    """How the wait of a worker ended.

    Attributes:
        followed: Whether another worker is ready to be read.
        reason: Why it waits no longer, as a clause.
        seconds: How long it waited.
    """

    followed: bool
    reason: str
    seconds: float


class Announcement:
    """The record of a worker that is about to load.

    Args:
        client: The server, which ``withdraw`` closes.
        identity: The tensors as they will be in memory, with their content version.
        worker_rank: Rank of the part that is loaded.
        trust: Which records are believed.
        interval_seconds: Time between heartbeats.
        pod: The worker's pod.
        clock: A monotonic clock, in seconds.
        pause: Waits for some seconds.

    Attributes:
        worker_id: Name of the worker.
        number: Its number in the queue.

    Raises:
        ModelExpressError: The server does not accept the record.
    """

    def __init__(
        self,
        client: ServerClient,
        identity: SourceIdentity,
        worker_rank: int,
        *,
        trust: TrustSettings,
        interval_seconds: float = 30.0,
        pod: PodReference | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Any] = time.sleep,
    ) -> None:
        self._client = client
        self._identity = identity
        self._trust = trust
        self._interval_seconds = interval_seconds
        self._pod = pod
        self._clock = clock
        self._pause = pause
        self._pid = os.getpid()
        self._caller = ""
        self._seen = False  # this worker was in the queue
        self._head = ""
        self._missing_since: float | None = None
        self._decides_at = 0.0
        self.worker_id = uuid.uuid4().hex
        self._record = p2p_pb2.WorkerMetadata(
            worker_rank=worker_rank, status=p2p_pb2.SOURCE_STATUS_INITIALIZING, accelerator=identity.gpu_arch
        )
        self.number = 0
        self._publish()
        try:
            self.number = min(1 + max(self._queue().values(), default=0), _LARGEST_NUMBER)
            self._publish()
            self._publisher = Publisher(
                client,
                identity,
                self._record,
                self.worker_id,
                interval_seconds=interval_seconds,
                pod=pod,
                published=True,
            )
            self._publisher.start()
        except BaseException:
            self._mark_stale()
            raise
        withdraw_on_exit(self._publisher)

    def wait(self, seconds: float) -> Waited:
        """Wait until a worker is ready to be read, or until no worker is before this one, for at most ``seconds``."""
        begun = answered = self._decides_at = self._clock()
        self._head, self._missing_since = "", None
        while True:
            now = self._clock()
            head = self._head
            try:
                ended = self._look(now)
                answered = now
            except ModelExpressError as exc:
                ended = None
                if not (isinstance(exc, BackendError) and exc.retryable) or now - answered >= _SILENT_SECONDS:
                    ended = False, f"the server does not say who loads: {exc.headline}"
            left = begun + seconds - now
            if ended is None and left <= 0:
                ended = False, f"MX_FOLLOW is over ({seconds:g} s)"
            if ended is not None:
                return Waited(*ended, now - begun)
            if self._head and self._head != head:
                name, model = printable(self._head), printable(self._identity.model_name)
                _log.info("waiting up to %.0f s (MX_FOLLOW) for worker %s, which loads %s first", left, name, model)
            self._pause(min(_RANDOM.uniform(0.5, 1.0) * _LOOK_SECONDS, left))

    def _look(self, now: float) -> tuple[bool, str] | None:
        """Look once; return whether another worker is ready, and why the wait ends, or None to wait on."""
        if ready := self._ready_worker():
            return True, f"worker {ready} is ready"
        head = self._first_before(self._head)
        self._head = head or ""
        if head is None:
            return self._on_missing(now)
        self._missing_since = None
        if head or now < self._decides_at:
            return None
        return False, "no worker that is alive is before this one"

    def _on_missing(self, now: float) -> tuple[bool, str] | None:
        """React to a queue without this worker: records were lost, or a replica does not have this one yet."""
        if self._seen:
            with contextlib.suppress(ModelExpressError):  # the next heartbeat tries, too
                self._publish()
            self._decides_at = now + self._interval_seconds  # by then the others have published theirs again
            return None
        self._missing_since = now if self._missing_since is None else self._missing_since
        if now - self._missing_since < _VISIBLE_SECONDS:
            return None
        return False, "the server does not list this worker"

    def expire_after(self, seconds: float | None) -> None:
        """Leave the queue after ``seconds``, unless the worker is offered before; None to stay."""
        self._publisher.expire_after(seconds)

    def release(self) -> None:
        """End, and leave the record to an offer under the same name, which says its number. It may follow at once."""
        if self._publisher.release():
            self._client.close()
        else:
            self.withdraw()

    def withdraw(self) -> None:
        """Leave the queue. Further calls do nothing."""
        self._publisher.withdraw()
        if os.getpid() == self._pid:
            self._client.close()

    @property
    def is_usable(self) -> bool:
        """Whether the record is that of this process, and was not withdrawn."""
        return os.getpid() == self._pid and self._publisher.is_running

    # -- the server ---------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        self._record.topology[FOLLOW_KEY] = str(self.number)
        answer = self._client.publish(self._identity, self._record, self.worker_id, self._pod)
        if not answer.success:
            message = f"the server {self._client.url} refused the record of this worker: {answer.message}"
            raise ModelExpressError(message, hint="see its limits, or unset MX_FOLLOW")

    def _mark_stale(self) -> None:
        """Let nobody wait for a record that has no publisher."""
        request = p2p_pb2.UpdateStatusRequest(
            mx_source_id=self._identity.source_id,
            worker_rank=self._record.worker_rank,
            worker_id=self.worker_id,
            status=p2p_pb2.SOURCE_STATUS_STALE,
        )
        with contextlib.suppress(ModelExpressError):  # the server notices that no heartbeats come
            self._client.update_status(request)

    def _list(self, status: p2p_pb2.SourceStatus) -> p2p_pb2.ListSourcesResponse:
        query = p2p_pb2.ListSourcesRequest(
            identity=identity_to_message(self._identity),
            status_filter=status,
            worker_rank_filter=self._record.worker_rank,
        )
        answer = self._client.listing(query)
        self._caller = answer.caller
        return answer

    def _ready_worker(self) -> str:
        """Return the id of a worker that a reader believes to be ready; empty if there is none."""
        for source in self._list(p2p_pb2.SOURCE_STATUS_READY).instances:
            if source.worker_id == self.worker_id or source.worker_rank != self._record.worker_rank:
                continue
            try:
                endpoint = Endpoint.parse(source.topology.get(ENDPOINT_KEY, ""))
            except InvalidURIError:
                continue
            claim = Claim(endpoint, source.publisher, source.publisher_address)
            if not reason_to_distrust(claim, self._caller, self._trust):
                return printable(source.worker_id)
        return ""

    def _first_before(self, known: str) -> str | None:
        """Return the worker at the head of the queue; empty if it is this one, None if this one is not in the queue.

        Args:
            known: The worker that was at the head. While it stays before this one, the queue is not listed: the list
                grows with the number of those who wait.
        """
        if known:
            answer = self._client.metadata(self._identity.source_id, known)
            initializing = answer.worker.status == p2p_pb2.SOURCE_STATUS_INITIALIZING
            number = _number(answer.worker.topology)
            if answer.found and initializing and number is not None and (number, known) < (self.number, self.worker_id):
                return known
        queue = self._queue()
        if self.worker_id not in queue:
            return None
        self._seen = True
        number, first = min((number, worker_id) for worker_id, number in queue.items())
        return first if (number, first) < (self.number, self.worker_id) else ""

    def _queue(self) -> Mapping[str, int]:
        """Return the numbers of the workers that load, by id, of which this worker believes the records."""
        listed = self._list(p2p_pb2.SOURCE_STATUS_INITIALIZING).instances
        numbers = ((source, _number(source.topology)) for source in listed)
        return {
            source.worker_id: number
            for source, number in numbers
            if number is not None
            and source.worker_rank == self._record.worker_rank
            and not reason_to_distrust_publisher(source.publisher, self._caller, self._trust)
        }


def _number(topology: Mapping[str, str]) -> int | None:
    """Return the number of a worker in the queue; None if it is not in it, as those of other clients."""
    text = topology.get(FOLLOW_KEY, "")
    return int(text) if _NUMBER.fullmatch(text) else None


@frozen
class Turn:
    """The turn of a worker to load.

    Attributes:
        waited: How its wait ended; None if it did not wait.
    """

    waited: Waited | None = None
    _announcement: Announcement | None = field(default=None, repr=False)

    def withdraw(self) -> None:
        """Leave the queue at once: nothing is loaded that others could read."""
        if self._announcement is not None:
            self._announcement.withdraw()


#: Announcements of loads that have ended, until an offer takes them, by server, source and rank.
_held: dict[tuple[str, str, int], list[Announcement]] = {}
_holding = threading.Lock()


@contextlib.contextmanager
def in_turn(environ: Mapping[str, str], request: LoadRequest) -> Iterator[Turn]:
    """Announce the load of ``request``, wait for its turn, and leave the queue if the block raises.

    After the block, the announcement stays for MX_FOLLOW seconds, or until an offer of the same tensors replaces it.
    Without MX_FOLLOW, a content version, or a server that is asked for workers, this does nothing.
    """
    seconds, identity = from_env(FollowSettings, environ).seconds, request.identity
    if seconds is None or identity is None or not identity.content_version:
        yield Turn()
        return
    if not asks_server(environ):
        _log.warning("MX_FOLLOW has no effect, because no server lists the workers: set MODEL_EXPRESS_URL")
        yield Turn()
        return
    announcement = _announce(environ, identity, request.worker_rank)
    if announcement is None:
        yield Turn()
        return
    try:
        waited = announcement.wait(seconds)
        told = "reading from other workers" if waited.followed else "loading without other workers"
        _log.info("%s after a wait of %.1f s, because %s", told, waited.seconds, waited.reason)
        yield Turn(waited, announcement)
    except BaseException:
        announcement.withdraw()
        raise
    if announcement.is_usable:
        announcement.expire_after(seconds)
        with _holding:
            _held.setdefault(_key(environ, identity.source_id, request.worker_rank), []).append(announcement)


def take_announcement(environ: Mapping[str, str], identity: SourceIdentity, worker_rank: int) -> Announcement | None:
    """Return the announcement of a load of these tensors that has ended in this process, which the caller then owns."""
    key = _key(environ, identity.source_id, worker_rank)
    with _holding:
        usable = [announcement for announcement in _held.pop(key, []) if announcement.is_usable]
        if usable[1:]:
            _held[key] = usable[1:]
    if not usable:
        return None
    usable[0].expire_after(None)
    return usable[0]


def withdraw_announcements() -> None:
    """Withdraw the announcements of all loads that have ended in this process: it will not offer what it loaded."""
    with _holding:
        held = [announcement for announcements in _held.values() for announcement in announcements]
        _held.clear()
    for announcement in held:
        announcement.withdraw()


def _key(environ: Mapping[str, str], source_id: str, worker_rank: int) -> tuple[str, str, int]:
    return from_env(ServerAddress, environ).url, source_id, worker_rank


def _announce(environ: Mapping[str, str], identity: SourceIdentity, worker_rank: int) -> Announcement | None:
    held = take_announcement(environ, identity, worker_rank)
    if held is not None:
        return held
    client = ServerClient.from_env(environ)
    try:
        return Announcement(
            client,
            identity,
            worker_rank,
            trust=from_env(TrustSettings, environ),
            interval_seconds=from_env(PublishingSettings, environ).interval_seconds,
            pod=from_env(PodSettings, environ).reference(),
        )
    except ModelExpressError as exc:
        client.close()
        _log.warning("not waiting for other workers (MX_FOLLOW), because this one could not announce itself: %s", exc)
        return None
