"""Loads over NIXL within one process, with two real agents: bytes in place, and what is noticed if they are wrong."""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import random
import struct
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import pytest
import torch

import modelexpress_core as mx
from modelexpress_core.contracts.candidates import Peer, Tier
from modelexpress_core.contracts.transport import PeerAccess, TensorRead, TensorTable
from modelexpress_core.errors import BackendError, IntegrityError, NotFoundError, UnavailableError, UnsupportedError
from modelexpress_core.providers import TransportProvider
from modelexpress_core.uri import ModelURI
from mx_nixl._agent import Agent
from mx_nixl._description import AgentDescription
from mx_nixl._lanes import Lane
from mx_nixl._quarantine import KeptMemory, Quarantine
from mx_nixl._serving import NixlServed
from mx_nixl._session import BUFFER_BYTES, NixlSession
from mx_nixl._transport import NixlTransport, open_nixl
from mx_nixl.settings import NixlSettings
from tests.support.peers import ServingWorker, empty_like, serving_worker

pytestmark = [pytest.mark.usefixtures("nixl"), pytest.mark.xdist_group("nixl")]

_URI = "nixl://127.0.0.1:1/source/w"

#: UCX_TLS for reads straight into place, and for reads through buffers.
_LANES = {"in place": "all", "through buffers": "tcp"}


@pytest.fixture(params=_LANES)
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("UCX_TLS", _LANES[request.param])
    return str(request.param)


def bytes_table(**tensors: torch.Tensor) -> TensorTable:
    return TensorTable("source", "w", tensors, lambda lease_id: True)


@contextlib.contextmanager
def served(table: TensorTable) -> Iterator[NixlServed]:
    serving = open_nixl(ModelURI("nixl"), {}).serve(table)
    try:
        yield serving
    finally:
        serving.close()


def access(description: bytes) -> PeerAccess:
    return PeerAccess(Peer("source", "w"), "lease", description)


@contextlib.contextmanager
def connected(description: bytes) -> Iterator[NixlSession]:
    session = open_nixl(ModelURI.parse(_URI), {}).connect(access(description))
    try:
        yield session
    finally:
        session.close()


