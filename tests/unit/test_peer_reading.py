"""Chunks read from several sources at once, of which any may fail, lie or fall silent at any moment."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelexpress_core.contracts.transport import TensorRead
from modelexpress_core.errors import (
    BackendError,
    DeadlineError,
    IntegrityError,
    ModelExpressError,
    NotFoundError,
    UnavailableError,
)
from modelexpress_core.loads.peer_chunks import ChunkRead
from modelexpress_core.loads.peer_reading import PeerReader
from modelexpress_core.loads.peer_source import LeaseEnd, PeerSource
from modelexpress_core.loads.source_reads import SourceReads
from modelexpress_core.transport.chunk_digests import chunk_digests
from tests.support.properties import examples

_CHUNK_BYTES = 16 << 10

#: What a session may do with one range.
_STEPS = ("right", "flipped", "lost", "half", "silent", "odd", "short", "twice")


class Session:
    """Copies ranges as its script says, one step for each; afterwards, rightly."""

    def __init__(self, content: torch.Tensor, script: Sequence[str] = (), *, closes: bool = True) -> None:
        self.ranges: list[int] = []
        self.started = threading.Event()
        self.closing = threading.Event()
        self._content = content
        self._script = iter(script)
        self._closes = closes
        self._lock = threading.Lock()

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        self.started.set()
        for position, each in enumerate(reads):
            with self._lock:
                step = next(self._script, "right")
                if step == "short":
                    return
                self._check_open()
                if step == "lost":
                    raise UnavailableError("the connection broke", peer_at_fault=True)
                if step == "odd":
                    raise KeyError(step)
                if step != "silent":
                    self._copy(each, step)
            if step == "silent":
                self.closing.wait()
                self._check_open()
            yield position
            if step == "twice":
                yield position

    def _copy(self, read: TensorRead, step: str) -> None:
        right = self._content[read.offset : read.offset + len(read.destination)]
        if step == "half":
            read.destination[: len(right) // 2] = 0
            raise UnavailableError("the connection broke", peer_at_fault=True)
        read.destination.copy_(right)
        if step == "flipped":
            read.destination[0] ^= 1
        else:
            self.ranges.append(read.offset)

    def _check_open(self) -> None:
        if self.closing.is_set():
            raise UnavailableError("the session was closed")

    def close(self) -> None:
        self.closing.set()
        with self._lock:  # nothing is copied any more
            pass
        if not self._closes:
            raise UnavailableError("a read has not ended")


class Source:
    """A worker with a session of the test's own."""

    provider = "test"

    def __init__(self, name: str, session: Session, end: LeaseEnd = LeaseEnd.CONFIRMED) -> None:
        self.uri = f"test://{name}"
        self.session = session
        self.releases = self.read_bytes = 0
        self._end = end

    def check_lease(self, deadline_seconds: float | None = None) -> tuple[LeaseEnd, BackendError | None]:
        if self._end is LeaseEnd.CONFIRMED:
            return self._end, None
        kind = NotFoundError if self._end is LeaseEnd.DENIED else UnavailableError
        return self._end, kind("the lease has ended")

    def release(self) -> tuple[LeaseEnd, BackendError | None]:
        self.releases += 1
        return self.check_lease()

    def close(self) -> None:
        self.session.close()


class Load:
    """The chunks of a tensor, and a reader of them. Without a stall time, no source is ever slow: its clock stands."""

    def __init__(self, chunks: int, *, verify: bool = True, stall_seconds: float | None = None) -> None:
        generator = torch.Generator().manual_seed(chunks)
        self.content = torch.randint(0, 256, (chunks * _CHUNK_BYTES,), dtype=torch.uint8, generator=generator)
        self.destination = torch.full_like(self.content, 0x5A)
        self.lost: list[str] = []
        self.slow: list[str] = []
        self.when_lost: Callable[[], None] = lambda: None
        self.reader = PeerReader(
            [
                ChunkRead("w", start, self.destination[start : start + _CHUNK_BYTES], digest)
                for start in range(0, len(self.content), _CHUNK_BYTES)
                for digest in chunk_digests(self.content[start : start + _CHUNK_BYTES])
            ],
            stall_seconds=stall_seconds or 60.0,
            verify=verify,
            on_arrival=lambda: None,
            on_loss=self._on_loss,
            clock=time.monotonic if stall_seconds else lambda: 0.0,
        )

    def _on_loss(self, reads: SourceReads) -> None:
        (self.slow if reads.error is None else self.lost).append(reads.source.uri)
        self.when_lost()

    def add(self, source: Source) -> None:
        assert self.reader.add(cast("PeerSource", source))

    def session(self, script: Sequence[str] = (), **options: Any) -> Session:
        return Session(self.content, script, **options)

    def read(self) -> None:
        try:
            self.reader.read()
        finally:
            assert self.reader.close()
        assert torch.equal(self.content, self.destination)


