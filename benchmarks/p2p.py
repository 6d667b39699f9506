"""Loads from a worker in another process, compared with plain sockets and with bare gRPC, with CPU time."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.checkpoints import digest_of
from benchmarks.measuring import Plan, Report, Target
from benchmarks.peer_source import TENSORS, tensors_of
from benchmarks.stores import fastest
from benchmarks.workers import Entry, measure, started

__all__ = ["run"]

_SOCKETS, _BARE, _RAW = "plain sockets", "bare gRPC", "raw NIXL"

#: The transport for ``grpc`` without its bulk channel.
_FRAMES = "grpc frames"


def run(plan: Plan) -> Report:
    """Measure."""
    mib = plan.pick(1024, 24)
    plan.say(f"starting a worker with {mib} MiB in {TENSORS} tensors ...")
    expected = digest_of(tensors_of(mib, seed=1))
    with _source(mib) as source:
        specifications = {
            _SOCKETS: ("benchmarks.peer_contenders:PeerSockets", {"mib": mib, "port": source["sockets"]}, {}),
            _BARE: (
                "benchmarks.peer_contenders:BareGrpc",
                {"mib": mib, "port": source[_BARE], "expected": expected},
                {},
            ),
        }
        entries = [
            *(
                Entry(_SOCKETS, _SOCKETS, {"connections": count}, "touched")
                for count in plan.pick((1, 2, 4, 8), (1, 2))
            ),
            *(Entry(_BARE, _BARE, {"streams": count}, "touched") for count in plan.pick((1, 2, 4), (1,))),
        ]
        if _RAW in source:
            specifications[_RAW] = ("benchmarks.peer_contenders:RawNixl", {"mib": mib, "source": source[_RAW]}, {})
            entries.append(Entry(_RAW, _RAW, {}, "touched"))
        ways = [(scheme, scheme, {}) for scheme in source["transports"]]
        ways += [("grpc", _FRAMES, {"MX_BULK_PORT": "0"})]
        for scheme, way, environ in ways:
            uri = f"{scheme}://{source['worker']}"
            for label, digests in (("verified", {}), ("not verified", {"MX_VERIFY_DIGESTS": "0"})):
                name = f"{way}, digests {label}"
                specifications[name] = (
                    "benchmarks.peer_contenders:PeerInto",
                    {"mib": mib, "uri": uri, "pid": source["pid"]},
                    {**environ, **digests},
                )
                entries.append(Entry(f"modelexpress {name}", name, {}, "touched"))
        with started(specifications) as (workers, not_started):
            measured, failed = measure(plan, workers, entries, expected)
    limit = fastest(measured, (_SOCKETS,))
    total = mib << 20
    return Report(
        "p2p",
        f"{total / 1e9:.2f} GB in {TENSORS} tensors in the memory of another process, over loopback, where both share "
        "the CPUs; connecting and comparing count; limit: the fastest of the plain sockets",
        [entry.row(total, limit) for entry in measured],
        _targets(limit, measured),
        [*not_started, *failed],
        plan.rounds,
        plan.quick,
    )


def _targets(limit: float | None, measured: Sequence[Entry]) -> list[Target]:
    def ratio(above: float | None, name: str) -> float | None:
        below = fastest(measured, (name,))
        return above / below if above is not None and below is not None else None

    def details(name: str) -> Mapping[str, Any]:
        return next(
            (each.measurements[-1].details for each in measured if each.contender == f"modelexpress {name}"), {}
        )

    def most_memory(name: str) -> float | None:
        found = details(name)
        return max(found["reader_mib"], found["source_mib"]) if found else None

    bare, raw = fastest(measured, (_BARE,)), fastest(measured, (_RAW,))
    return [
        Target(
            "nixl, digests verified, connecting counted: goodput over one raw READ",
            ratio(raw, "nixl, digests verified"),
            0.8,
        ),
        Target(
            "nixl, digests not verified: reads alone, goodput over one raw READ",
            raw / details("nixl, digests not verified")["phase_seconds"]["load"] if raw is not None else None,
            0.9,
        ),
        *(
            Target(
                f"{way}: memory of either side, beside the tensors",
                most_memory(f"{way}, digests verified"),
                150.0,
                at_most=True,
                unit="MiB",
            )
            for way in ("nixl", "grpc", _FRAMES)
        ),
        Target(
            "grpc, digests verified: goodput over that of plain sockets", ratio(limit, "grpc, digests verified"), 0.8
        ),
        Target(
            "grpc frames, digests verified: goodput over that of bare gRPC",
            ratio(bare, f"{_FRAMES}, digests verified"),
            0.9,
        ),
        Target(
            "grpc: time with digests over the time without",
            ratio(fastest(measured, ("grpc, digests verified",)), "grpc, digests not verified"),
            1.15,
            at_most=True,
        ),
    ]


@contextlib.contextmanager
def _source(mib: int) -> Iterator[Mapping[str, Any]]:
    """The worker; gives what it says of itself."""
    command = [sys.executable, "-m", "benchmarks.peer_source", str(mib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.kill()
