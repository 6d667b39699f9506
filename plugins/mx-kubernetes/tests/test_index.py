"""What a server knows of the sources, without an API server: which of two pieces of news counts."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from modelexpress_core.contracts.metadata_store import SourceQuery, SourceRecord, SourceStatus, StoredSource
from modelexpress_core.server.clock import Clock
from mx_kubernetes._index import Entry, Index
from mx_kubernetes._objects import (
    UNREADABLE,
    Content,
    SourceObject,
    joined,
    name_of,
    packed,
    parts_of,
    read_source,
    source_manifest,
    unpacked,
)

_READY, _STALE = SourceStatus.READY, SourceStatus.STALE
_NAME = name_of("source", "a")


class Clocks:
    """A steady clock and a wall clock, which tests set."""

    def __init__(self) -> None:
        self.steady = 1000.0
        self.wall = 1_700_000_000.0

    def clock(self) -> Clock:
        return Clock(lambda: self.steady, lambda: self.wall)

    def pass_seconds(self, seconds: float) -> None:
        self.steady += seconds
        self.wall += seconds


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def index(clocks: Clocks) -> Index:
    return Index(clocks.clock())


def manifest(index: Index, version: int, *, parts: str = "p", uid: str = "u", **changes: Any) -> dict[str, Any]:
    record = attrs.evolve(SourceRecord("source", "a", "acme/model", status=_READY), **changes)
    made = source_manifest(
        StoredSource(record, b"", b""), index.clock.wall_ms(), "owner", Content((parts,), 1, "0" * 64), []
    )
    made["metadata"].update(uid=uid, resourceVersion=str(version))
    return made


def an_object(index: Index, version: int, **changes: Any) -> SourceObject:
    return read_source(manifest(index, version, **changes))


def entry_of(index: Index) -> Entry:
    entry = index.get(_NAME)
    assert entry is not None
    return entry


def age_ms(index: Index) -> int:
    offset = index.clock.offset_ms()
    return int(index.clock.now_ms() + offset) - entry_of(index).record(offset).updated_at_ms


def test_an_older_version_changes_nothing(index: Index) -> None:
    """The answer to a write may come before the events that precede it, of its own object and of a deleted one."""
    newest = an_object(index, 10, worker_rank=2)
    index.put(newest)
    index.put(an_object(index, 9, worker_rank=1))
    assert 2 == entry_of(index).source.record.worker_rank

    index.deleted_here(newest)
    index.put(an_object(index, 11))
    assert index.get(_NAME) is None
    index.deleted(_NAME, "u", shown=True)
    index.put(an_object(index, 12, uid="another"))
    index.deleted(_NAME, "u", shown=True)

    assert "another" == entry_of(index).source.uid


def test_a_list_removes_what_it_lacks_and_no_later_write(index: Index) -> None:
    """Objects that were written after the list stay."""
    index.put(an_object(index, 10))
    index.keep_only(set(), set(), version=9)
    assert index.get(_NAME) is not None

    index.keep_only(set(), set(), version=10)

    assert index.get(_NAME) is None
    assert (0, 0, {}) == (len(index), index.total_bytes, dict(index.owner_bytes))
    assert [] == index.names(SourceQuery()) == index.names(SourceQuery("source")) == index.names(SourceQuery(None, "m"))


def test_the_latest_heartbeat_counts(index: Index, clocks: Clocks) -> None:
    """Whichever server received it; a publication replaces the load, and a later state does not."""
    index.put(an_object(index, 1, source_load=0.1))
    clocks.pass_seconds(10)
    index.beat(entry_of(index), 0.2)
    assert (0.2, True) == (entry_of(index).load, entry_of(index).own)
    index.heard(_NAME, index.clock.now_ms() - 5000, 0.3)
    assert 0.2 == entry_of(index).load, "it is older"
    clocks.pass_seconds(10)
    index.heard(_NAME, index.clock.now_ms() - 1000, 0.4)
    assert (0.4, False) == (entry_of(index).load, entry_of(index).own)
    assert 1000 == age_ms(index)
    index.beat(entry_of(index), None)
    assert 0.4 == entry_of(index).load

    stale = manifest(index, 2, status=_STALE)
    stale["status"].update(updatedAt=index.clock.wall_ms() - 8000, load=0.9)
    index.put(read_source(stale))
    assert (0.4, 0, _STALE) == (entry_of(index).load, age_ms(index), entry_of(index).source.record.status)

    index.put(an_object(index, 3, parts="q"))
    assert entry_of(index).load is None


def test_heartbeats_that_come_before_their_source_are_kept(index: Index, clocks: Clocks) -> None:
    """The two watches are not in step. Those of sources that never come are forgotten."""
    published = an_object(index, 1)
    clocks.pass_seconds(5)
    index.heard(_NAME, index.clock.now_ms(), 0.5)
    index.heard("unknown", index.clock.now_ms(), None)
    index.put(published)
    assert (0.5, 0) == (entry_of(index).load, age_ms(index))

    clocks.pass_seconds(700)
    index.forget_early()

    assert {} == index._early


def test_a_wall_clock_that_is_set_brings_no_silent_worker_back(index: Index, clocks: Clocks) -> None:
    """Nor does it make one silent: ages are those of the steady clock."""
    index.put(an_object(index, 1))
    clocks.pass_seconds(60)
    for step in (-3600.0, 7200.0):
        clocks.wall += step
        assert 60_000 == age_ms(index)


def test_the_clock_of_another_server_may_be_ahead(index: Index) -> None:
    """A heartbeat from the future is one of now."""
    index.put(an_object(index, 1))
    ahead = manifest(index, 2)
    ahead["status"]["updatedAt"] += 5000
    index.put(read_source(ahead))

    assert 0 == age_ms(index)


@pytest.mark.parametrize(
    "damage",
    [
        {"spec": {"rank": -1}},
        {"spec": {"rank": 2**32}},
        {"spec": {"workerId": 5}},
        {"spec": {"trainingStep": str(2**64)}},
        {"spec": {"topology": {"k": None}}},
        {"spec": {"content": {}}},
        {"spec": {"sourceId": "\ud800"}},
        {"spec": {"modelName": None}},
        {"status": {"updatedAt": "soon"}},
        {"status": {"load": "much"}},
        {"metadata": {"name": "another"}},
        {"metadata": {"uid": None}},
    ],
)
def test_an_object_that_is_no_source(index: Index, damage: dict[str, dict[str, Any]]) -> None:
    """Is told from one, whatever was changed."""
    damaged = manifest(index, 1)
    for part, values in damage.items():
        damaged[part].update(values)

    with pytest.raises(UNREADABLE):
        read_source(damaged)


def test_parts_that_are_not_those_of_the_source() -> None:
    """A digest over all of them finds one that is missing, changed, or in another place."""
    source = StoredSource(SourceRecord("source", "a", "m"), b"identity", bytes(range(256)) * 8, grant_key=b"key")
    content, pieces = parts_of("name", "nonce", packed(source))
    assert (b"identity", source.worker, b"key") == unpacked(b"".join(pieces))

    for wrong in ([], [{"data": "AAAA"}], [{"data": "*"}], [{}]):
        with pytest.raises(UNREADABLE):
            joined(content, wrong)
    for data in (b"", b"no zlib", packed(source)[:-3]):
        with pytest.raises(UNREADABLE):
            unpacked(data)