class Together(Session):
    """Does not copy until all sessions have been asked."""

    def __init__(self, content: torch.Tensor, everyone: Sequence[Together], script: Sequence[str] = ()) -> None:
        super().__init__(content, script)
        self._everyone = everyone

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        self.started.set()
        assert all(each.started.wait(60) for each in self._everyone)
        yield from super().read(reads)


def together(load: Load, *scripts: Sequence[str]) -> list[Together]:
    sessions: list[Together] = []
    sessions += [Together(load.content, sessions, script) for script in scripts]
    return sessions


def test_each_source_reads_and_each_chunk_is_read_once() -> None:
    """All of them take from one queue."""
    load = Load(200)
    sessions = together(load, (), (), ())
    for number, session in enumerate(sessions):
        load.add(Source(str(number), session))

    load.read()

    assert all(session.ranges for session in sessions)
    ranges = sorted(itertools.chain.from_iterable(each.ranges for each in sessions))
    assert [*range(0, len(load.content), _CHUNK_BYTES)] == ranges
    assert [len(each.ranges) * _CHUNK_BYTES for each in sessions] == [e.arrived_bytes for e in load.reader.sources]
    assert 0 == load.reader.read_again


@pytest.mark.parametrize("step", ["lost", "half", "odd", "short", "twice"])
def test_what_a_failed_source_did_not_deliver_is_read_from_others(step: str) -> None:
    """And nothing else is read again."""
    load = Load(200)
    failing, other = together(load, ["right", "right", step], ())
    load.add(Source("failing", failing))
    load.add(Source("other", other))

    load.read()

    assert ["test://failing"] == load.lost
    delivered = load.reader.sources[0].arrived_bytes
    assert delivered >= 2 * _CHUNK_BYTES
    assert len(load.content) == delivered + load.reader.sources[1].arrived_bytes == load.reader.arrived_bytes
    assert 0 == load.reader.reread_bytes


def test_a_source_that_falls_silent_is_not_waited_for() -> None:
    """The others read its chunks at the end, long before the stall time; it is not lost, but not needed."""
    load = Load(50, stall_seconds=60)
    silent, other = together(load, ["silent", "silent"], ())
    load.add(Source("silent", silent))
    load.add(Source("other", other))

    load.read()

    assert (["test://silent"], []) == (load.slow, load.lost)
    assert silent.closing.is_set()
    assert len(load.content) == load.reader.sources[1].arrived_bytes


def test_the_only_source_that_falls_silent_is_lost_after_the_stall_time() -> None:
    """There is nothing to compare it with."""
    load = Load(5, stall_seconds=0.2)
    load.add(Source("silent", load.session(["right", "silent", "silent"])))

    with pytest.raises(DeadlineError, match="no chunk arrived"):
        load.read()

    assert ["test://silent"] == load.lost


