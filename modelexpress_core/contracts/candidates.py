"""What a load is asked for, and the places that may hold it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import attrs
from attrs import field, frozen

from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.immutable import unmodifiable
from modelexpress_core.uri import ModelURI

__all__ = ["Candidate", "LoadRequest", "Peer", "Tier"]


class Tier(IntEnum):
    """When a place is tried: those of a lower tier first. The record of a plugin says which tier its places have."""

    FABRIC_PEER = 10
    PEER = 20
    OTHER_PEER = 30
    CACHE = 40
    ORIGIN = 50


@frozen
class LoadRequest:
    """What a load is asked for, as discoveries and ranking see it.

    Attributes:
        uri: The checkpoint, after ``mx_rewrite_uri``.
        identity: The model as it will be in this worker's memory; None where peers are of no use.
        worker_rank: Which part of it this worker holds: only peers of the same rank have the same bytes.
        reader: Who asks: the worker's id, or anything that tells it from others. Readers are spread by it.
        selector: How one of several peers is chosen: ``"random"``, ``"rendezvous_hash"`` or ``"load_aware"``.
        assumed_transports: Schemes of the transports by which workers are read that do not say which they speak.
    """

    uri: ModelURI
    identity: SourceIdentity | None = None
    worker_rank: int = 0
    reader: str = ""
    selector: str = "load_aware"
    assumed_transports: tuple[str, ...] = ()


@frozen
class Peer:
    """A worker that holds what the load needs, as a discovery knows it.

    Attributes:
        source_id: What it holds: the ``mx_source_id`` of its identity.
        worker_id: Who it is.
        worker_rank: Which part it holds.
        accelerator: What holds it.
        load: How busy it says it is, from 0 to 1; None where it does not say.
        updated_at_ms: When it last said something, in milliseconds since 1970, by the clock of whoever was told.
        topology: Where it is, and what else it says of itself.
    """

    source_id: str = field(validator=attrs.validators.instance_of(str))
    worker_id: str = field(validator=attrs.validators.instance_of(str))
    worker_rank: int = 0
    accelerator: str = ""
    load: float | None = field(default=None, converter=attrs.converters.optional(float))
    updated_at_ms: int = 0
    topology: Mapping[str, str] = field(factory=dict, converter=unmodifiable, hash=False)


@frozen
class Candidate:
    """A place that may hold what the load needs.

    Attributes:
        uri: Where; its scheme picks the plugin.
        origin: Who named it: ``"caller"``, or the name of a discovery.
        peer: The worker whose memory it is; None for all other places.
        tier: When it is tried; core sets it from the record of the plugin that reads it.
    """

    uri: ModelURI = field(validator=attrs.validators.instance_of(ModelURI))
    origin: str = field(default="caller", validator=attrs.validators.instance_of(str))
    peer: Peer | None = field(default=None, validator=attrs.validators.optional(attrs.validators.instance_of(Peer)))
    tier: Tier = field(default=Tier.ORIGIN, converter=Tier)

    @property
    def is_peer(self) -> bool:
        """Whether a transport reads it from the memory of a worker, and not a storage from files."""
        return self.peer is not None or self.tier < Tier.CACHE
