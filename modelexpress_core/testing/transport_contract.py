"""The contract of transports: the rules that core relies on, as tests that run workers and readers in one process.

Each test states one rule of ``modelexpress_core.contracts.transport`` in its docstring. A failure message names the
call and its result, and often the usual mistake.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import attrs
import pytest
import torch
from attrs import frozen

import modelexpress_core as mx
from modelexpress_core.contracts.candidates import Peer
from modelexpress_core.contracts.transport import PeerAccess, PeerSession, ServedTensors, TensorRead, Transport
from modelexpress_core.errors import BackendError, DeadlineError, NotFoundError, UnavailableError
from modelexpress_core.hooks import hookimpl
from modelexpress_core.plugins import TRANSPORT, PluginManager
from modelexpress_core.providers import TransportProvider
from modelexpress_core.testing.calling import CallingContract
from modelexpress_core.testing.checks import check_error, same
from modelexpress_core.testing.contract import violated
from modelexpress_core.testing.workers import ServingWorker, serving_worker
from modelexpress_core.transport.tensor_bytes import bytes_of, host_memory
from modelexpress_core.uri import ModelURI

__all__ = ["OpenWorker", "TransportContract"]

#: Fills destinations before a read, and memory around tensors: other bytes there were written, or read, by mistake.
_FILL = 0xA5
_SECRET = 0x3C

#: What memory is overwritten with once a transport must not use it any more.
_OVERWRITTEN = 0x5A

#: Odd, so that destinations and tensors begin at odd addresses.
_MARGIN_BYTES = 67

_MIB = 1 << 20

#: What core reads at a time: eight chunks of 4 MiB.
_CHUNK_BYTES = 4 * _MIB
_BATCH = 8

#: How long a test waits for what must not happen.
_AFTERWARDS_SECONDS = 0.3

_MAX_DESCRIPTION_BYTES = 16 << 20

#: A model with many experts has so many tensors.
_MOST_TENSORS = 100_000

#: A worker may publish any of these in place of what its transport publishes.
_STRANGE_VALUES = ("", "0", "-1", "1e9", "9" * 5000, ",", ",x" * 5000, "a\0b\n", "\u0663", "\U0001f600")

#: An engine of a large model has as many tensors, with names of such a length.
_MANY_TENSORS = 5000

#: Bytes that a message shows.
_SHOWN_BYTES = 16

#: Sessions that are opened and closed one after another.
_SESSIONS = 20

_Range = tuple[str, int, int]


def random_bytes(nbytes: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Random bytes at an odd address, between other bytes that no reader may get."""
    memory = torch.full((nbytes + 2 * _MARGIN_BYTES,), _SECRET, dtype=torch.uint8)
    content = memory[_MARGIN_BYTES : _MARGIN_BYTES + nbytes]
    content.copy_(torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    return memory.to(device)[_MARGIN_BYTES : _MARGIN_BYTES + nbytes]


class _Destinations:
    """Destinations of ranges in one memory, with margins between them that no read may write to.

    Args:
        ranges: Name of the tensor, offset and length of each range.
        device: Where the destinations are.
    """

    def __init__(self, ranges: Sequence[_Range], device: str) -> None:
        starts, end = [], _MARGIN_BYTES
        for _, _, length in ranges:
            starts.append(end)
            end += length + _MARGIN_BYTES
        self._memory = torch.full((end,), _FILL, dtype=torch.uint8, device=device)
        self._inside = torch.zeros(end, dtype=torch.bool)
        self.reads = []
        for (name, offset, length), start in zip(ranges, starts, strict=True):
            self._inside[start : start + length] = True
            self.reads.append(TensorRead(name, offset, self._memory[start : start + length]))

    def check(self, number: int, expected: Mapping[str, torch.Tensor], when: str) -> None:
        """Fail unless range ``number`` has the bytes of its tensor."""
        read = self.reads[number]
        got = read.destination.cpu()
        wanted = expected[read.name][read.offset : read.offset + len(got)]
        if torch.equal(wanted, got):
            return
        first = int((wanted != got).nonzero()[0])
        here = bytes(got[first : first + _SHOWN_BYTES].tolist())
        violated(
            f"{when}, {_named(read)} differs from the tensor at its byte {first}: it is {here!r}, not "
            f"{bytes(wanted[first : first + _SHOWN_BYTES].tolist())!r}{_origin_of(here, expected)}"
        )

    def check_margins(self) -> None:
        """Fail if a read wrote outside the destinations."""
        outside = self._memory.cpu()[~self._inside]
        if bool((outside != _FILL).any()):
            violated(f"read wrote outside the destinations of {len(self.reads)} ranges, before, behind or between them")

    def overwrite(self) -> None:
        """Use the memory for something else."""
        self._memory.fill_(_OVERWRITTEN)

    def check_overwritten(self, when: str) -> None:
        """Fail if a read wrote to the memory since it was overwritten."""
        changed = int((self._memory != _OVERWRITTEN).sum())
        if changed:
            violated(f"read wrote {changed} bytes {when}: the memory may belong to something else by then")


def _origin_of(found: bytes, expected: Mapping[str, torch.Tensor]) -> str:
    """Where wrong bytes come from, for a message; empty if that is not clear."""
    known = {
        _FILL: "nothing was written there",
        _SECRET: "that is memory beside the tensor",
        _OVERWRITTEN: "that is what the worker's memory was used for later",
    }
    if set(found) <= {found[0]} and found[0] in known:
        return f"; {known[found[0]]}"
    if len(found) == _SHOWN_BYTES:
        for name, content in expected.items():
            start = bytes(host_memory(content)).find(found)
            if start >= 0:
                return f"; these are the bytes of {name!r} from {start} on"
    return ""


def _named(read: TensorRead) -> str:
    end = read.offset + len(read.destination)
    return f"the range of {read.name!r} from byte {read.offset} to {end}"


@frozen
class OpenWorker:
    """A worker whose tensors are served over the transport under test.

    Attributes:
        worker: The worker, its leases and its gRPC server.
        tensors: What it holds.
        scheme: The scheme of the transport.
    """

    worker: ServingWorker
    tensors: Mapping[str, torch.Tensor]
    scheme: str
    _connect: Callable[[PeerAccess], PeerSession]

    @property
    def uri(self) -> str:
        """The URI of the tensors."""
        return self.worker.uri(self.scheme)

    @property
    def served(self) -> ServedTensors:
        """What the transport serves."""
        return self.worker.served[self.scheme]

    def content(self) -> dict[str, torch.Tensor]:
        """A copy of the bytes of each tensor, in host memory."""
        return {name: memory.cpu().clone() for name, memory in self.worker.offered.memory.items()}

    def counted(self) -> dict[str, int]:
        """Bytes that ``count_sent`` was called for, by the name of the reader."""
        return {each.name: each.read_bytes for each in self.worker.leases.readers.listed()}

    def lease(self) -> str:
        """A new lease."""
        lease_id = self.worker.leases.grant()
        assert lease_id is not None  # noqa: S101 - it does not drain
        return lease_id

    def connect(self, lease_id: str | None = None, description: bytes | None = None) -> PeerSession:
        """Connect as a reader; by default under a new lease, with the description that the worker gives readers."""
        peer = Peer(self.worker.source_id, self.worker.worker_id)
        lease_id = self.lease() if lease_id is None else lease_id
        description = self.served.description if description is None else description
        return self._connect(PeerAccess(peer, lease_id, description))


class TransportContract(CallingContract, contract=True):
    """The rules for every transport, checked on the record of the fixture ``provider``.

    The kit starts the worker and its gRPC server, and takes the part of core. A rule that does not apply is a skipped
    test with a reason.

    Example:
        >>> import pytest
        >>> from mx_grpc_stream.plugin import mx_register_transports
        >>> class TestGrpcTransport(TransportContract):
        ...     @pytest.fixture
        ...     def provider(self):
        ...         return mx_register_transports()[0]

    Attributes:
        device: Where the tensors of both sides are, as torch names it.
        checks_leases: Whether the worker's side asks ``TensorTable.holds_lease`` before it sends. False where no code
            of the worker runs during a read: then closing the served tensors alone ends reads.
        counts_sent: Whether the worker's side calls ``TensorTable.count_sent``. False if none of it sends.
        hang_seconds: How long one call may take before it counts as hanging.
        close_seconds: How long a stalled read may go on after ``close``.
    """

    device: ClassVar[str] = "cpu"
    checks_leases: ClassVar[bool] = True
    counts_sent: ClassVar[bool] = True
    hang_seconds: ClassVar[float] = 30.0
    close_seconds: ClassVar[float] = 2.0

    # -- fixtures to override -----------------------------------------------------------------------------------------

    @pytest.fixture
    def provider(self) -> TransportProvider:
        """The record that the plugin's ``mx_register_transports`` returns. Its first scheme is used."""
        violated(f"{type(self).__name__} needs a fixture `provider` that returns the record of the transport")

    @pytest.fixture
    def settings(self) -> Mapping[str, str]:
        """The settings that the factory gets, on both sides."""
        return {}

    @pytest.fixture
    def secrets(self) -> Sequence[str]:
        """Credentials among the settings, which must not appear in errors. Leases are checked anyway."""
        return ()

    @pytest.fixture
    def stalled(self) -> tuple[PeerSession, TensorRead] | None:
        """A session, and a range whose bytes never arrive; None if reads cannot stall."""
        return None

    @pytest.fixture
    def plugins(self, provider: TransportProvider) -> PluginManager:
        """A manager with core's plugin and the transport. Tests of your own may use it."""
        manager = PluginManager.discover({"MX_PLUGINS": "modelexpress-core"})
        if provider.schemes[0] not in manager.table(TRANSPORT).schemes:
            manager.register(_OneTransport(provider), name=f"{provider.name} under test")
        return manager

    @pytest.fixture
    def serve(
        self, provider: TransportProvider, settings: Mapping[str, str], plugins: PluginManager
    ) -> Iterator[Callable[[Mapping[str, torch.Tensor]], OpenWorker]]:
        """A function that serves tensors until the end of the test. Tests of your own may use it."""
        scheme = provider.schemes[0]
        with contextlib.ExitStack() as opened:

            def serve(tensors: Mapping[str, torch.Tensor]) -> OpenWorker:
                worker = opened.enter_context(
                    serving_worker(tensors, [scheme], plugins=plugins, environ=settings, worker_id=f"w{next(numbers)}")
                )
                _, transport = plugins.open(TRANSPORT, ModelURI.parse(worker.uri(scheme)), settings)
                opened.callback(transport.close)

                def connect(access: PeerAccess) -> PeerSession:
                    session: PeerSession = transport.connect(access)
                    opened.callback(_close, session)
                    return session

                return OpenWorker(worker, tensors, scheme, connect)

            numbers = iter(range(sys.maxsize))
            yield serve
            self._soon("the end of the test, which closes sessions, tensors and transports,", opened.close)

    # -- the protocol -------------------------------------------------------------------------------------------------

    def test_it_is_a_transport(
        self, provider: TransportProvider, settings: Mapping[str, str], plugins: PluginManager
    ) -> None:
        """The factory returns an object with the methods of the protocol."""
        _, transport = plugins.open(TRANSPORT, ModelURI(provider.schemes[0]), settings)
        if not isinstance(transport, Transport):
            violated(f"{type(transport).__name__} lacks methods of modelexpress_core.contracts.transport.Transport")
        transport.close()

    def test_served_tensors_say_what_readers_need(self, serve: _Serve) -> None:
        """``serve`` returns topology, services, and a description that has 16 MiB at most for 100,000 tensors."""
        memory = random_bytes(_MANY_TENSORS * 16, device=self.device)
        names = [f"model.layers.{number}.self_attn.qkv_proj.weight_scale" for number in range(_MANY_TENSORS)]
        worker = serve({name: memory[16 * number : 16 * number + 16] for number, name in enumerate(names)})
        served = worker.served
        if not isinstance(served.description, bytes):
            violated(f"the description is {type(served.description).__name__}, not bytes")
        most_bytes = _MAX_DESCRIPTION_BYTES * _MANY_TENSORS // _MOST_TENSORS
        if len(served.description) > most_bytes:
            violated(
                f"the description of {_MANY_TENSORS} tensors has {len(served.description)} bytes, and at most "
                f"{most_bytes} are allowed: {_MAX_DESCRIPTION_BYTES >> 20} MiB for {_MOST_TENSORS} tensors"
            )
        texts = [text for entry in served.topology.items() for text in entry]
        if not all(isinstance(text, str) for text in texts):
            violated(f"the topology is {dict(served.topology)!r}; its names and values must be texts")
        if not isinstance(served.services, Mapping):
            violated(f"services is {type(served.services).__name__}; return a mapping, which may be empty")
        self._read(worker, worker.connect(), [(names[number], 0, 16) for number in (0, 1, _MANY_TENSORS - 1)])

    def test_any_worker_can_be_ranked(
        self, provider: TransportProvider, settings: Mapping[str, str], serve: _Serve
    ) -> None:
        """``tier``, if it is a function, returns a tier of transports, whatever a worker publishes."""
        published = serve({"weight": random_bytes(1, device=self.device)}).served.topology
        for topology in ({}, *(dict.fromkeys(published, value) for value in _STRANGE_VALUES)):
            try:
                provider.tier_of(Peer("source", "worker", topology=topology), settings)
            except Exception as exc:  # noqa: BLE001 - whatever a plugin raises
                shown = repr(topology)[:200]
                violated(f"tier of a worker that publishes {shown} raised {type(exc).__name__}: {str(exc)[:200]}")

    # -- reading ------------------------------------------------------------------------------------------------------

    def test_reads_any_range(self, serve: _Serve) -> None:
        """``read`` brings the bytes of any range of any tensor, whatever the order, and writes nowhere else."""
        sizes = {"a": 1, "b": 4096, "c": 100_003, "d": 3 * _MIB + 5}
        worker = serve({name: random_bytes(size, ord(name), self.device) for name, size in sizes.items()})
        chance = random.Random(5)  # noqa: S311 - no secret
        session = worker.connect()
        edges = [("a", 0, 1), ("b", 0, 4096), ("b", 4095, 1), ("c", 1, 100_002), ("d", _MIB - 1, 2), ("d", 0, 1)]
        edges += [("d", 3 * _MIB + 4, 1), ("d", 7, 2 * _MIB), ("c", 0, 100_003), ("d", 0, 3 * _MIB + 5)]
        self._read(worker, session, edges)
        for _ in range(12):
            ranges = []
            for _ in range(chance.randint(1, _BATCH)):
                name = chance.choice(list(sizes))
                offset = chance.randrange(sizes[name])
                ranges.append((name, offset, chance.randint(1, min(sizes[name] - offset, 1 << chance.randint(0, 20)))))
            self._read(worker, session, ranges)

    def test_reads_a_batch_of_whole_chunks(self, serve: _Serve) -> None:
        """``read`` takes what core gives it: eight chunks of 4 MiB, and the rest of a tensor."""
        size = (_BATCH - 1) * _CHUNK_BYTES + 13
        worker = serve({"weight": random_bytes(size, device=self.device)})
        starts = range(0, size, _CHUNK_BYTES)
        self._read(worker, worker.connect(), [("weight", start, min(_CHUNK_BYTES, size - start)) for start in starts])

    def test_reads_many_small_tensors(self, serve: _Serve) -> None:
        """``read`` takes a hundred ranges in one call, of tensors with names of any kind."""
        unusual = ["with space", "slash/and\\", "ünïcödé-模型-🙂", "{'a': \"b\"}", "line\nbreak", "x" * 300, "%41", ""]
        names = unusual + [f"model.layers.{number}.weight" for number in range(92)]
        worker = serve({name: random_bytes(33, seed, self.device) for seed, name in enumerate(names)})
        self._read(worker, worker.connect(), [(name, 1, 31) for name in reversed(names)])

    def test_reads_no_ranges(self, serve: _Serve) -> None:
        """A call without ranges yields nothing and raises nothing."""
        worker = serve({"weight": random_bytes(100, device=self.device)})
        session = worker.connect()
        same([], self._soon("read([])", lambda: list(session.read([]))), "read([]) yielded")
        self._read(worker, session, [("weight", 0, 100)])

    def test_a_range_may_be_read_again(self, serve: _Serve) -> None:
        """Core reads a range once more if its digest is wrong: in another call, or twice in one."""
        worker = serve({"weight": random_bytes(100_003, device=self.device)})
        session = worker.connect()
        for _ in range(2):
            self._read(worker, session, [("weight", 5, 90_000), ("weight", 5, 90_000), ("weight", 8, 90_000)])

    def test_a_read_that_is_abandoned_disturbs_no_other(self, serve: _Serve) -> None:
        """A reader may stop after any position. The session goes on, and ``close`` ends what is left."""
        worker = serve({"weight": random_bytes(8 * _MIB, device=self.device)})
        session = worker.connect()
        into = _Destinations(_pieces("weight", 32), self.device)
        stream = session.read(into.reads)
        self._soon("the first position", stream.__next__)
        if hasattr(stream, "close"):
            self._soon("close of the iterator that read returned", stream.close)
        del stream
        self._read(worker, session, [("weight", 3, 100_000)])
        self._soon("close of the session", session.close)
        into.overwrite()
        time.sleep(_AFTERWARDS_SECONDS)
        into.check_overwritten("after its session was closed, for a reader that had stopped")

    def test_what_has_landed_is_not_written_again(self, serve: _Serve) -> None:
        """What a session reports to ``TensorRead.landed`` is in place by then, and stays: core digests it then."""
        size = 9 * _MIB + 3
        worker = serve({"weight": random_bytes(size, device=self.device)})
        expected = worker.content()["weight"]
        destination = torch.full((size,), _FILL, dtype=torch.uint8, device=self.device)
        landed = 0

        def note(nbytes: int) -> None:
            nonlocal landed
            if not landed <= nbytes <= size:
                violated(f"landed was called with {nbytes} after {landed}, for a range of {size} bytes")
            if not torch.equal(destination[landed:nbytes].cpu(), expected[landed:nbytes]):
                violated(f"landed was called with {nbytes}, and the bytes before are not those of the tensor")
            destination[landed:nbytes] = _OVERWRITTEN
            landed = nbytes

        self._soon("a read", lambda: list(worker.connect().read([TensorRead("weight", 0, destination, note)])))
        got = destination.cpu()
        if not torch.equal(got[landed:], expected[landed:]) or not bool((got[:landed] == _OVERWRITTEN).all()):
            violated("bytes were written after they had been reported to landed, or the rest is wrong")

    def test_threads_read_at_the_same_time(self, serve: _Serve) -> None:
        """Several threads read over one session at once; each gets the right bytes."""
        worker = serve({name: random_bytes(2 * _MIB + 3, ord(name), self.device) for name in "ab"})
        session = worker.connect()
        expected = worker.content()

        def read(number: int) -> None:
            chance = random.Random(number)  # noqa: S311 - no secret
            for _ in range(8):
                ranges = []
                for _ in range(4):
                    offset = chance.randrange(2 * _MIB)
                    ranges.append((chance.choice("ab"), offset, chance.randint(1, 2 * _MIB - offset)))
                self._read(worker, session, ranges, expected)

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            self._in_threads(4, read, what="a read while other threads read")
        finally:
            sys.setswitchinterval(before)

    def test_workers_and_sessions_are_apart(self, serve: _Serve) -> None:
        """Two workers hold tensors of the same names: a session reads its own, also after others were closed."""
        first, second = (serve({"weight": random_bytes(100_003, seed, self.device)}) for seed in (1, 2))
        sessions = [first.connect(), second.connect(), first.connect()]
        ranges = [("weight", 7, 90_000)]
        for _ in range(2):
            for worker, session in zip((first, second, first), sessions, strict=True):
                self._read(worker, session, ranges)
        self._soon("close of the session", sessions[0].close)
        self._read(first, sessions[2], ranges)
        self._soon("close of the served tensors", first.served.close)
        self._read(second, sessions[1], ranges)

    # -- what is refused ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("name", "offset", "length"),
        [
            ("weight", 1000, 1),
            ("weight", 0, 1001),
            ("weight", 999, 2),
            ("weight", 1 << 40, 1),
            ("weight", 1 << 62, 1 << 10),
            ("weigh", 0, 1),
            ("other", 0, 1),
        ],
    )
    def test_bytes_that_are_not_served_are_refused(
        self, serve: _Serve, secrets: Sequence[str], name: str, offset: int, length: int
    ) -> None:
        """A range beyond the end of a tensor, or of an unknown tensor, raises BackendError; no other memory is read."""
        worker = serve({"weight": random_bytes(1000, device=self.device)})
        lease_id = worker.lease()
        session = worker.connect(lease_id)
        into = _Destinations([(name, offset, length)], self.device)
        yielded: list[int] = []
        error = self._failing(f"read of {_named(into.reads[0])}", lambda: yielded.extend(session.read(into.reads)))
        self._check(error, lease_id, secrets)
        same([], yielded, "before the error, read yielded")
        into.check_margins()
        if bool((into.reads[0].destination == _SECRET).sum() > _SECRET_SHARE * length):
            violated(f"read of {_named(into.reads[0])} brought memory that is not the tensor's")

    @pytest.mark.parametrize("kind", ["empty", "unknown", "released"])
    def test_without_a_lease_nothing_is_read(self, serve: _Serve, secrets: Sequence[str], kind: str) -> None:
        """A lease that never existed, or has ended, raises BackendError: the memory may have changed."""
        self._needs_leases()
        worker = serve({"weight": random_bytes(1000, device=self.device)})
        lease_id = {"empty": "", "unknown": "0" * 32, "released": worker.lease()}[kind]
        worker.worker.leases.release(lease_id)
        into = _Destinations([("weight", 0, 1000)], self.device)
        yielded: list[int] = []

        def read() -> None:
            with contextlib.closing(worker.connect(lease_id)) as session:
                yielded.extend(session.read(into.reads))

        error = self._failing(f"read with a lease that is {kind}", read)
        self._check(error, lease_id, secrets)
        same([], yielded, "before the error, read yielded")
        if bool((into.reads[0].destination != _FILL).any()):
            violated(f"with a lease that is {kind}, read wrote bytes of the worker before it raised {error!r}")

    def test_a_lease_that_ends_ends_the_read(self, serve: _Serve, secrets: Sequence[str]) -> None:
        """After the end of its lease a reader gets no more bytes, and BackendError with ``peer_at_fault``."""
        self._needs_leases()
        worker = serve({"weight": random_bytes(8 * _MIB, device=self.device)})
        lease_id = worker.lease()
        session, expected = worker.connect(lease_id), worker.content()
        into = _Destinations(_pieces("weight", 32), self.device)
        stream = session.read(into.reads)
        done = [self._soon("the first position", lambda: next(stream))]
        worker.worker.leases.release(lease_id)
        time.sleep(_AFTERWARDS_SECONDS)  # what was read before the end may still be on its way
        worker.worker.offered.memory["weight"].fill_(_OVERWRITTEN)

        error = self._error_of("the rest of a read whose lease has ended", lambda: done.extend(stream), soon=True)
        for position in done:
            into.check(position, expected, "read after the end of its lease, when the memory was in use again")
        if error is None:
            if len(done) < len(into.reads):
                violated(f"the read ended after {len(done)} of {len(into.reads)} ranges without an error")
            error = self._failing("a read after the end of its lease", lambda: list(session.read(into.reads)))
        self._check(error, lease_id, secrets, peer_at_fault=True)

    def test_a_description_of_something_else_is_refused(self, serve: _Serve, secrets: Sequence[str]) -> None:
        """A description comes from another machine: one that makes no sense raises BackendError, and nothing else."""
        worker = serve({"weight": random_bytes(1000, device=self.device)})
        description = worker.served.description
        if not description:
            pytest.skip("the description of this transport is empty")
        chance = random.Random(1)  # noqa: S311 - no secret
        changed = bytes(byte ^ 0x55 for byte in description)
        for wrong in (b"", b"\0", changed, chance.randbytes(len(description)), chance.randbytes(1 << 16), b"\0" * 4096):
            into = _Destinations([("weight", 0, 1000)], self.device)
            lease_id = worker.lease()

            def read(lease_id: str = lease_id, wrong: bytes = wrong, reads: Sequence[TensorRead] = into.reads) -> None:
                with contextlib.closing(worker.connect(lease_id, wrong)) as session:
                    list(session.read(reads))

            error = self._failing(f"a read with a description that begins with {wrong[:16]!r}", read)
            self._check(error, lease_id, secrets)

    def test_a_worker_that_is_gone_is_unavailable(
        self,
        provider: TransportProvider,
        settings: Mapping[str, str],
        plugins: PluginManager,
        secrets: Sequence[str],
    ) -> None:
        """Without the worker, ``connect`` or the first read raises UnavailableError, DeadlineError or NotFoundError."""
        scheme = provider.schemes[0]
        tensors = {"weight": random_bytes(1000, device=self.device)}
        with serving_worker(tensors, [scheme], plugins=plugins, environ=settings) as worker:
            lease_id = worker.leases.grant() or ""
            access = PeerAccess(Peer(worker.source_id, worker.worker_id), lease_id, worker.served[scheme].description)
        _, transport = plugins.open(TRANSPORT, ModelURI.parse(worker.uri(scheme)), settings)
        into = _Destinations([("weight", 0, 1000)], self.device)

        def read() -> None:
            with contextlib.closing(transport.connect(access)) as session:
                list(session.read(into.reads))

        with contextlib.closing(transport):
            error = self._failing("a read of a worker that is gone", read)
        self._check(error, lease_id, secrets)
        if not isinstance(error, (UnavailableError, DeadlineError, NotFoundError)):
            violated(f"a worker that is gone raised {type(error).__name__}: {error}", error)

    # -- close --------------------------------------------------------------------------------------------------------

    def test_close_of_a_session_may_be_called_again(self, serve: _Serve) -> None:
        """``close`` of a session may be called several times, before and after reads."""
        worker = serve({"weight": random_bytes(1000, device=self.device)})
        unused, used = worker.connect(), worker.connect()
        self._read(worker, used, [("weight", 0, 1000)])
        for session in (unused, used):
            for _ in range(3):
                self._closes("close of a session, once and again,", session.close)

    def test_reads_after_close_fail(self, serve: _Serve, secrets: Sequence[str]) -> None:
        """``read`` of a closed session raises BackendError without ``peer_at_fault``, and writes nothing."""
        worker = serve({"weight": random_bytes(1000, device=self.device)})
        lease_id = worker.lease()
        session = worker.connect(lease_id)
        session.close()
        into = _Destinations([("weight", 0, 1000)], self.device)
        into.overwrite()
        error = self._failing("a read after close of its session", lambda: list(session.read(into.reads)))
        self._check(error, lease_id, secrets, peer_at_fault=False)
        into.check_overwritten("after close of its session")

    def test_close_ends_reads_in_other_threads(self, serve: _Serve, secrets: Sequence[str]) -> None:
        """``close`` ends running reads with BackendError without ``peer_at_fault``; then nothing is written."""
        worker = serve({"weight": random_bytes(8 * _MIB, device=self.device)})
        lease_id = worker.lease()
        session = worker.connect(lease_id)
        into = [_Destinations(_pieces("weight", 16), self.device) for _ in range(3)]
        reading = [threading.Event() for _ in into]
        errors: list[BackendError] = []

        def read(number: int) -> None:
            keep_on = self._reading(session, into[number], reading[number])
            error = self._error_of("a read during close", keep_on)
            if error is None:
                violated("reads went on after close of their session, without an error")
            errors.append(error)

        def close() -> None:
            for event in reading:
                event.wait(self.hang_seconds)
            try:
                self._soon("close during reads", session.close)
            except BackendError as exc:
                violated(f"close raised {exc!r}, although the worker answers: wait for the reads that have begun", exc)
            for each in into:
                each.overwrite()

        self._in_threads(len(into), read, meanwhile=close, what="a read whose session was closed")
        time.sleep(_AFTERWARDS_SECONDS)
        for each in into:
            each.check_overwritten("after close of its session had returned")
        for error in errors:
            self._check(error, lease_id, secrets, peer_at_fault=False)

    def test_close_ends_a_read_that_waits(
        self, stalled: tuple[PeerSession, TensorRead] | None, secrets: Sequence[str]
    ) -> None:
        """``close`` ends a stalled read, so that a load goes on elsewhere without waiting for a silent worker.

        Otherwise ``close`` raises BackendError, so that core does not use the memory again.
        """
        if stalled is None:
            pytest.skip("the fixture `stalled` is None")
        session, wanted = stalled
        ended: list[float] = []
        closed: list[float] = []

        def read(_: int) -> None:
            try:
                list(session.read([wanted]))
            except BackendError as exc:
                ended.append(time.monotonic())
                check_error(exc, secrets)
                return
            violated("the read returned without an error, although it should stall: check the fixture `stalled`")

        def close() -> None:
            time.sleep(_AFTERWARDS_SECONDS)
            closed.append(time.monotonic())
            with contextlib.suppress(BackendError):
                self._soon("close during a stalled read", session.close)

        self._in_threads(2, read, meanwhile=close, what="a stalled read whose session was closed")
        if min(ended) < closed[0]:
            violated("a read ended before close was called, although it should stall: check the fixture `stalled`")
        late = max(ended) - closed[0]
        if late > self.close_seconds:
            violated(
                f"a stalled read ended {late:.1f} s after close of its session, and at most {self.close_seconds:g} s "
                "are allowed (close_seconds): end its connection in close, and do not wait for its time-out"
            )

    def test_closed_tensors_are_not_read(self, serve: _Serve, secrets: Sequence[str]) -> None:
        """After ``close`` of the served tensors, no session reads them, new or old. It may be called again."""
        worker = serve({"weight": random_bytes(1000, device=self.device)})
        lease_id = worker.lease()
        old = worker.connect(lease_id)
        self._read(worker, old, [("weight", 0, 1000)])
        description = worker.served.description
        for _ in range(2):
            self._closes("close of the served tensors, once and again,", worker.served.close)
        worker.worker.offered.memory["weight"].fill_(_OVERWRITTEN)

        def read(session: PeerSession) -> None:
            list(session.read(_Destinations([("weight", 0, 1000)], self.device).reads))

        error = self._failing("a read of closed tensors, over a session from before", lambda: read(old))
        self._check(error, lease_id, secrets, peer_at_fault=True)
        error = self._failing("connecting to closed tensors", lambda: read(worker.connect(lease_id, description)))
        self._check(error, lease_id, secrets)

    @pytest.mark.parametrize("turn", range(3))
    def test_close_of_served_tensors_waits_for_reads(self, serve: _Serve, secrets: Sequence[str], turn: int) -> None:
        """``close`` of the served tensors returns when no send uses their memory, which is then used for others."""
        worker = serve({"weight": random_bytes(8 * _MIB, turn, self.device)})
        lease_id = worker.lease()
        session, expected = worker.connect(lease_id), worker.content()
        reading = [threading.Event() for _ in range(3)]

        def read(number: int) -> None:
            end = time.monotonic() + self.hang_seconds
            while time.monotonic() < end:
                into = _Destinations([("weight", 0, 4 * _MIB), ("weight", 4 * _MIB, 4 * _MIB)], self.device)
                done: list[int] = []
                try:
                    for position in session.read(into.reads):
                        done.append(position)
                        reading[number].set()
                except BackendError as exc:
                    self._check(exc, lease_id, secrets, peer_at_fault=True)
                    return
                finally:
                    for position in done:
                        into.check(position, expected, "read while the served tensors were closed")
            violated("reads went on after close of the served tensors, without an error")

        def close() -> None:
            for event in reading:
                event.wait(self.hang_seconds)
            time.sleep(0.002 * turn)  # so that reads are at another point
            self._soon("close of the served tensors during reads", worker.served.close)
            worker.worker.offered.memory["weight"].fill_(_OVERWRITTEN)

        self._in_threads(len(reading), read, meanwhile=close, what="a read whose tensors were closed")

    def test_a_reader_that_stops_does_not_hold_up_close(self, serve: _Serve) -> None:
        """``close`` of the served tensors returns soon, although a reader that has begun takes no more bytes."""
        worker = serve({"weight": random_bytes(8 * _MIB, device=self.device)})
        into = _Destinations(_pieces("weight", 32), self.device)
        stream = worker.connect().read(into.reads)
        self._soon("the first position", stream.__next__)
        begun = time.monotonic()
        try:
            self._soon("close of the served tensors, while a reader has stopped", worker.served.close)
        finally:
            getattr(stream, "close", lambda: None)()
        seconds = time.monotonic() - begun
        if seconds > self.close_seconds:
            violated(
                f"close of the served tensors took {seconds:.1f} s, because a reader had stopped, and at most "
                f"{self.close_seconds:g} s are allowed (close_seconds): copy a piece, then send it without a lock"
            )

    def test_closed_sessions_leave_nothing_behind(self, serve: _Serve) -> None:
        """After ``close`` of many sessions there are no more threads and file descriptors than before."""
        worker = serve({"weight": random_bytes(_MIB, device=self.device)})
        content = worker.content()

        def use(number: int) -> None:
            for _ in range(number):
                with contextlib.closing(worker.connect()) as session:
                    self._read(worker, session, [("weight", 5, 100_000)], content)

        use(3)  # what a transport keeps for all sessions is there then
        before = _threads_and_descriptors()
        use(_SESSIONS)
        end = time.monotonic() + self.close_seconds
        while (left := _more(before)) and time.monotonic() < end:
            time.sleep(0.02)
        if left:
            violated(f"{self.close_seconds:g} s after close of {_SESSIONS} sessions there are {left} (close_seconds)")

    # -- whole loads --------------------------------------------------------------------------------------------------

    def test_a_whole_load_is_equal(self, serve: _Serve, settings: Mapping[str, str], plugins: PluginManager) -> None:
        """A load brings tensors of every dtype and layout, tied ones and empty ones; gaps stay as they are."""
        source, _ = _tensors_of_all_kinds(self.device, fill=None)
        target, memory = _tensors_of_all_kinds(self.device, fill=0)
        expected, expected_memory = _tensors_of_all_kinds(self.device, fill=0)
        for name, tensor in source.items():
            bytes_of(name, expected[name]).scatter(bytes_of(name, tensor).gathered())
        worker = serve(source)

        def load() -> mx.LoadReport:
            return mx.load_into(target, worker.uri, environ=settings, plugins=plugins)

        try:
            report = self._soon("mx.load_into", load)
        except mx.ModelExpressError as exc:
            violated(f"mx.load_into raised {type(exc).__name__}: {exc}", exc)
        for name in source:
            got, wanted = (bytes_of(name, each[name]).gathered().cpu() for each in (target, source))
            if not torch.equal(wanted, got):
                violated(f"after mx.load_into, {name} differs from the worker's")
        for number, (wanted, got) in enumerate(zip(expected_memory, memory, strict=True)):
            if not torch.equal(wanted, got):
                violated(f"mx.load_into wrote outside the tensors in memory {number}: in gaps between elements")
        same(0, report.retries, "the load read chunks again, whose bytes were wrong:")
        same(0, worker.worker.leases.out(), "after the load, the number of leases is")

    def test_what_is_sent_is_counted(self, serve: _Serve) -> None:
        """``TensorTable.count_sent`` hears of every byte once, for the lease under which it was read."""
        if not self.counts_sent:
            pytest.skip("no code of the worker sends (counts_sent is False)")
        size = 3 * _MIB + 5
        worker = serve({"weight": random_bytes(size, device=self.device)})
        wanted = {"first": size + 1, "second": 100}
        for reader, ranges in (("first", [("weight", 0, size), ("weight", 9, 1)]), ("second", [("weight", 7, 100)])):
            lease_id = worker.worker.leases.grant(reader)
            self._read(worker, worker.connect(lease_id), ranges)
        end = time.monotonic() + self.hang_seconds
        while (found := worker.counted()) != wanted and time.monotonic() < end:  # a piece is counted once it is sent
            time.sleep(0.02)
        if found != wanted:
            violated(f"count_sent was called for {found} bytes by reader, and {wanted} were read")

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _needs_leases(self) -> None:
        if not self.checks_leases:
            pytest.skip("no code of the worker runs during a read (checks_leases is False)")

    def _read(
        self,
        worker: OpenWorker,
        session: PeerSession,
        ranges: Sequence[_Range],
        expected: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Read ranges, and check each when it is yielded and at the end; fail if the worker's memory changed."""
        content = worker.content() if expected is None else expected
        into = _Destinations(ranges, self.device)
        done: list[int] = []
        error = self._error_of("read", lambda: done.extend(self._positions(session, into, content)), soon=True)
        if error is not None:
            violated(f"read of {ranges[:_BATCH]} raised {type(error).__name__}: {error}", error)
        missing = sorted(set(range(len(ranges))) - set(done))
        if missing:
            violated(f"read ended without yielding {len(missing)} of {len(ranges)} positions: {missing[:_BATCH]}")
        for position in range(len(ranges)):
            into.check(position, content, "after it had been yielded")
        into.check_margins()
        for name, memory in worker.worker.offered.memory.items():
            if expected is None and not torch.equal(content[name], memory.cpu()):
                violated(f"read changed the worker's own memory of {name!r}")

    def _reading(self, session: PeerSession, into: _Destinations, reading: threading.Event) -> Callable[[], None]:
        """A function that reads until there is an error; ``reading`` is set by the first range."""

        def keep_reading() -> None:
            end = time.monotonic() + self.hang_seconds
            while time.monotonic() < end:
                for _ in session.read(into.reads):
                    reading.set()

        return keep_reading

    def _positions(
        self, session: PeerSession, into: _Destinations, content: Mapping[str, torch.Tensor]
    ) -> Sequence[int]:
        """The positions that a read yields, each checked when it is yielded."""
        done: list[int] = []
        for position in session.read(into.reads):
            if type(position) is not int or not 0 <= position < len(into.reads):
                violated(f"read of {len(into.reads)} ranges yielded {position!r}, which is not a position")
            if position in done:
                violated(f"read yielded position {position} twice")
            done.append(position)
            into.check(position, content, "when its position was yielded")
        return done

    def _closes(self, what: str, close: Callable[[], object]) -> None:
        error = self._error_of(what, close, soon=True)
        if error is not None:
            violated(f"{what} raised {error!r}", error)

    def _error_of(self, what: str, function: Callable[[], object], *, soon: bool = False) -> BackendError | None:
        """Return the BackendError that ``function`` raises, None if it returns; with a limit in time if ``soon``."""
        try:
            if soon:
                self._soon(what, function)
            else:
                function()
        except BackendError as exc:
            return exc
        except AssertionError:
            raise
        except Exception as exc:  # noqa: BLE001 - the author reads it
            violated(f"{what} raised {type(exc).__name__}, not BackendError: translate it with `raise ... from`", exc)
        return None

    def _check(
        self, error: BackendError, lease_id: str, secrets: Sequence[str], *, peer_at_fault: bool | None = None
    ) -> None:
        """Check the rules for every error: its fields, no secrets, and which side caused it."""
        check_error(error, secrets)
        text = "".join(traceback.TracebackException.from_exception(error).format())
        if lease_id and lease_id in f"{text} {error!r} {vars(error)!r}":
            violated("the error shows the lease, with which others could read", error)
        if peer_at_fault is not None and error.peer_at_fault is not peer_at_fault:
            side = "the worker" if peer_at_fault else "the reader"
            fault = f"peer_at_fault={error.peer_at_fault}"
            violated(f"the {type(error).__name__} has {fault}, although {side} caused it: {error}", error)


_Serve = Callable[[Mapping[str, torch.Tensor]], OpenWorker]

#: Of random bytes one in 256 has the value by chance.
_SECRET_SHARE = 0.5


def _threads_and_descriptors() -> tuple[int, int]:
    """How many this process has."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def _more(before: tuple[int, int]) -> str:
    """How many more there are, if they grow with the number of sessions; else empty."""
    grown = [now - then for now, then in zip(_threads_and_descriptors(), before, strict=True)]
    named = zip(grown, ("more threads", "more file descriptors"), strict=True)
    return " and ".join(f"{number} {what}" for number, what in named if number >= _SESSIONS // 2)


def _close(session: PeerSession) -> None:
    """Close a session at the end of a test; what close raises is the matter of other tests."""
    with contextlib.suppress(BackendError):
        session.close()


class _OneTransport:
    """A plugin with one record."""

    def __init__(self, provider: TransportProvider) -> None:
        self._provider = attrs.evolve(provider, alternative=False)

    @hookimpl
    def mx_register_transports(self) -> list[TransportProvider]:
        """The record."""
        return [self._provider]


def _pieces(name: str, number: int) -> list[_Range]:
    """Ranges of a mebibyte each, of a tensor with 8 MiB."""
    return [(name, piece % 8 * _MIB, _MIB) for piece in range(number)]


def _tensors_of_all_kinds(device: str, fill: int | None) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Tensors by name, and all memory in which they lie; random bytes, or ``fill`` in each byte."""
    memories: list[torch.Tensor] = []

    def memory(nbytes: int, dtype: torch.dtype) -> torch.Tensor:
        chance = torch.Generator().manual_seed(len(memories))
        most = 2 if dtype is torch.bool else 256
        content = torch.randint(0, most, (nbytes,), dtype=torch.uint8, generator=chance)
        if fill is not None:
            content.fill_(fill)
        memories.append(content.to(device))
        return memories[-1].view(dtype)

    tensors = {}
    for name in _DTYPES:
        dtype = getattr(torch, name, None)
        if dtype is not None:
            tensors[f"dtype {name}"] = memory(3 * 5 * 7 * dtype.itemsize, dtype).view(3, 5, 7)
    large = memory(2 * _CHUNK_BYTES + 13, torch.uint8)
    wide = memory(40 * 60 * 4, torch.float32).view(40, 60)
    pair = memory(64 * 2 * 4, torch.float32)
    tensors |= {
        "large": large,
        "exactly a chunk": memory(_CHUNK_BYTES, torch.bfloat16).view(-1, 64),
        "tied": large,
        "transposed": memory(33 * 65 * 4, torch.float32).view(33, 65).t(),
        "permuted": memory(3 * 4 * 5 * 2, torch.float16).view(3, 4, 5).permute(1, 2, 0),
        "channels last": memory(2 * 3 * 4 * 5 * 4, torch.float32).view(2, 4, 5, 3).permute(0, 3, 1, 2),
        "part of rows": wide[:, 3:17],
        "every other": memory(100, torch.uint8)[1::2],
        "first half": pair[:64],
        "second half": pair[64:],
        "at an odd byte": memory(1001, torch.uint8)[1:],
        "scalar": memory(8, torch.int64)[0],
        "one element": memory(1, torch.int8).view(1, 1, 1),
        "no elements": memory(0, torch.float32).view(0, 4),
    }
    return tensors, memories


_DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16"),
    *("float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
)
