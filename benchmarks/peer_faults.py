"""Faults amid loads from other workers: killed and stopped sources, killed readers, and flipped bits.

``python -m benchmarks peer_faults``, or ``python -m benchmarks.peer_faults --kills 3 --flips 20`` with counts of one's
own. Every load is compared byte by byte with what the source held when it published.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import selectors
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import attrs
import torch
from attrs import field, frozen
from rich.console import Console
from safetensors.torch import save_file

import modelexpress_core as mx
from benchmarks.measuring import Plan, Report, Target, median, print_report, write_json
from benchmarks.peer_fault_workers import Amid, Lane, Source, even_sizes, identity_of, sources, start_reader, tensors_of
from modelexpress_core.bulk import reading
from modelexpress_core.plugins import TRANSPORT, PluginManager

__all__ = [
    "FRAMES",
    "GRPC",
    "NIXL",
    "Counts",
    "Lane",
    "flips_in_memory",
    "flips_on_the_wire",
    "kills",
    "readers",
    "run",
    "stops",
]


GRPC = Lane("grpc", "grpc")
FRAMES = Lane("grpc, no bulk channel", "grpc", {"MX_BULK_PORT": "0"})
NIXL = Lane("nixl, shared memory", "nixl")
_NIXL_TCP = Lane("nixl, TCP", "nixl", {}, "tcp")

#: The ways that are measured. Over TCP, NIXL comes after other transports, and only stopped sources are of interest.
LANES = (NIXL, GRPC, FRAMES)

#: How long a source may be silent, and a call may take.
_STALL_SECONDS = 2.0
_PATIENCE = {"MX_STALL_SECONDS": "2", "MX_SERVER_DEADLINE_SECONDS": "2"}

#: What readers that were killed held must be free after this time.
_CLEAN_SECONDS = 15.0

_READERS_AT_ONCE = 4

#: The sizes of the tensors whose bits are flipped: single bytes, odd numbers, and the ends of chunks of 4 MiB.
_ODD_SIZES = (1, 2, 7, 4095, 4097, 65_537, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, (8 << 20) + 13)

#: What a source sends before the bytes of tensors.
_FIRST_BYTES = 4096

_Say = Callable[[str], None]


@frozen
class Counts:
    """How often each fault happens, and how large the model is.

    Attributes:
        kills: Killed sources, for each transport.
        stops: Stopped sources, for each lane.
        readers: Killed readers, for each transport.
        flips: Flipped bits, over all transports, in memory and on the wire.
        mib: Size of the model.
    """

    kills: int = 50
    stops: int = 5
    readers: int = 100
    flips: int = 1000
    mib: int = 512


_QUICK = Counts(kills=2, stops=1, readers=4, flips=9, mib=64)


@contextlib.contextmanager
def _ucx(tls: str) -> Iterator[None]:
    """Set UCX_TLS of this process: NIXL reads it when it makes an agent."""
    before = os.environ.get("UCX_TLS")
    os.environ["UCX_TLS"] = tls
    try:
        yield
    finally:
        del os.environ["UCX_TLS"]
        if before is not None:
            os.environ["UCX_TLS"] = before


@frozen
class _Model:
    """A model: what loads are compared with, and where it lies on a disk.

    Attributes:
        sizes: Sizes of its tensors.
        expected: Their content.
        checkpoint: URI of its files; empty if there are none.
        destination: Where loads write to.
    """

    sizes: Sequence[int]
    expected: Mapping[str, torch.Tensor] = field(repr=False)
    checkpoint: str = ""
    destination: Mapping[str, torch.Tensor] = field(factory=dict, repr=False)

    @classmethod
    def of(cls, sizes: Sequence[int], directory: Path | None = None) -> _Model:
        expected = tensors_of(sizes)
        if directory is not None:
            save_file(expected, directory / "model.safetensors")
        uri = directory.as_uri() if directory is not None else ""
        return cls(sizes, expected, uri, tensors_of(sizes, filled=False))

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)

    def fill(self, value: int) -> None:
        for tensor in self.destination.values():
            tensor.fill_(value)

    def has_arrived(self) -> bool:
        return all(torch.equal(tensor, self.destination[name]) for name, tensor in self.expected.items())

    def load(self, uri: str, amid: Amid, peers: Sequence[str] = (), **environ: str) -> tuple[mx.LoadReport, float]:
        """Load from a peer, or else from ``uri``; return the report and the time."""
        variables = {"MX_DISCOVERY": "static://", "MX_STATIC_SOURCES": ",".join(peers), **environ} if peers else environ
        identity = identity_of(self.expected) if peers else None
        begun = time.monotonic()
        report = mx.load_into(self.destination, uri, identity=identity, environ=variables, plugins=amid.manager())
        return report, time.monotonic() - begun


def _undisturbed() -> Amid:
    return Amid(1 << 62, lambda _: None)


def _is_installed(scheme: str) -> bool:
    plugins = PluginManager.discover({})
    if scheme not in plugins.table(TRANSPORT).schemes:
        return False
    with contextlib.suppress(mx.PluginError):
        plugins.open(TRANSPORT, mx.ModelURI(scheme), {})[1].close()
        return True
    return False


# -- sources that are killed -------------------------------------------------------------------------------------------


def kills(lane: Lane, count: int, mib: int, say: _Say = lambda _: None) -> dict[str, Any]:
    """Kill the source at a random point of each of ``count`` loads.

    Behind it is another source in every other load, else a checkpoint on a disk. The delay is the time of such a load
    over the median of loads without a fault.
    """
    chance, scheme = random.Random(f"kills over {lane.name}"), lane.scheme
    delays, right, noticed, errors = [], 0, 0, Counter[str]()
    with tempfile.TemporaryDirectory() as directory, sources() as start:
        model = _Model.of(even_sizes(mib), Path(directory))
        alive = [start(model.sizes, lane) for _ in range(2)]
        # The first load makes the process ready for the others.
        usual = [
            model.load(model.checkpoint, _undisturbed(), [alive[0].uri(scheme)])[1] for _ in range(min(5, count) + 1)
        ]
        for number in range(count):
            behind = alive if number % 2 else alive[:1]
            by_uri = {source.uri(scheme): source for source in behind}
            share = chance.uniform(0.05, 0.95)
            amid = Amid(int(share * model.nbytes), lambda uri, named=by_uri: named[uri].signal(signal.SIGKILL))
            model.fill(0)
            try:
                report, seconds = model.load(model.checkpoint, amid, list(by_uri))
                right += model.has_arrived()
                noticed += bool(amid.failures) or any(source.error for source in report.sources)
                delays.append(seconds - median(usual[1:]))
            except mx.ModelExpressError as exc:
                errors[type(exc).__name__] += 1
            alive = [source if source.process.is_alive() else start(model.sizes, lane) for source in alive]
            say(f"{lane.name}: {number + 1} of {count} sources killed, {right} loads right")
    return {
        "fault": "source killed",
        "over": lane.name,
        "count": count,
        "right": right,
        "wrong": count - right - errors.total(),
        "failed": errors.total(),
        "median s": median(delays) if delays else None,
        "longest s": max(delays, default=None),
        "notes": f"delay over {median(usual[1:]):.2f} s{_listed(errors)}",
        "details": {"delays": delays, "usual": usual, "noticed": noticed},
    }


# -- sources that are stopped ------------------------------------------------------------------------------------------


def stops(lane: Lane, count: int, mib: int, say: _Say = lambda _: None) -> dict[str, Any]:
    """Stop the source at a random point of each load, and let it go on when the load has ended elsewhere.

    Behind it is another source in every other load, else a checkpoint on a disk.
    Then the destination has another content, which must stay.
    """
    chance, scheme, name = random.Random(f"stops over {lane.name}"), lane.scheme, lane.name
    seconds, right, unusable, overwritten, errors = [], 0, 0, 0, Counter[str]()
    with tempfile.TemporaryDirectory() as directory, sources() as start, _ucx(lane.ucx_tls):
        model = _Model.of(even_sizes(mib), Path(directory))
        alive = [start(model.sizes, lane) for _ in range(2)]
        model.load(model.checkpoint, _undisturbed(), [alive[0].uri(scheme)])
        for number in range(count):
            by_uri = {source.uri(scheme): source for source in (alive if number % 2 else alive[:1])}
            stopped: list[Source] = []

            def stop(uri: str, named: Mapping[str, Source] = by_uri, stopped: list[Source] = stopped) -> None:
                named[uri].signal(signal.SIGSTOP)
                stopped.append(named[uri])

            amid = Amid(int(chance.uniform(0.05, 0.95) * model.nbytes), stop)
            model.fill(0)
            begun = time.monotonic()
            try:
                model.load(model.checkpoint, amid, list(by_uri), **_PATIENCE)
                right += model.has_arrived()
            except mx.ModelExpressError as exc:
                unusable += "end this process" in str(exc)
                errors[type(exc).__name__] += "end this process" not in str(exc)
            seconds.append(time.monotonic() - begun)
            model.fill(0xA5)
            for source in stopped:
                source.signal(signal.SIGCONT)
                source.held()  # it runs again
            _wait_for_quarantine()
            if not errors.total() and not unusable:
                overwritten += any(bool((tensor != 0xA5).any()) for tensor in model.destination.values())
            if unusable:
                break  # as the error says
            say(f"{name}: {number + 1} of {count} sources stopped, {right} loads right")
    return {
        "fault": "source stopped",
        "over": name,
        "count": len(seconds),
        "right": right,
        "wrong": overwritten,
        "failed": errors.total() + unusable,
        "median s": median(seconds),
        "longest s": max(seconds),
        "notes": f"{overwritten} overwritten later, {unusable} said to end the process{_listed(errors)}",
        "details": {"seconds": seconds, "unusable": unusable},
    }


def _wait_for_quarantine() -> None:
    """Wait until no read may write any more: for that, NIXL needs to be asked."""
    try:
        from mx_nixl._quarantine import quarantined_bytes
    except ImportError:
        return
    deadline = time.monotonic() + 30
    while quarantined_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)


# -- readers that are killed -------------------------------------------------------------------------------------------


def readers(lane: Lane, count: int, mib: int, say: _Say = lambda _: None) -> dict[str, Any]:
    """Kill ``count`` readers amid their loads, four at a time, and look at what the source holds before and after."""
    chance = random.Random(f"readers over {lane.name}")
    with sources() as start:
        model = _Model.of(even_sizes(mib))
        source = start(model.sizes, lane)
        uri = source.uri(lane.scheme)

        def batch(points: Sequence[int]) -> int:
            started = [start_reader(uri, model.sizes, point) for point in points]
            for process in started:
                process.join()
            return sum(process.exitcode == -signal.SIGKILL for process in started)

        model.load(uri, _undisturbed())
        usual = min(model.load(uri, _undisturbed())[1] for _ in range(5))
        batch([model.nbytes + 1] * _READERS_AT_ONCE)  # these are not killed: threads and their memory are made once
        before, killed = _settled(source)[1], 0
        points = [int(chance.uniform(0.05, 0.95) * model.nbytes) for _ in range(count)]
        for number in range(0, count, _READERS_AT_ONCE):
            killed += batch(points[number : number + _READERS_AT_ONCE])
            say(f"{lane.name}: {killed} readers killed")
        most = source.held()
        seconds, after = _settled(source)
        later = min(model.load(uri, _undisturbed())[1] for _ in range(5))
        right = model.has_arrived()
    more = {
        name: getattr(after, name) - getattr(before, name) for name in ("descriptors", "mappings", "threads", "leases")
    }
    grown = (after.private_bytes - before.private_bytes) / (1 << 20)
    return {
        "fault": "reader killed",
        "over": lane.name,
        "count": count,
        "right": int(right),
        "wrong": int(not right),
        "failed": count - killed,
        "median s": seconds,
        "longest s": seconds,
        "notes": f"{grown:+.1f} MiB, "
        + ", ".join(f"{number:+d} {name}" for name, number in more.items())
        + f"; rate {usual / later:.2f} of before",
        "details": {
            "before": attrs.asdict(before),
            "most": attrs.asdict(most),
            "after": attrs.asdict(after),
            "left over": {**more, "MiB": grown},
            "rate": usual / later,
        },
    }


def _settled(source: Source) -> tuple[float, Any]:
    """Wait until no lease is left and nothing has changed for a second, or the time is over; return what is held."""
    begun, since, last = time.monotonic(), time.monotonic(), source.held()
    while (now := time.monotonic()) - begun < _CLEAN_SECONDS and (last.leases or now - since < 1.0):
        time.sleep(min(0.1, max(0.0, begun + _CLEAN_SECONDS - now)))
        held = source.held()
        if attrs.evolve(held, private_bytes=0) != attrs.evolve(last, private_bytes=0):
            since = time.monotonic()
        last = held
    return time.monotonic() - begun, last


# -- bits that are flipped ---------------------------------------------------------------------------------------------


def flips_in_memory(lane: Lane, count: int, say: _Say = lambda _: None) -> dict[str, Any]:
    """Flip one bit of the source's memory after publication, and load; at the ends of tensors in half of the loads."""
    chance = random.Random(f"flips over {lane.name}")
    ends: Counter[str] = Counter()
    with sources() as start:
        model = _Model.of(_ODD_SIZES)
        source = start(model.sizes, lane)
        for number in range(count):
            name = chance.choice([*model.expected])
            last = len(model.expected[name]) - 1
            offset = chance.choice([0, last, chance.randint(0, last), chance.randint(0, last)])
            bit = chance.randrange(8)
            source.flip(name, offset, bit)
            amid = _undisturbed()
            try:
                model.load(source.uri(lane.scheme), amid)
                ends["delivered"] += 1
            except mx.IntegrityError as exc:
                ends["found" if name in str(exc) else "another tensor named"] += 1
            except mx.ModelExpressError as exc:
                ends[type(exc).__name__] += 1
            source.flip(name, offset, bit)
            if number % 50 == 49:
                say(f"{lane.name}: {number + 1} of {count} bits flipped in memory, {ends['found']} found")
        model.fill(0)
        model.load(source.uri(lane.scheme), _undisturbed())
        right = model.has_arrived()
    return {
        "fault": "bit in memory",
        "over": lane.name,
        "count": count,
        "right": ends["found"],
        "wrong": ends["delivered"] + (not right),
        "failed": count - ends["found"] - ends["delivered"],
        "notes": "the load fails, and names the tensor",
        "details": dict(ends),
    }


