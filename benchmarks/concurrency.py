"""Self-tuned concurrency compared with the best fixed setting, for several latencies and bandwidths."""

from __future__ import annotations

import contextlib
import time

import numpy as np

from benchmarks.measuring import Plan, Report, Target, median
from benchmarks.range_server import PATTERN_BYTES, RangeServer, RangeStorage, pattern
from modelexpress_core.checkpoint import CheckpointFile
from modelexpress_core.fetch import FetchEngine, Range, Segment, Ticket
from modelexpress_core.fetch.concurrency import FixedConcurrency
from modelexpress_core.settings import LoadSettings, from_env
from mx_s3 import plugin as s3_plugin

__all__ = ["run"]

_LATENCIES_MS = (1, 20, 100)
_CAPS_MB = (50, 200, None)
_FIXED = (1, 2, 4, 8, 16, 32, 64, 128)

#: Duration of a load.
_SECONDS = 3.0
#: Number of fixed settings in the rounds: the best of a first run of all.
_FINALISTS = 4
#: Number of separate destinations; later reads use them again.
_SLOTS = 128


class _Rig:
    """One network, and loads of a number of bytes over it."""

    def __init__(self, server: RangeServer, slots: int) -> None:
        self._server = server
        self._memory = memoryview(np.full(slots * PATTERN_BYTES, 0xAA, np.uint8))
        self._slots = slots

    def load(self, reads: int, fixed: int | None) -> tuple[float, int]:
        """Make ``reads`` reads, ``fixed`` at once (None: self-tuned); return seconds and most reads at once."""
        size = reads * PATTERN_BYTES
        (record,) = s3_plugin.mx_register_storages()
        file = CheckpointFile("file", "file", size, None, 0)
        ranges = []
        for number in range(reads):
            there = number % self._slots * PATTERN_BYTES
            memory = self._memory[there : there + PATTERN_BYTES]
            segment = Segment(number * PATTERN_BYTES, PATTERN_BYTES, Ticket(), memory=memory)
            ranges.append([Range(file, segment.offset, segment.length, (segment,))])
        begun = time.perf_counter()
        with contextlib.closing(RangeStorage(self._server.port, size)) as storage:
            engine = FetchEngine(
                storage,
                from_env(LoadSettings, {}),
                record.capabilities,
                limit=None if fixed is None else FixedConcurrency(fixed),
            )
            engine.submit(ranges)
            engine.finish()
            seconds = time.perf_counter() - begun
        return seconds, engine.ledger.most_in_flight

    def check(self, reads: int) -> None:
        """Check that the destinations of the last ``reads`` hold the bytes of the server."""
        expected = np.frombuffer(pattern(), np.uint8)
        for number in range(min(reads, self._slots)):
            there = number * PATTERN_BYTES
            assert np.array_equal(expected, np.frombuffer(self._memory[there : there + PATTERN_BYTES], np.uint8))


def run(plan: Plan) -> Report:
    """Measure."""
    rows = []
    for latency in plan.pick(_LATENCIES_MS, (1,)):
        for cap in plan.pick(_CAPS_MB, (200, None)):
            with RangeServer(latency / 1e3, None if cap is None else cap * 1e6) as server:
                rows.append(_row(plan, server, latency, cap))
    worst = min(row["of best"] for row in rows)
    return Report(
        "concurrency",
        "8 MiB reads into touched memory, over loopback, from a server in a separate process that sends the first "
        "byte of an answer after the latency, and whose connections share the bandwidth; self-tuned with the "
        "capabilities of mx-s3; fixed settings: the best of all powers of 2 up to 128",
        rows,
        [Target("self-tuned goodput over the best fixed setting's, on the worst network", worst, 0.95)],
        (),
        plan.rounds,
        plan.quick,
    )


def _row(plan: Plan, server: RangeServer, latency: int, cap: int | None) -> dict[str, object]:
    name = f"{latency} ms, {'no cap' if cap is None else f'{cap} MB/s'}"
    plan.say(f"{name}: every fixed setting once")
    rig = _Rig(server, plan.pick(_SLOTS, 4))
    fixed = plan.pick(_FIXED, (1, 4))
    reads = _reads(rig, cap, plan)
    first = {count: rig.load(max(1, reads // 2), count)[0] for count in fixed}
    rig.check(max(1, reads // 2))
    finalists = sorted(fixed, key=lambda count: first[count])[:_FINALISTS]
    samples: dict[int | None, list[float]] = {count: [] for count in (None, *sorted(finalists))}
    most = []
    for number in range(plan.rounds):
        plan.say(f"{name}: round {number + 1} of {plan.rounds}, fixed {sorted(finalists)} and self-tuned")
        order = list(samples)
        for count in order[number % len(order) :] + order[: number % len(order)]:
            seconds, in_flight = rig.load(reads, count)
            samples[count].append(seconds)
            if count is None:
                most.append(in_flight)
    best = min(finalists, key=lambda count: median(samples[count]))
    tuned = median(samples[None])
    total = reads * PATTERN_BYTES
    return {
        "latency ms": latency,
        "cap MB/s": cap,
        "destination": "touched",
        "MB": round(total / 1e6),
        "best fixed": best,
        "best MB/s": round(total / median(samples[best]) / 1e6),
        "tuned MB/s": round(total / tuned / 1e6),
        "most reads": max(most),
        "of best": round(median(samples[best]) / tuned, 3),
        "samples": {"tuned" if count is None else str(count): values for count, values in samples.items()},
        "details": {"first run MB/s": {str(n): round(total / 2 / s / 1e6) for n, s in first.items()}},
    }


def _reads(rig: _Rig, cap: int | None, plan: Plan) -> int:
    """Return the number of reads that take about ``_SECONDS``."""
    if plan.quick:
        return 8
    rate = cap * 1e6 if cap is not None else 64 * PATTERN_BYTES / min(rig.load(64, count)[0] for count in (8, 32))
    return max(8, round(rate * _SECONDS / PATTERN_BYTES))