def test_a_silent_source_that_does_not_answer_is_lost_long_before_the_stall_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stopped process, say: one that answers is waited for."""
    monkeypatch.setattr("modelexpress_core.loads.peer_reading._QUIET_SECONDS", 0.1)
    load = Load(5, stall_seconds=600)
    load.add(Source("stopped", load.session(["right", "silent", "silent"]), LeaseEnd.UNKNOWN))

    with pytest.raises(DeadlineError, match="and the worker does not answer"):
        load.read()

    assert ["test://stopped"] == load.lost


@pytest.mark.parametrize("end", [LeaseEnd.CONFIRMED, LeaseEnd.DENIED])
def test_a_silent_source_that_answers_is_waited_for(monkeypatch: pytest.MonkeyPatch, end: LeaseEnd) -> None:
    """Until the stall time: its network may be slow."""
    monkeypatch.setattr("modelexpress_core.loads.peer_reading._QUIET_SECONDS", 0.01)
    monkeypatch.setattr("modelexpress_core.loads.peer_reading._ANSWER_SECONDS", 0.01)
    load = Load(5, stall_seconds=1.0)
    asked = threading.Semaphore(0)
    source = Source("slow", load.session(["right", "silent", "silent"]), end)
    check, source.check_lease = source.check_lease, lambda *_: (asked.release(), check())[1]  # type: ignore[method-assign]
    load.add(source)

    with pytest.raises(DeadlineError, match=r"no chunk arrived for 1 s$|no chunk arrived for 1 s[^,]"):
        load.read()

    assert asked.acquire(timeout=0)
    assert asked.acquire(timeout=0)


def test_verified_chunks_stay_when_the_next_source_follows() -> None:
    """A source that is opened after the only one was lost reads the others alone."""
    load = Load(40)
    first, second = load.session(["right"] * 10 + ["lost"] * 2), load.session()
    load.when_lost = lambda: load.reader.open_more(lambda: load.add(Source("second", second)))
    load.add(Source("first", first, LeaseEnd.UNKNOWN))

    load.read()

    assert ["test://first"] == load.lost
    assert not set(first.ranges) & set(second.ranges)
    assert 40 == len(first.ranges) + len(second.ranges)


def test_without_digests_nothing_of_a_source_that_died_stays() -> None:
    """It cannot say that its memory was unchanged."""
    load = Load(40, verify=False)
    first, second = load.session(["right"] * 10 + ["lost"] * 2), load.session()
    load.when_lost = lambda: load.reader.open_more(lambda: load.add(Source("second", second)))
    load.add(Source("first", first, LeaseEnd.UNKNOWN))

    load.read()

    assert 40 == len(second.ranges)
    assert 40 * _CHUNK_BYTES == load.reader.arrived_bytes


@pytest.mark.parametrize(
    ("end", "verify", "kept"),
    [
        (LeaseEnd.CONFIRMED, True, True),
        (LeaseEnd.CONFIRMED, False, True),
        (LeaseEnd.UNKNOWN, True, True),
        (LeaseEnd.UNKNOWN, False, False),
        (LeaseEnd.DENIED, True, False),
        (LeaseEnd.DENIED, False, False),
    ],
)
def test_a_lease_at_the_end(end: LeaseEnd, verify: bool, kept: bool) -> None:
    """A worker that says that it ended is not believed; one that says nothing, only if digests were compared."""
    load = Load(60, verify=verify)
    doubtful, other = together(load, (), ())
    sources = Source("doubtful", doubtful, end), Source("other", other)
    for source in sources:
        load.add(source)

    load.read()

    assert (60 - len(doubtful.ranges) if kept else 60) == len(other.ranges)
    assert ([] if kept else ["test://doubtful"]) == load.lost
    assert all(source.releases for source in sources)


def test_a_single_source_that_denies_its_lease_fails_the_load() -> None:
    """With what it said."""
    load = Load(3)
    load.add(Source("only", load.session(), LeaseEnd.DENIED))

    with pytest.raises(NotFoundError, match="the lease has ended"):
        load.read()


def test_a_chunk_with_a_wrong_digest_is_read_once_more_from_its_source() -> None:
    """Then from another, and the source is lost."""
    load = Load(30)
    once, twice = together(load, ["flipped"], ["right", *["flipped"] * 99])
    load.add(Source("once", once))
    load.add(Source("twice", twice))

    load.read()

    assert ["test://twice"] == load.lost
    error = load.reader.sources[1].error
    assert isinstance(error, IntegrityError)
    assert "arrived twice with other bytes" in str(error)
    assert 1 == load.reader.sources[0].mismatches
    assert load.reader.sources[1].mismatches >= 2


def test_memory_that_a_source_may_still_write_to_ends_the_load() -> None:
    """Others may not read into it."""
    load = Load(30)
    unsafe, other = together(load, ["lost", "lost"], ["silent", "silent"])
    unsafe._closes = False
    load.add(Source("unsafe", unsafe))
    load.add(Source("other", other))

    with pytest.raises(ModelExpressError, match="the connection broke"):
        load.reader.read()

    assert not load.reader.close()


def test_an_error_of_the_code_that_opens_sources_ends_the_load() -> None:
    """It must not wait for a source that never comes."""
    load = Load(3)

    def fail() -> None:
        raise ZeroDivisionError

    load.reader.open_more(fail)

    with pytest.raises(ZeroDivisionError):
        load.read()


@settings(max_examples=examples(400))
@given(
    scripts=st.lists(
        st.tuples(st.lists(st.sampled_from(_STEPS), max_size=6), st.sampled_from(LeaseEnd)), min_size=1, max_size=4
    ),
    chunks=st.integers(1, 40),
    verify=st.booleans(),
)
def test_whatever_fails_the_bytes_are_right_or_the_load_raises(
    scripts: list[tuple[list[str], LeaseEnd]], chunks: int, verify: bool
) -> None:
    """And with one source that does not fail, the load does not."""
    load = Load(chunks, verify=verify, stall_seconds=0.2)
    for number, (script, end) in enumerate(scripts):
        steps = script if verify else [step for step in script if step != "flipped"]
        load.add(Source(str(number), load.session(steps), end))
    sound = any(not script and end is LeaseEnd.CONFIRMED for script, end in scripts)

    try:
        load.read()
    except BackendError:
        assert not sound
    assert not load.reader.sources or all(each.stopped for each in load.reader.sources)