def flips_on_the_wire(lane: Lane, count: int, say: _Say = lambda _: None) -> dict[str, Any]:
    """Flip one bit of what a source sends in plain text: over gRPC anywhere, also in the frames of HTTP/2.

    Over the bulk channel, the relay is on its way alone: gRPC has one without a relay.
    """
    chance = random.Random(f"flips on the wire of {lane.name}")
    ends: Counter[str] = Counter()
    longest = 0.0
    with sources() as start, contextlib.ExitStack() as stack:
        model = _Model.of(_ODD_SIZES)
        source = start(model.sizes, lane)
        if lane is GRPC:
            uri = source.uri("grpc")
            relay = stack.enter_context(_bulk_through_relay(lambda: model.load(uri, _undisturbed())))
        else:
            relay = stack.enter_context(_FlippingRelay(source.port))
            uri = source.uri("grpc", relay.port)
        model.load(uri, _undisturbed())
        sent = relay.sent_bytes
        while ends.total() < count:
            # In every other load among the first bytes: those of HTTP/2, of layouts and of digests, or of heads.
            most = sent if ends.total() % 2 else _FIRST_BYTES
            relay.arm(chance.randrange(most), chance.randrange(8))
            model.fill(0)
            begun = time.monotonic()
            try:
                report, _ = model.load(uri, _undisturbed(), **_PATIENCE)
            except mx.ModelExpressError:
                ends["failed"] += 1
            else:
                if relay.armed:  # the load needed fewer bytes than the first one
                    continue
                if not model.has_arrived():
                    ends["delivered"] += 1
                else:
                    ends["read again" if report.retries else "without effect"] += 1
            longest = max(longest, time.monotonic() - begun)
            if ends.total() % 50 == 0:
                say(f"{ends.total()} of {count} bits flipped on the wire, {ends['delivered']} delivered")
    return {
        "fault": "bit on the wire",
        "over": lane.name,
        "count": count,
        "right": ends.total() - ends["delivered"],
        "wrong": ends["delivered"],
        "failed": 0,
        "longest s": longest,
        "notes": ", ".join(f"{number} {end}" for end, number in ends.most_common()),
        "details": dict(ends),
    }


