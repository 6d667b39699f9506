"""The order in which candidates are tried: tiers in a fixed order, and readers spread over the peers of a tier.

Peers are ordered by rendezvous hashing (Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates",
1998). Each reader has its own order of all peers. Every process computes the same order without communication, and
readers are spread evenly. If a peer joins or leaves, only its own readers change. With weights (Schindelhauer and
Schomaker, "Weighted Distributed Hash Tables", 2005) a peer is chosen in proportion to its spare capacity.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence

from modelexpress_core.contracts.candidates import Candidate, LoadRequest
from modelexpress_core.errors import SettingsError
from modelexpress_core.sources.settings import SELECTORS

__all__ = ["rank", "uniform"]

#: Load assumed for a peer that reports none.
_UNKNOWN_LOAD = 0.5

#: Weight of the busiest peer: above zero, so that it is still used when all peers are busy.
_MIN_WEIGHT = 0.05

#: Random numbers of the operating system: engines seed Python's generator, all with the same seed.
_RANDOM = random.SystemRandom()

#: A float holds 53 bits exactly; one of them is for the added half, which excludes 0 and 1.
_HASH_BITS = 52


def rank(request: LoadRequest, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return all ``candidates``, best first: the lowest tier first.

    Within a tier, ``request.selector`` orders the peers for this reader; other candidates keep their order and follow.

    Raises:
        SettingsError: There is no such selector.
    """
    try:
        order = _ORDERS[request.selector]
    except KeyError:
        message = f"unknown selector of peers: {request.selector!r}"
        raise SettingsError(message, hint=f"set MX_P2P_SOURCE_SELECTOR to one of {', '.join(SELECTORS)}") from None
    ranked: list[Candidate] = []
    for tier in sorted({candidate.tier for candidate in candidates}):
        same = [candidate for candidate in candidates if candidate.tier == tier]
        peers = [candidate for candidate in same if candidate.is_peer]
        ranked += order(request.reader, peers)
        ranked += [candidate for candidate in same if not candidate.is_peer]
    return tuple(ranked)


def _shuffled(_reader: str, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    return _RANDOM.sample(candidates, len(candidates))


def _by_hash(reader: str, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    return _by_score(reader, candidates, lambda _: 1.0)


def _by_load(reader: str, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    return _by_score(reader, candidates, _spare_capacity)


_ORDERS: Mapping[str, Callable[[str, Sequence[Candidate]], Sequence[Candidate]]] = {
    "load_aware": _by_load,
    "random": _shuffled,
    "rendezvous_hash": _by_hash,
}


def _by_score(
    reader: str, candidates: Sequence[Candidate], weight: Callable[[Candidate], float]
) -> Sequence[Candidate]:
    def key(candidate: Candidate) -> tuple[float, str, str]:
        name = _name(candidate)
        return weight(candidate) / math.log(uniform(reader, name)), name, str(candidate.uri)

    return sorted(candidates, key=key)


def _name(candidate: Candidate) -> str:
    """Return a name that is the same for a peer whichever discovery found it."""
    if candidate.peer is not None and candidate.peer.worker_id:
        return candidate.peer.worker_id
    return f"{candidate.uri.authority}/{candidate.uri.path}"


def _spare_capacity(candidate: Candidate) -> float:
    """Return the share of a peer's capacity that is free, from 0.05 to 1."""
    load = candidate.peer.load if candidate.peer is not None else None
    if load is None or math.isnan(load):
        load = _UNKNOWN_LOAD
    return min(1.0, max(_MIN_WEIGHT, 1.0 - load))


def uniform(reader: str, name: str) -> float:
    """Return a pseudorandom number between 0 and 1, both excluded; the same in every process."""
    digest = hashlib.blake2b(digest_size=8)
    for text in (reader, name):
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    drawn = int.from_bytes(digest.digest(), "big") >> (64 - _HASH_BITS)
    return (drawn + 0.5) / (1 << _HASH_BITS)
