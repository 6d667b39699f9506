"""What every metadata store does: it keeps which worker holds which model, and elects leaders among servers.

What a store promises:

- **Each record is atomic.** A call changes a record as a whole or not at all, and no change between its look at the
  record and its own change is lost. A call that concerns many records (``list``, ``reap``, ``counts``) takes them one
  by one: together they are of no single moment.
- **A call sees what earlier calls wrote** through the same store object. What another server wrote may take a moment;
  a quota, too, counts it then. A store may answer from a copy if it knows how old the copy is: where nothing has
  confirmed it for longer than a bound, the answer is ``StoreUnavailableError``. The reason: an API server pushes its
  changes to copies, and a broken connection pushes nothing.
- **A heartbeat that changes nothing but the time and the load may take longer**: another server sees it at the latest a
  third of the time-out of heartbeats later, and if this server is killed before that, the heartbeat is lost. The worker
  then looks older until its next one. The reason: an API server is not made for thousands of writes a minute.
- **Times are of one clock, the store's**, in milliseconds since 1970. A store has a clock (Redis), or is given one when
  it is made (``MemoryStore(clock)``), such as the clock of the server's machine. Where servers that share a store give
  it their own clocks, these must differ by much less than the time-out of heartbeats. The time between a record's last
  heartbeat and the answer, ``as_of_ms - updated_at_ms``, should not shrink when the wall clock is set back.
- **A record that cannot be read harms no other.** Lists leave it out and count it; ``get`` raises
  ``UnreadableRecordError``. The worker's next publication replaces it.
- **A lease** (``lead``) has one holder at a time, and its token grows with each change of holder.

It promises no more: a store may be a database with transactions, or an API server that has conflicts for each object
and no clock to ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Protocol

from attrs import field, frozen

from modelexpress_core.immutable import unmodifiable

__all__ = [
    "LeaderLease",
    "Listing",
    "MetadataStore",
    "NotPublisherError",
    "PodReference",
    "Quota",
    "Reaped",
    "SourceQuery",
    "SourceRecord",
    "SourceStatus",
    "StoreFullError",
    "StoreUnavailableError",
    "StoredSource",
    "UnreadableRecordError",
]

#: Memory that a record takes beside its own bytes: objects, keys and indexes.
_RECORD_OVERHEAD_BYTES = 4096


class SourceStatus(IntEnum):
    """What state a source is in, by its number in the protocol."""

    UNKNOWN = 0
    INITIALIZING = 1
    READY = 2
    STALE = 3


class StoreUnavailableError(Exception):
    """The store does not answer. An empty answer never stands for this error."""


class NotPublisherError(Exception):
    """The record belongs to another publisher, who alone may change it.

    Args:
        worker_id: The worker of the record.
    """

    def __init__(self, worker_id: str) -> None:
        super().__init__(f"{worker_id} was published by another")


class UnreadableRecordError(Exception):
    """What is stored under these ids is no record.

    Args:
        source_id: Its source.
        worker_id: Its worker.
    """

    def __init__(self, source_id: str, worker_id: str) -> None:
        super().__init__(f"the record of worker {worker_id!r} of source {source_id!r} cannot be read")


class StoreFullError(Exception):
    """A record was not stored, because a quota would be exceeded.

    Attributes:
        of_owner: Whether it is the quota of the owner; otherwise it is the quota of all records.
    """

    def __init__(self, *, of_owner: bool) -> None:
        super().__init__("the quota of the owner is used up" if of_owner else "the quota of all records is used up")
        self.of_owner = of_owner


@frozen
class Quota:
    """How many bytes of records a store keeps. A replaced record counts no longer.

    Attributes:
        owner: Whose records are limited: the caller that publishes.
        owner_bytes: Bytes of all records of this owner.
        total_bytes: Bytes of all records.
    """

    owner: str
    owner_bytes: int
    total_bytes: int


@frozen
class SourceRecord:
    """The part of a source that lists return.

    Attributes:
        source_id: The ``mx_source_id`` of its identity.
        worker_id: The worker that holds it.
        model_name: Name of the model, from its identity.
        worker_rank: Rank of the worker.
        status: Its state; an unknown number is kept as it is.
        updated_at_ms: Time of the last publication or heartbeat, in milliseconds since 1970 by the store's clock.
        accelerator: Architecture of the device that holds the tensors.
        topology: Location of the worker, and other facts that it publishes.
        training_step: Training step of the weights; None if the identity has none.
        layout_signature: Digest of the tensors' layout; None if the identity has none.
        source_load: Load of the worker, from 0 to 1; None if it reports none.
        publisher: Name of the authenticated publisher; empty if the server authenticates no callers.
        publisher_address: IP address from which an authenticated publisher published it; else empty.
    """

    source_id: str
    worker_id: str
    model_name: str
    worker_rank: int = 0
    status: int = SourceStatus.UNKNOWN
    updated_at_ms: int = 0
    accelerator: str = ""
    topology: Mapping[str, str] = field(factory=dict, converter=unmodifiable, hash=False)
    training_step: int | None = None
    layout_signature: str | None = None
    source_load: float | None = None
    publisher: str = ""
    publisher_address: str = ""


@frozen
class PodReference:
    """The pod of Kubernetes in which a worker runs, as the worker itself says.

    Attributes:
        name: Its name.
        uid: Its uid.
        namespace: Its namespace.
    """

    name: str
    uid: str
    namespace: str


@frozen
class StoredSource:
    """A source with everything that its worker published.

    Attributes:
        record: The part that lists return.
        identity: The serialised identity.
        worker: The serialised metadata of the worker, without status and time, which the record has.
        as_of_ms: Time of the answer, in milliseconds since 1970 by the store's clock; ignored by ``publish``.
        grant_key: Key that signs read grants for this worker; empty if the server authenticates no callers. A secret
            of the server and the worker.
        pod: The worker's pod, if it says so: a store in Kubernetes removes the source with it. Other stores ignore it,
            and ``get`` never has it.
    """

    record: SourceRecord
    identity: bytes
    worker: bytes
    as_of_ms: int = 0
    grant_key: bytes = field(default=b"", repr=False)
    pod: PodReference | None = field(default=None, eq=False)

    @property
    def size_bytes(self) -> int:
        """What a quota counts: all bytes of the source, and a fixed part for objects and indexes."""
        record = self.record
        texts = (record.source_id, record.worker_id, record.model_name, record.accelerator, record.publisher)
        topology = (text for entry in record.topology.items() for text in entry)
        layout = record.layout_signature or ""
        strings = sum(len(text.encode()) for text in (*texts, *topology, layout))
        return len(self.identity) + len(self.worker) + strings + _RECORD_OVERHEAD_BYTES


@frozen
class Listing:
    """The answer to a query.

    Attributes:
        records: The records that match, in any order.
        as_of_ms: Time of the answer, in milliseconds since 1970 by the store's clock.
        unreadable: Number of records that were left out, because they cannot be read.
    """

    records: Sequence[SourceRecord]
    as_of_ms: int
    unreadable: int = 0


@frozen
class SourceQuery:
    """A filter for sources; by default every source matches.

    Attributes:
        source_id: Only sources with this id.
        model_name: Only sources of this model.
        status: Only sources in this state.
    """

    source_id: str | None = None
    model_name: str | None = None
    status: int | None = None


@frozen
class Reaped:
    """The result of one run of the reaper.

    Attributes:
        stale: Number of sources that became stale.
        removed: Number of sources that were removed.
    """

    stale: int = 0
    removed: int = 0


@frozen
class LeaderLease:
    """A role that one holder has for a limited time.

    The holder may act for as many seconds as it asked for, counted on its own monotonic clock from just before it
    called ``lead``. A holder that is slow may still act after that, when another has the role: therefore whatever it
    writes to carries the token along, and refuses a token smaller than the largest that it has seen (a *fencing
    token*).

    Attributes:
        role: The role.
        holder: Its holder.
        token: Grows with each change of holder. A renewal in time keeps it. It is a number from 1 to 2**63 - 1; it says
            nothing beyond the order.
    """

    role: str
    holder: str
    token: int


class MetadataStore(Protocol):
    """Keeps sources, and leases of leaders. See the top of this module for what is promised of each call.

    Raises:
        StoreUnavailableError: By each method, if the store does not answer.
    """

    async def publish(self, source: StoredSource, quota: Quota | None = None) -> None:
        """Store ``source``, with the present time, in place of any record with the same ids.

        Args:
            source: The source.
            quota: Bytes that the store may hold with it, by ``StoredSource.size_bytes``; None for no limit. Records
                that were published without a quota have no owner, and count in the total.

        Raises:
            NotPublisherError: That record belongs to another publisher.
            StoreFullError: The quota would be exceeded. What was stored before stays.
        """

    async def get(self, source_id: str, worker_id: str) -> StoredSource | None:
        """The source with these ids; None if there is none.

        Raises:
            UnreadableRecordError: What is stored there is no record.
        """

    async def list(self, query: SourceQuery) -> Listing:
        """The sources that match ``query``. Sources that do not match should cost little.

        Long lists should not hold up other calls: let the event loop run in between.
        """

    async def update(
        self, source_id: str, worker_id: str, status: int, source_load: float | None, publisher: str
    ) -> bool:
        """Set the state of a source, its time to the present, and its load unless that is None.

        Returns:
            Whether there is such a source.

        Raises:
            NotPublisherError: The record belongs to another publisher.
        """

    async def reap(self, stale_after_seconds: float, removed_after_seconds: float) -> Reaped:
        """Mark silent sources as stale, and remove stale sources that have been silent for longer.

        It may take record by record, and pass over a record that changes meanwhile: the next run finds it again. Two
        servers may reap at once; no source is marked or removed that was not silent for so long.

        Args:
            stale_after_seconds: Seconds without a heartbeat after which a source is stale.
            removed_after_seconds: Seconds without a heartbeat after which a stale source is removed.
        """

    async def counts(self) -> Mapping[int, int]:
        """The number of sources in each state."""

    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        """Take or renew the lease of ``role``.

        The holder keeps the role by asking again in time. If it does not, another holder that keeps asking gets the
        role at the earliest ``seconds`` after the holder's last successful call, and at the latest a small multiple of
        that: a store without a clock to ask may first have to watch for ``seconds`` that the lease is not renewed.

        A larger token than all before it is given with each change of holder, also after the lease expired and after
        the store was restarted, as far as the store kept its data. If a holder takes the role again that it let expire,
        and none had it in between, the token stays or grows.

        Args:
            role: Name of the role.
            holder: Name of the holder, which no other server uses.
            seconds: How long the lease lasts.

        Returns:
            The lease; None if another holder has the role.
        """

    async def leader(self, role: str) -> LeaderLease | None:
        """The lease of the one that has ``role`` now; None if nobody has it.

        A store without a clock to ask may still answer with a lease that has ended, until another holder has the role.
        """

    async def check(self) -> None:
        """Return if the store answers."""

    async def close(self) -> None:
        """Close connections and files."""