@contextlib.contextmanager
def _bulk_through_relay(load: Callable[[], object]) -> Iterator[_FlippingRelay]:
    """A relay before the bulk channel that ``load`` opens, which readers of this process use in the block."""
    original = reading.BulkReader.__init__
    ports: list[int] = []

    def note(reader: reading.BulkReader, offer: reading.BulkOffer, **options: Any) -> None:  # noqa: ANN401
        ports.append(offer.origin.port)
        original(reader, offer, **options)

    with patch.object(reading.BulkReader, "__init__", note):
        load()
    with _FlippingRelay(ports[0]) as relay:

        def lead(reader: reading.BulkReader, offer: reading.BulkOffer, **options: Any) -> None:  # noqa: ANN401
            origin = attrs.evolve(offer.origin, port=relay.port)
            original(reader, attrs.evolve(offer, origin=origin), **options)

        with patch.object(reading.BulkReader, "__init__", lead):
            yield relay


class _FlippingRelay:
    """Relays connections to a port of this machine, and flips one bit of what its server sends.

    Attributes:
        port: Where it listens.
        sent_bytes: What the server has sent so far.
        armed: Whether a bit is still to be flipped.
    """

    def __init__(self, behind: int) -> None:
        self._behind = behind
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._flip: tuple[int, int] | None = None
        self.sent_bytes = 0

    def __enter__(self) -> _FlippingRelay:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._listener.close()

    @property
    def armed(self) -> bool:
        return self._flip is not None

    def arm(self, after_bytes: int, bit: int) -> None:
        """Flip a bit of the byte that follows the next ``after_bytes`` bytes."""
        with self._lock:
            self._flip = (after_bytes, bit)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            buffer = bytearray(1 << 18)
            opened: set[socket.socket] = set()
            while not self._ended.is_set():
                for key, _ in selector.select(0.05):
                    if key.fileobj is self._listener:
                        client = self._listener.accept()[0]
                        server = socket.create_connection(("127.0.0.1", self._behind))
                        opened |= {client, server}
                        selector.register(client, selectors.EVENT_READ, (client, server, False))
                        selector.register(server, selectors.EVENT_READ, (server, client, True))
                        continue
                    origin, target, of_server = key.data
                    if not self._pass(origin, target, buffer, of_server=of_server):
                        for end in (origin, target):
                            selector.unregister(end)
                            end.close()
                            opened.discard(end)
            for end in opened:
                end.close()

    def _pass(self, origin: socket.socket, target: socket.socket, buffer: bytearray, *, of_server: bool) -> bool:
        """Pass on what has arrived; return whether the connection goes on."""
        if origin.fileno() < 0 or target.fileno() < 0:
            return True  # closed in this round of the loop
        try:
            count = origin.recv_into(buffer)
            if of_server:
                self._spoil(buffer, count)
            target.sendall(memoryview(buffer)[:count])
        except OSError:
            return False
        return count > 0

    def _spoil(self, buffer: bytearray, count: int) -> None:
        with self._lock:
            self.sent_bytes += count
            if self._flip is not None:
                left, bit = self._flip
                self._flip = (left - count, bit)
                if left < count:
                    buffer[left] ^= 1 << bit
                    self._flip = None


