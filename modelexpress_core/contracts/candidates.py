"""The request of a load, and the places that it may read from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum

import attrs
from attrs import field, frozen

from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.immutable import unmodifiable
from modelexpress_core.uri import ModelURI

__all__ = ["Candidate", "LoadRequest", "Peer", "Skipped", "Tier"]


class Tier(IntEnum):
    """Position of a place in the order of attempts, lowest first. The record of its plugin sets it."""

    FABRIC_PEER = 10
    PEER = 20
    OTHER_PEER = 30
    CACHE = 40
    ORIGIN = 50


@frozen
class LoadRequest:
    """The request of a load, as discoveries and ranking get it.

    Attributes:
        uri: The checkpoint, after ``mx_rewrite_uri``.
        identity: The model as it will be in this worker's memory. None if the load cannot read from peers; then no
            discovery is called.
        worker_rank: Rank of this worker. Only peers of the same rank hold the same bytes.
        reader: Id of the reading worker, or another text that identifies it. Readers are spread over peers by it.
        selector: How one of several peers is chosen: ``"random"``, ``"rendezvous_hash"`` or ``"load_aware"``.
        assumed_transports: Schemes of the transports that read workers that do not publish which they support.
        on_skipped: Called for each place that is left out; None if nobody asks, as in a load.
    """

    uri: ModelURI
    identity: SourceIdentity | None = None
    worker_rank: int = 0
    reader: str = ""
    selector: str = "load_aware"
    assumed_transports: tuple[str, ...] = ()
    on_skipped: Callable[[Skipped], None] | None = field(default=None, eq=False, repr=False)

    def skip(self, place: str, reason: str, hint: str = "") -> None:
        """Say why a place is left out, if somebody asks."""
        if self.on_skipped is not None:
            self.on_skipped(Skipped(place, (reason,), hint))


@frozen
class Peer:
    """A worker that holds the weights, as a discovery found it.

    Attributes:
        source_id: The ``mx_source_id`` of the weights that it holds.
        worker_id: Id of the worker.
        worker_rank: Rank of the worker.
        accelerator: Architecture of the device that holds the weights.
        load: Load that the worker reports, from 0 to 1; None if it reports none.
        updated_at_ms: Time of its last publication or heartbeat, in milliseconds since 1970 by the server's clock.
        topology: Location of the worker, and other facts that it publishes.
        server: URL of the server that listed it, and that grants reading it; empty if none did.
    """

    source_id: str = field(validator=attrs.validators.instance_of(str))
    worker_id: str = field(validator=attrs.validators.instance_of(str))
    worker_rank: int = 0
    accelerator: str = ""
    load: float | None = field(default=None, converter=attrs.converters.optional(float))
    updated_at_ms: int = 0
    topology: Mapping[str, str] = field(factory=dict, converter=unmodifiable, hash=False)
    server: str = ""


@frozen
class Candidate:
    """A place that may hold the weights.

    Attributes:
        uri: Address of the place; its scheme selects the plugin.
        origin: Where the candidate comes from: ``"caller"``, or the name of a discovery.
        peer: The worker whose memory is read; None for a place that holds files.
        tier: Position in the order of attempts; core sets it from the record of the plugin that reads it.
    """

    uri: ModelURI = field(validator=attrs.validators.instance_of(ModelURI))
    origin: str = field(default="caller", validator=attrs.validators.instance_of(str))
    peer: Peer | None = field(default=None, validator=attrs.validators.optional(attrs.validators.instance_of(Peer)))
    tier: Tier = field(default=Tier.ORIGIN, converter=Tier)

    @property
    def is_peer(self) -> bool:
        """Whether a transport reads it from the memory of a worker; else a storage reads files."""
        return self.peer is not None or self.tier < Tier.CACHE


@frozen
class Skipped:
    """A place that a load does not try, with the reasons; ``mx explain`` shows it.

    Attributes:
        place: Redacted URI of the place, or a text that names it.
        reasons: Why it is left out: clauses whose subject is the place. Empty if ``identity`` alone is the reason.
        hint: What to do about it; empty if nothing can be done.
        peer: The worker, if it is one that published a record.
        identity: The identity that the worker published, if it differs from the request's.
        uris: Where the worker would be read.
    """

    place: str
    reasons: tuple[str, ...]
    hint: str = ""
    peer: Peer | None = None
    identity: SourceIdentity | None = None
    uris: tuple[ModelURI, ...] = ()
