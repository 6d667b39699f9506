"""What a metadata store has to do: keep who holds which model, and tell it fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Protocol

from attrs import field, frozen

from modelexpress_core.immutable import unmodifiable

__all__ = [
    "Listing",
    "MetadataStore",
    "NotPublisherError",
    "Reaped",
    "SourceQuery",
    "SourceRecord",
    "SourceStatus",
    "StoreUnavailableError",
    "StoredSource",
]


class SourceStatus(IntEnum):
    """What state a source is in, by its number in the protocol."""

    UNKNOWN = 0
    INITIALIZING = 1
    READY = 2
    STALE = 3


class StoreUnavailableError(Exception):
    """The store cannot be asked now. Never told as an empty answer."""


class NotPublisherError(Exception):
    """Somebody wants to change a record that another published.

    Args:
        worker_id: The worker of the record.
    """

    def __init__(self, worker_id: str) -> None:
        super().__init__(f"{worker_id} was published by another")


@frozen
class SourceRecord:
    """What lists show of a source.

    Attributes:
        source_id: The ``mx_source_id`` of its identity.
        worker_id: The worker that holds it.
        model_name: Of its identity.
        worker_rank: Rank of the worker.
        status: What state it is in (a number that this version does not know is kept).
        updated_at_ms: When the worker last spoke, in milliseconds since 1970 by the clock of the store.
        accelerator: What the worker's tensors are on.
        topology: Where the worker is.
        training_step: Of the weights, where the identity tells it.
        layout_signature: Of the tensors, where the identity tells it.
        source_load: How busy the worker is, where it says so.
        publisher: Who published it; empty where nobody has to prove who they are.
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


@frozen
class StoredSource:
    """A source with all that its worker published.

    Attributes:
        record: What lists show.
        identity: The serialised identity.
        worker: The serialised metadata of the worker, but for status and time, which the record has.
        as_of_ms: When the store said so, in milliseconds since 1970 by its clock.
    """

    record: SourceRecord
    identity: bytes
    worker: bytes
    as_of_ms: int = 0


@frozen
class Listing:
    """What a store has found.

    Attributes:
        records: In any order.
        as_of_ms: When the store said so, in milliseconds since 1970 by its clock.
    """

    records: Sequence[SourceRecord]
    as_of_ms: int


@frozen
class SourceQuery:
    """Which sources are asked for; all by default.

    Attributes:
        source_id: Only those with this id.
        model_name: Only those of this model.
        status: Only those in this state.
    """

    source_id: str | None = None
    model_name: str | None = None
    status: int | None = None


@frozen
class Reaped:
    """What a reaper did.

    Attributes:
        stale: Sources that became stale.
        removed: Sources that were removed.
    """

    stale: int = 0
    removed: int = 0


class MetadataStore(Protocol):
    """Keeps sources. Each method is atomic, for all servers that share the store.

    Times are the store's own, so that servers and workers may have clocks that differ.

    Raises:
        StoreUnavailableError: By each method, where the store cannot be asked.
    """

    async def publish(self, source: StoredSource) -> None:
        """Keep ``source`` in place of what was there under its ids, as of now.

        Raises:
            NotPublisherError: Another publisher's record is there.
        """

    async def get(self, source_id: str, worker_id: str) -> StoredSource | None:
        """The source with these ids, if there is one."""

    async def list(self, query: SourceQuery) -> Listing:
        """The sources that ``query`` asks for. Those that it does not ask for cost nothing."""

    async def update(
        self, source_id: str, worker_id: str, status: int, source_load: float | None, publisher: str
    ) -> bool:
        """Set the state of a source (and its load, where given), as of now; False where there is no such source.

        Raises:
            NotPublisherError: Another publisher's record it is.
        """

    async def reap(self, stale_after_seconds: float, removed_after_seconds: float) -> Reaped:
        """Make sources stale whose worker has been silent so long, and remove stale ones after so long a silence."""

    async def counts(self) -> Mapping[int, int]:
        """How many sources are in each state."""

    async def lead(self, role: str, holder: str, seconds: float) -> bool:
        """Whether ``holder`` has ``role`` for the next ``seconds``: it had it already, or nobody else has it."""

    async def check(self) -> None:
        """Return where the store can be asked."""

    async def close(self) -> None:
        """Give up what it holds open."""