# -- all of them -------------------------------------------------------------------------------------------------------


def _listed(errors: Counter[str]) -> str:
    return "".join(f", {number} {name}" for name, number in errors.items() if number)


def run(plan: Plan, counts: Counts | None = None) -> Report:
    """Measure."""
    counts = counts or plan.pick(Counts(), _QUICK)
    lanes = [lane for lane in LANES if _is_installed(lane.scheme)]
    stopped = [*lanes, *(lane for lane in (_NIXL_TCP,) if _is_installed(lane.scheme))]
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        plan.say(", ".join(f"{key}: {value}" for key, value in row.items() if key != "details"))

    if counts.kills:
        for lane in lanes:
            add(kills(lane, counts.kills, counts.mib, plan.say))
    for row in _flips(lanes, counts.flips, plan.say):
        add(row)
    if counts.readers:
        for lane in lanes:
            add(readers(lane, counts.readers, counts.mib, plan.say))
    if counts.stops:
        for lane in stopped:
            add(stops(lane, counts.stops, counts.mib, plan.say))
    return Report(
        "peer_faults",
        f"a model of {counts.mib} MiB in host memory of another process, over loopback; flipped bits: a model of "
        f"{sum(_ODD_SIZES) >> 20} MiB in tensors of odd sizes; every load is compared byte by byte",
        rows,
        _targets(rows),
        (),
        1,
        plan.quick,
    )


