"""Which place is tried first, and how readers are spread over peers."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from random import Random

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Peer, Tier
from modelexpress_core.errors import SettingsError
from modelexpress_core.providers import StorageProvider, TransportProvider
from modelexpress_core.sources.ranking import rank, uniform
from modelexpress_core.sources.settings import SELECTORS
from modelexpress_core.uri import ModelURI

_URI = ModelURI.parse("s3://bucket/model")

_LOADS = st.none() | st.floats(-1, 2) | st.just(math.nan)


#: As records of plugins may say it.
_TIERS = {
    "nixl": Tier.FABRIC_PEER,
    "grpc": Tier.PEER,
    "pigeon": Tier.OTHER_PEER,
    "mx": Tier.CACHE,
    "mxs": Tier.CACHE,
}


def peer(worker_id: str, load: float | None = None, scheme: str = "nixl") -> Candidate:
    uri = ModelURI(scheme, "worker:6555", f"id/{worker_id}")
    return Candidate(uri, "server", Peer("id", worker_id, load=load), _TIERS[scheme])


def place(text: str) -> Candidate:
    uri = ModelURI.parse(text)
    return Candidate(uri, tier=_TIERS.get(uri.scheme, Tier.ORIGIN))


def request(reader: str, selector: str) -> LoadRequest:
    return LoadRequest(_URI, reader=reader, selector=selector)


def first(candidates: Sequence[Candidate], reader: str, selector: str) -> str:
    chosen = rank(request(reader, selector), candidates)[0].peer
    assert chosen is not None
    return chosen.worker_id


_PEERS = st.builds(peer, st.text(max_size=3), _LOADS, st.sampled_from(["nixl", "grpc", "pigeon"]))
_PLACES = st.sampled_from(["s3://b/m", "gs://b/m", "mx://host/m", "mxs://host/m", "file:///m", "grpc://10.0.0.5:6555"])
_CANDIDATES = st.lists(_PEERS | st.builds(place, _PLACES), max_size=12)


@given(_CANDIDATES, st.text(max_size=5), st.sampled_from(SELECTORS))
def test_ranking_keeps_all_candidates_ordered_by_tier(candidates: list[Candidate], reader: str, selector: str) -> None:
    """Caches and origins keep their order."""

    def kind(candidate: Candidate) -> int:
        return [*Tier].index(candidate.tier)

    ranked = rank(request(reader, selector), candidates)

    assert sorted(map(str, candidates)) == sorted(map(str, ranked))
    kinds = [kind(candidate) for candidate in ranked]
    assert sorted(kinds) == kinds
    for number in (3, 4):
        assert [c for c in candidates if kind(c) == number] == [c for c in ranked if kind(c) == number]


@given(
    st.lists(_PEERS, max_size=8, unique_by=lambda each: each.uri),
    st.text(max_size=5),
    st.randoms(),
    st.sampled_from(["load_aware", "rendezvous_hash"]),
)
def test_the_order_in_which_peers_were_found_does_not_matter(
    candidates: list[Candidate], reader: str, random: Random, selector: str
) -> None:
    """Servers list them in any order."""
    shuffled = [*candidates]
    random.shuffle(shuffled)

    assert list(map(str, rank(request(reader, selector), candidates))) == list(
        map(str, rank(request(reader, selector), shuffled))
    )


@given(
    st.lists(st.tuples(st.text(max_size=3), _LOADS), min_size=1, max_size=8, unique_by=lambda each: each[0]),
    st.text(max_size=5),
    st.data(),
)
def test_if_a_peer_leaves_the_others_keep_their_order(
    named: list[tuple[str, float | None]], reader: str, data: st.DataObject
) -> None:
    """Only its own readers move, to the next peer in their order."""
    peers = [peer(*each) for each in named]
    gone = data.draw(st.sampled_from(peers))
    for selector in ("load_aware", "rendezvous_hash"):
        before = rank(request(reader, selector), peers)
        after = rank(request(reader, selector), [each for each in peers if each is not gone])

        assert [each for each in before if each is not gone] == list(after)


@pytest.mark.slow
def test_readers_are_spread_evenly() -> None:
    """10,000 readers over 100 sources are spread as evenly as at random."""
    readers, sources = 10_000, 100
    peers = [peer(f"worker-{i}") for i in range(sources)]

    counts = Counter(first(peers, f"reader-{i}", "rendezvous_hash") for i in range(readers))

    mean = readers / sources
    deviation = math.sqrt(mean * (1 - 1 / sources))
    squares = sum((counts[f"worker-{i}"] - mean) ** 2 for i in range(sources)) / deviation**2
    # Chi-squared with 99 degrees of freedom: mean 99, deviation 14.
    assert 99 - 4 * 14 < squares < 99 + 4 * 14
    assert max(counts.values()) < mean + 5 * deviation
    assert min(counts.values()) > mean - 5 * deviation


@pytest.mark.slow
def test_peers_are_chosen_in_proportion_to_their_spare_capacity() -> None:
    """Peers without a reported load count as half busy; the busiest are still chosen sometimes."""
    loads = {"idle": 0.0, "half": 0.5, "silent": None, "busy": 0.9, "full": 1.0, "beyond": 7.0}
    spare = {"idle": 1.0, "half": 0.5, "silent": 0.5, "busy": 0.1, "full": 0.05, "beyond": 0.05}
    peers = [peer(name, load) for name, load in loads.items()]
    readers = 20_000

    counts = Counter(first(peers, str(i), "load_aware") for i in range(readers))

    for name, weight in spare.items():
        share = weight / sum(spare.values())
        deviation = math.sqrt(readers * share * (1 - share))
        assert abs(counts[name] - readers * share) < 5 * deviation, (name, counts)


def test_the_hash_ignores_the_load() -> None:
    """A reader keeps its peer, however busy it is."""
    peers = [peer(str(i), load=i / 10) for i in range(10)]
    idle = [attrs.evolve(each, peer=attrs.evolve(each.peer, load=0.0)) for each in peers]  # type: ignore[type-var]

    for i in range(100):
        assert first(peers, str(i), "rendezvous_hash") == first(idle, str(i), "rendezvous_hash")


def test_random_is_random() -> None:
    """The same reader gets each of them."""
    peers = [peer(str(i)) for i in range(4)]

    assert {"0", "1", "2", "3"} == {first(peers, "reader", "random") for _ in range(400)}


@pytest.mark.slow
def test_other_processes_come_to_the_same_order() -> None:
    """Whatever their seed of Python's own hash; and later versions do: this order was computed once."""
    code = (
        "from tests.unit.test_ranking import first, peer\n"
        "peers = [peer(str(i), i / 20) for i in range(20)]\n"
        "print(*(first(peers, f'reader-{i}', 'load_aware') for i in range(12)))"
    )

    orders = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }

    assert {"1 15 6 4 3 2 6 13 8 5 2 5\n"} == orders


def test_two_texts_are_not_one() -> None:
    """The reader ab of c is not the reader a of bc."""
    assert uniform("ab", "c") != uniform("a", "bc")


def test_an_unknown_selector_names_those_that_exist() -> None:
    """This matters for code that builds a request directly."""
    with pytest.raises(SettingsError) as raised:
        rank(request("reader", "best"), [peer("w")])

    for name in SELECTORS:
        assert name in str(raised.value)


def test_a_record_has_a_tier_of_its_kind() -> None:
    """A transport reads peers and a storage does not, so that the tier also says how a place is read."""
    for tier in Tier:
        for cls, own in ((TransportProvider, tier < Tier.CACHE), (StorageProvider, tier >= Tier.CACHE)):
            with contextlib.nullcontext() if own else pytest.raises(ValueError, match=tier.name):
                assert own == (tier == cls("mx-x", ("x",), lambda uri, settings: None, tier=tier).tier)
