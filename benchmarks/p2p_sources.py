"""Loads from one and from four workers, each behind a link with a rate of its own."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen

from benchmarks.capped_links import CappedLinks, capped_links
from benchmarks.checkpoints import digest_of
from benchmarks.measuring import Absent, Plan, Report, Target
from benchmarks.peer_source import tensors_of
from benchmarks.workers import Entry, Worker, WorkerError
from devtools.missing import ToolMissingError

__all__ = ["run"]

_SOURCES = 4
_SLOW_SHARE = 0.1


@frozen
class _Case:
    """One row.

    Attributes:
        name: Its name.
        sources: How many workers are read.
        slow: Whether the last link has a tenth of the rate.
        target: How many times as fast as one worker it should be.
    """

    name: str
    sources: int
    slow: bool = False
    target: float = 0.0


_ONE = _Case("one source", 1)
_CASES = (
    _ONE,
    _Case("four sources", _SOURCES, target=3.6),
    _Case("four sources, one of them at a tenth of the rate", _SOURCES, slow=True, target=2.8),
)


def run(plan: Plan) -> Report:
    """Measure."""
    mib = plan.pick(512, 24)
    rate = plan.pick(40e6, 80e6)
    plan.say(f"starting {_SOURCES} workers with {mib} MiB ...")
    entries = {case: Entry(case.name, "reader", {"sources": case.sources}, "touched") for case in _CASES}
    absent: list[Absent] = []
    try:
        with capped_links(_SOURCES) as links, _workers(links, mib) as uris:
            _measure(plan, links, rate, {"mib": mib, "uris": uris}, entries)
    except (ToolMissingError, WorkerError) as exc:
        absent.append(Absent("all", str(exc)))
    total = mib << 20
    measured = {case: entry for case, entry in entries.items() if entry.measurements}
    one = measured.get(_ONE)
    return Report(
        "p2p_sources",
        f"{total / 1e9:.2f} GB in the memory of workers in network namespaces, each behind a link of "
        f"{rate / 1e6:.0f} MB/s, over gRPC, digests verified; connecting and comparing count; limit: one link",
        [entry.row(total, total / rate) for entry in measured.values()],
        [
            Target(
                f"{case.name}: times as fast as one",
                one.seconds / measured[case].seconds if one is not None and case in measured else None,
                case.target,
            )
            for case in _CASES
            if case.target
        ],
        absent,
        plan.rounds,
        plan.quick,
    )


def _measure(
    plan: Plan, links: CappedLinks, rate: float, arguments: Mapping[str, Any], entries: Mapping[_Case, Entry]
) -> None:
    expected = digest_of(tensors_of(arguments["mib"], seed=1))
    for number in range(_SOURCES):
        links.set_rate(number, rate)
    with contextlib.closing(Worker("benchmarks.peer_contenders:PeersInto", arguments, before=links.reader)) as reader:
        for number in range(plan.rounds + 1):
            plan.say(f"  round {number} of {plan.rounds}" + (" (not counted)" if not number else ""))
            for case, entry in random.Random(number).sample(list(entries.items()), len(entries)):
                links.set_rate(_SOURCES - 1, rate * _SLOW_SHARE if case.slow else rate)
                measurement = reader.run(digest=not number, **entry.setting)
                if number:
                    entry.measurements.append(measurement)
                elif measurement.digest != expected:
                    message = f"it loaded wrong bytes: digest {measurement.digest}, not {expected}"
                    raise WorkerError(message)


@contextlib.contextmanager
def _workers(links: CappedLinks, mib: int) -> Iterator[Sequence[str]]:
    """Their URIs."""
    with contextlib.ExitStack() as running:
        started = []
        for before, address in zip(links.sources, links.addresses, strict=True):
            command = [*before, sys.executable, "-m", "benchmarks.peer_source", str(mib), address]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            running.enter_context(process)
            running.callback(process.kill)
            started.append(process)
        uris = []
        for process in started:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                message = "a worker has not started"
                raise WorkerError(message)
            uris.append(f"grpc://{json.loads(line)['worker']}")
        yield uris