def _flips(lanes: Sequence[Lane], count: int, say: _Say) -> Iterator[dict[str, Any]]:
    """Flip ``count`` bits in all, in memory and on the wire."""
    wires = [lane for lane in (GRPC, FRAMES) if lane in lanes]
    of_each = -(-count // max(1, len(lanes) + len(wires)))
    if count:
        yield from (flips_in_memory(lane, of_each, say) for lane in lanes)
        yield from (flips_on_the_wire(lane, of_each, say) for lane in wires)


def _targets(rows: Sequence[Mapping[str, Any]]) -> Sequence[Target]:
    targets = []
    for row in rows:
        name = f"{row['fault']}, {row['over']}"
        if row["fault"] == "source killed":
            targets.append(Target(f"{name}: loads that are right", row["right"] / row["count"], 1.0))
            targets.append(Target(f"{name}: median delay", row["median s"], 3.0, at_most=True, unit="s"))
        elif row["fault"] == "source stopped":
            targets.append(Target(f"{name}: loads overwritten later", float(row["wrong"]), 0.0, at_most=True))
            targets.append(Target(f"{name}: loads that are right", row["right"] / row["count"], 1.0))
        elif row["fault"] == "reader killed":
            left = row["details"]["left over"]
            for what, bound in (("leases", 0), ("descriptors", 0), ("threads", 0), ("mappings", 0), ("MiB", 16)):
                targets.append(Target(f"{name}: {what} left over", float(left[what]), float(bound), at_most=True))
            targets.append(Target(f"{name}: rate over that of before", row["details"]["rate"], 0.8))
        else:
            targets.append(Target(f"{name}: found", row["right"] / row["count"], 1.0))
            targets.append(Target(f"{name}: delivered", float(row["wrong"]), 0.0, at_most=True))
    return targets


def main() -> None:
    """Run with the counts of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_faults")
    for each in attrs.fields(Counts):
        parser.add_argument(f"--{each.name}", type=int, default=each.default)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parsed = vars(parser.parse_args())
    file = parsed.pop("json")
    console = Console(highlight=False, width=200)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        report = run(Plan(rounds=1, quick=False, scratch=Path(scratch), console=console), Counts(**parsed))
    report = attrs.evolve(report, seconds=time.monotonic() - begun)
    print_report(report, console)
    if file:
        write_json([report], file)


if __name__ == "__main__":
    main()