def test_every_tensor_is_in_place(
    lane: str, worker: ServingWorker, tensors: Mapping[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever its size, dtype, strides and ties; each byte once. The log says which way they take."""
    caplog.set_level("INFO", "mx_nixl")
    here = empty_like(tensors)

    report = mx.load_into(here, worker.uri("nixl"), environ={})

    assert [name for name in tensors if not torch.equal(tensors[name], here[name])] == []
    needed = sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if name != "tied")
    assert needed == report.bytes_needed == report.bytes_fetched
    assert "mx-nixl" == report.storage["plugin"]
    (source,) = report.sources
    expected = {"in place": "shared memory (CMA)", "through buffers": "TCP or another lane: UCX_TLS or MX_NIXL_BACKEND"}
    assert source.channel.startswith(expected[lane])
    assert 0 == worker.leases.out()
    assert f"{lane}, over {source.channel}\n" in caplog.text


def test_ranges_of_any_offset_and_length(lane: str) -> None:
    """Longer than one read or one buffer, or without bytes; each is named once."""
    content = torch.randint(0, 256, ((80 << 20) + 5,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ranges = [(0, 80 << 20), (3, 0), ((80 << 20) + 4, 1), (1, (9 << 20) + 1), (0, 1)]
    reads = [TensorRead("t", offset, torch.zeros(length, dtype=torch.uint8)) for offset, length in ranges]
    with served(bytes_table(t=content)) as serving, connected(serving.description) as session:
        done = list(session.read(reads))

    assert [0, 1, 2, 3, 4] == sorted(done)
    for (offset, length), read in zip(ranges, reads, strict=True):
        assert torch.equal(content[offset : offset + length], read.destination)


@pytest.mark.parametrize(("name", "offset", "length"), [("t", 99, 2), ("t", -1, 1), ("u", 0, 1)])
def test_only_bytes_of_its_tensors_are_asked_for(name: str, offset: int, length: int) -> None:
    """The message names the tensor and the bytes."""
    with (
        served(bytes_table(t=torch.zeros(100, dtype=torch.uint8))) as serving,
        connected(serving.description) as session,
        pytest.raises(NotFoundError, match=f"no tensor '{name}' with bytes {offset}"),
    ):
        list(session.read([TensorRead(name, offset, torch.zeros(length, dtype=torch.uint8))]))


def test_a_read_that_is_too_slow_for_its_lane_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Once, when the session ends, with both rates."""
    content = torch.zeros(130 << 20, dtype=torch.uint8)
    with served(bytes_table(t=content)) as serving:
        description = AgentDescription.from_bytes(serving.description)
        for low, warnings in ((1e18, 1), (1.0, 0)):
            agent = Agent("reader/slow", "UCX")
            agent.connect(agent.add(description.metadata))
            session = NixlSession(
                agent,
                description,
                lane=Lane("the fabric x", on_host=True, low_bytes_per_second=low),
                is_served=lambda: True,
                timeout_seconds=60,
                uri=_URI,
                quarantine=Quarantine(),
            )
            caplog.clear()
            list(session.read([TensorRead("t", 0, torch.ones_like(content))]))
            session.close()
            session.close()

            assert warnings == caplog.text.count(f"reading {_URI} was slow: 0.14 GB came at ")


def test_two_threads_share_a_session(lane: str) -> None:
    """Each gets its own bytes."""
    content = torch.arange(64 << 20, dtype=torch.int64).view(torch.uint8)[: 64 << 20]
    halves = [torch.zeros(32 << 20, dtype=torch.uint8) for _ in range(2)]
    with served(bytes_table(t=content)) as serving, connected(serving.description) as session:
        threads = [
            threading.Thread(target=lambda n=n: list(session.read([TensorRead("t", n * (32 << 20), halves[n])])))
            for n in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

    assert torch.equal(content, torch.cat(halves))


def test_what_is_withdrawn_cannot_be_read(lane: str) -> None:
    """Neither by a session that was open, nor by a new one."""
    content = torch.ones(1 << 20, dtype=torch.uint8)
    destination = torch.zeros(1 << 20, dtype=torch.uint8)
    with served(bytes_table(t=content)) as serving, contextlib.ExitStack() as opened:
        used, unused = (opened.enter_context(connected(serving.description)) for _ in range(2))
        assert [0] == list(used.read([TensorRead("t", 0, destination)]))
        destination.zero_()
        serving.close()
        serving.close()

        for session in (used, unused):
            with pytest.raises(BackendError, match="no longer offers" if lane == "in place" else None):
                list(session.read([TensorRead("t", 0, destination)]))
        with pytest.raises(BackendError), connected(serving.description) as session:
            list(session.read([TensorRead("t", 0, destination)]))

    assert not destination.any()


def test_a_session_that_is_closed_ends_its_reads(lane: str) -> None:
    """In other threads too; nothing is written afterwards."""
    content = torch.full((256 << 20,), 7, dtype=torch.uint8)
    destination = torch.zeros_like(content)
    errors: list[BackendError] = []
    first = threading.Event()
    reads = [TensorRead("t", start, destination[start : start + (4 << 20)]) for start in range(0, 256 << 20, 4 << 20)]

    def read(session: NixlSession) -> None:
        try:
            for _ in session.read(reads):
                first.set()
        except BackendError as exc:
            errors.append(exc)

    with served(bytes_table(t=content)) as serving, connected(serving.description) as session:
        thread = threading.Thread(target=read, args=(session,))
        thread.start()
        assert first.wait(60)
        session.close()
        session.close()
        destination.fill_(9)
        thread.join(60)
        with pytest.raises(UnavailableError, match="the session was closed"):
            list(session.read(reads[:1]))

    assert not thread.is_alive()
    assert [False] == [error.peer_at_fault for error in errors]
    assert bool((destination == 9).all())


class Altering:
    """A transport ``nixl`` whose workers tell readers another description."""

    def __init__(self, alter: Callable[[bytes], bytes]) -> None:
        self._alter = alter

    @mx.hookimpl
    def mx_register_transports(self) -> list[TransportProvider]:
        alter = self._alter

        class Transport(NixlTransport):
            def serve(self, table: TensorTable) -> NixlServed:
                serving = super().serve(table)
                serving.description = alter(serving.description)
                return serving

        def opened(uri: ModelURI, settings: Mapping[str, str]) -> NixlTransport:
            return Transport(uri, NixlSettings())

        return [TransportProvider("altering", ("nixl",), opened, tier=Tier.PEER)]


@pytest.fixture
def altered(tensors: Mapping[str, torch.Tensor]) -> Callable[[Callable[[bytes], bytes]], mx.LoadReport]:
    """Loads from a worker with an altered description."""

    def load(alter: Callable[[bytes], bytes]) -> mx.LoadReport:
        plugins = mx.PluginManager.discover({"MX_DISABLED_PLUGINS": "mx-nixl"})
        plugins.register(Altering(alter), name="altering")
        with serving_worker(tensors, ["nixl"], plugins=plugins) as worker:
            return mx.load_into(empty_like(tensors), worker.uri("nixl"), environ={})

    return load


def test_addresses_of_other_memory_are_noticed(
    lane: str, altered: Callable[[Callable[[bytes], bytes]], mx.LoadReport]
) -> None:
    """By the digest of the bytes that arrive."""

    def shifted(description: bytes) -> bytes:
        found = AgentDescription.from_bytes(description)
        place = found.tensors["large"]
        moved = {**found.tensors, "large": attrs.evolve(place, address=place.address - 8)}
        return attrs.evolve(found, tensors=moved).to_bytes()

    with pytest.raises(IntegrityError, match=r"of large arrived twice with other bytes") as caught:
        altered(shifted)

    assert caught.value.peer_at_fault


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda description: b"", "does not begin as a description"),
        (lambda description: description[:-1], "cut off"),
        (lambda description: description[: len(description) // 2], "cut off"),
        (lambda description: description + b"x", "too long"),
        (lambda description: description[:30] + bytes([description[30] ^ 4]) + description[31:], "damaged"),
        (lambda description: description[:8] + b"\x09" + description[9:], "another format"),
    ],
)
def test_a_damaged_description_is_refused(
    altered: Callable[[Callable[[bytes], bytes]], mx.LoadReport], alter: Callable[[bytes], bytes], reason: str
) -> None:
    """The message says what is wrong, and names the worker."""
    with pytest.raises(IntegrityError, match=reason) as caught:
        altered(alter)

    assert caught.value.peer_at_fault
    assert caught.value.uri.startswith("nixl://")


def test_a_worker_that_is_gone_or_was_replaced_is_named(tensors: Mapping[str, torch.Tensor]) -> None:
    """The message says that nothing listens at its address, or which other worker does."""
    with serving_worker(tensors, ["nixl"]) as gone:
        uri = gone.uri("nixl")
    with pytest.raises(UnavailableError, match="no server listens there"):
        mx.load_into(empty_like(tensors), uri, environ={})

    with (
        serving_worker(tensors, ["nixl"], worker_id="another", port=gone.port),
        pytest.raises(NotFoundError, match="this is worker 'another', not 'w'"),
    ):
        mx.load_into(empty_like(tensors), uri, environ={})


def replaced_head(description: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A description with another head. The rest stays, so that its numbers need not explain it any more."""
    magic, packed = description[:9], zlib.decompress(description[9:])
    length = int.from_bytes(packed[:4], "little")
    head = json.loads(packed[4 : 4 + length])
    change(head)
    text = json.dumps(head).encode()
    return magic + zlib.compress(len(text).to_bytes(4, "little") + text + packed[4 + length :])


def huge_count(description: bytes) -> bytes:
    """A description of ten million tensors."""
    return replaced_head(description, lambda head: head.update(tensors=10_000_000))


def long_head(description: bytes) -> bytes:
    """A description whose head has eight million numbers."""
    return replaced_head(description, lambda head: head.update(fabrics=[1] * 8_000_000))


def many_names(description: bytes) -> bytes:
    """A description of ten million tensors, with their names and places: one mebibyte that becomes 300."""
    packing = zlib.compressobj(9)
    head = {"agent": "a", "backend": "UCX", "metadata": 0, "names": 60_000_000, "tensors": 10_000_000}
    text = json.dumps(head).encode()
    parts = [packing.compress(len(text).to_bytes(4, "little") + text)]
    parts += [packing.compress(bytes(1 << 20)) for _ in range(300)]
    return description[:9] + b"".join(parts) + packing.flush()


def too_long(field: str, value: int) -> Callable[[bytes], bytes]:
    """Alters the place of the tensor ``large``."""

    def alter(description: bytes) -> bytes:
        found = AgentDescription.from_bytes(description)
        place = attrs.evolve(found.tensors["large"], **{field: value})
        return attrs.evolve(found, tensors={**found.tensors, "large": place}).to_bytes()

    return alter


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (huge_count, "tensors is no number up to 250000"),
        (many_names, "cut off, or too long"),
        (long_head, r"its head has \d+ bytes"),
        (too_long("nbytes", (1 << 63) - 1), "'large' has 9223372036854775807 bytes at"),
        (too_long("nbytes", -1), "'large' has -1 bytes at"),
        (too_long("address", (1 << 63) - 1), "bytes at 9223372036854775807 on device -1"),
        (too_long("address", -8), "bytes at -8 on device"),
        (too_long("device", 1 << 40), "on device 1099511627776"),
    ],
    ids=["count", "names", "head", "length that overflows", "negative length", "address", "negative", "device"],
)
def test_a_description_that_cannot_be_true_is_refused(
    altered: Callable[[Callable[[bytes], bytes]], mx.LoadReport], alter: Callable[[bytes], bytes], reason: str
) -> None:
    """In little time and memory, with the reason; the worker is at fault."""
    with pytest.raises(IntegrityError, match=reason) as caught:
        altered(alter)

    assert caught.value.peer_at_fault


@pytest.mark.parametrize("distance", [1 << 20, -(1 << 32), 1 << 32])
def test_memory_that_the_worker_has_not_registered_is_not_read(
    lane: str, altered: Callable[[Callable[[bytes], bytes]], mx.LoadReport], distance: int
) -> None:
    """Where a description points beyond it, NIXL refuses the read before a byte moves.

    Right behind a tensor there may be another one that is registered: its bytes have other digests.
    """

    def shifted(description: bytes) -> bytes:
        found = AgentDescription.from_bytes(description)
        place = found.tensors["large"]
        moved = {**found.tensors, "large": attrs.evolve(place, address=place.address + distance)}
        return attrs.evolve(found, tensors=moved).to_bytes()

    errors = (NotFoundError, IntegrityError) if distance == 1 << 20 else NotFoundError
    with pytest.raises(errors, match=r"its memory is not registered|arrived twice with other bytes") as caught:
        altered(shifted)

    assert caught.value.peer_at_fault


def test_memory_that_does_not_exist_ends_the_read() -> None:
    """Where the agent's metadata claims it too. Over TCP a worker reads it by itself, and ends by its own lie."""
    content = torch.zeros(1 << 20, dtype=torch.uint8)
    first = content.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = -(-(content.data_ptr() + len(content)) // mmap.PAGESIZE) * mmap.PAGESIZE - first
    with served(bytes_table(t=content)) as serving:
        found = AgentDescription.from_bytes(serving.description)
        lying = found.metadata.replace(struct.pack("<Q", length), struct.pack("<Q", 1 << 46))
        place = attrs.evolve(found.tensors["t"], address=first + (1 << 38))
        altered = attrs.evolve(found, metadata=lying, tensors={"t": place}).to_bytes()
        with connected(altered) as session, pytest.raises(UnavailableError, match="connection to the worker ended"):
            list(session.read([TensorRead("t", 0, torch.zeros(1 << 20, dtype=torch.uint8))]))

    assert lying != found.metadata


def test_metadata_of_any_bytes_ends_no_process() -> None:
    """Cut off, with a bit or a number changed, or at random: NIXL refuses it, or knows the same agent as before."""
    chance = random.Random(1)
    with served(bytes_table(t=torch.zeros(1 << 20, dtype=torch.uint8))) as serving:
        found = AgentDescription.from_bytes(serving.description)
        for number in range(40):
            spoilt = bytearray(found.metadata)
            start = chance.randrange(len(spoilt) - 8)
            if number % 4 == 0:
                del spoilt[start:]
            elif number % 4 == 1:
                spoilt[start] ^= 1 << chance.randrange(8)
            elif number % 4 == 2:
                spoilt[start : start + 8] = struct.pack("<Q", chance.choice([0, 1 << 40, 1 << 63, (1 << 64) - 1]))
            else:
                spoilt = bytearray(chance.randbytes(start))
            with contextlib.suppress(BackendError), connected(attrs.evolve(found, metadata=bytes(spoilt)).to_bytes()):
                pass


def test_destinations_that_nobody_else_holds_stay_until_their_reads_have_ended(lane: str) -> None:
    """A caller that drops its tensors amid a read does not have their memory written by others, nor freed."""
    content = torch.arange(8 << 20, dtype=torch.int64).view(torch.uint8)
    reads = [
        TensorRead("t", start, torch.zeros(4 << 20, dtype=torch.uint8)) for start in range(0, len(content), 4 << 20)
    ]
    with served(bytes_table(t=content)) as serving, connected(serving.description) as session:
        reading = session.read(tuple(reads))
        count, dropped = len(reads), weakref.ref(reads[-1].destination)
        done = [next(reading)]
        reads.clear()
        gc.collect()
        others = [torch.full((4 << 20,), 7, dtype=torch.uint8) for _ in range(count)]
        done += reading
        del reading
        gc.collect()

        assert [*range(count)] == sorted(done)
        assert all(bool((other == 7).all()) for other in others)
    assert dropped() is None


def test_an_agent_with_another_name_is_refused(altered: Callable[[Callable[[bytes], bytes]], mx.LoadReport]) -> None:
    """Its metadata belongs to another agent."""
    with pytest.raises(IntegrityError, match="belongs to another agent"):
        altered(lambda each: attrs.evolve(AgentDescription.from_bytes(each), agent="other").to_bytes())


def test_metadata_that_nixl_does_not_accept_is_refused(
    altered: Callable[[Callable[[bytes], bytes]], mx.LoadReport],
) -> None:
    """The worker is at fault."""
    with pytest.raises(BackendError, match="could not connect") as caught:
        altered(lambda each: attrs.evolve(AgentDescription.from_bytes(each), metadata=b"nothing").to_bytes())

    assert caught.value.peer_at_fault


def test_both_sides_use_the_same_backend(altered: Callable[[Callable[[bytes], bytes]], mx.LoadReport]) -> None:
    """The message names the setting."""
    with pytest.raises(UnsupportedError, match="MX_NIXL_BACKEND"):
        altered(lambda each: attrs.evolve(AgentDescription.from_bytes(each), backend="LIBFABRIC").to_bytes())


def test_with_too_much_memory_in_quarantine_no_session_begins() -> None:
    """Until the reads have ended."""
    quarantine = Quarantine()
    ended, destroyed = threading.Event(), threading.Event()
    quarantine.keep(KeptMemory(BUFFER_BYTES, "nixl://w", None, ended.is_set, destroyed.set))
    transport = NixlTransport(
        ModelURI.parse(_URI), NixlSettings(), quarantine=quarantine, quarantine_bytes=2 * BUFFER_BYTES - 1
    )
    with served(bytes_table(t=torch.zeros(1, dtype=torch.uint8))) as serving:
        with pytest.raises(UnavailableError, match="64 MiB are kept"):
            transport.connect(access(serving.description))
        ended.set()
        transport.connect(access(serving.description)).close()

    assert destroyed.is_set()
    assert (0, BUFFER_BYTES) == (quarantine.nbytes, quarantine.total_bytes)


def test_a_description_beyond_its_limit_is_refused() -> None:
    """When the tensors are offered, not when they are read."""
    one = torch.zeros(400_000, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(1)
    names = torch.randint(0, 1 << 62, (150_000,), generator=generator).tolist()

    with pytest.raises(UnsupportedError, match=r"the description of 150000 tensors has \d+ bytes"):
        open_nixl(ModelURI("nixl"), {}).serve(bytes_table(**{f"{n:x}": one[i : i + 1] for i, n in enumerate(names)}))


def test_a_description_of_many_tensors_is_short() -> None:
    """A mixture of experts with 40,000 tensors, each in an allocation of its own, fits into half of the limit."""
    generator = torch.Generator().manual_seed(1)
    gaps = torch.randint(0, 1 << 12, (40_000,), generator=generator).tolist()
    with served(bytes_table(t=torch.zeros(1, dtype=torch.uint8))) as serving:
        found = AgentDescription.from_bytes(serving.description)
    address, tensors = 0x7F0000000000, {}
    for number, gap in enumerate(gaps):
        address += (1 << 21) + 512 * gap
        name = f"model.layers.{number // 800}.mlp.experts.{number % 800 // 3}.{'gdu'[number % 3]}_proj.weight"
        tensors[name] = attrs.evolve(found.tensors["t"], address=address, nbytes=1 << 21)
    many = attrs.evolve(found, tensors=tensors)

    description = many.to_bytes()

    assert len(description) < 1 << 19
    assert many == AgentDescription.from_bytes(description)


def test_tensors_of_one_page_are_one_registration() -> None:
    """So the metadata is as short as that of a single tensor."""
    arena = torch.zeros(1 << 20, dtype=torch.uint8)
    many = {f"t{number}": arena[number * 4096 :][:4096] for number in range(256)}
    with served(bytes_table(**many)) as of_many, served(bytes_table(t=arena)) as of_one:
        lengths = [len(AgentDescription.from_bytes(each.description).metadata) for each in (of_many, of_one)]

    assert abs(lengths[0] - lengths[1]) < 16


def test_a_table_without_tensors() -> None:
    """Can be served, and connected to."""
    with served(bytes_table()) as serving, connected(serving.description) as session:
        assert [] == list(session.read([]))


def test_a_worker_that_waits_uses_no_core() -> None:
    """The thread that answers readers sleeps until there are some."""
    with served(bytes_table(t=torch.zeros(1, dtype=torch.uint8))):
        begun, used = time.monotonic(), time.process_time()
        threading.Event().wait(0.5)
        share = (time.process_time() - used) / (time.monotonic() - begun)

    assert share < 0.2
