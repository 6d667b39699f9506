"""Loads from the page cache, compared with bare ``preadv`` and with other libraries."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.checkpoints import digest_of_directory, generated, sections
from benchmarks.measuring import Plan, Report, Target
from benchmarks.workers import Entry, measure, started

__all__ = ["run"]

_PREADV = "preadv"


def run(plan: Plan) -> Report:
    """Measure."""
    directory = generated(plan.scratch, quick=plan.quick)
    total = sum(section.length for section in sections(directory))
    mine = {"directory": str(directory)}
    with_uri = {**mine, "uri": directory.as_uri()}
    here = "benchmarks.contenders"
    specifications = {
        _PREADV: (f"{here}:Preadv", mine, {}),
        "into": (f"{here}:ModelExpressInto", with_uri, {}),
        "state": (f"{here}:ModelExpressState", with_uri, {}),
        "streamed": (f"{here}:ModelExpressInto", with_uri, {"MX_PREFER": "file=mx-streamer"}),
        "safetensors": (f"{here}:SafetensorsClone", mine, {}),
        "runai-model-streamer": (f"{here}:RunaiStreamer", mine, {}),
        "fastsafetensors": (f"{here}:FastSafetensors", mine, {}),
        "tensorizer": (f"{here}:Tensorizer", {**mine, "copy": str(plan.scratch / "copy.tensors")}, {}),
    }
    entries = [
        *(
            Entry("preadv", _PREADV, {"threads": threads, "mib": mib}, "touched")
            for mib in plan.pick((1, 8), (1,))
            for threads in plan.pick((1, 2, 4, 8), (1, 2))
        ),
        Entry("modelexpress load_into", "into", {}, "touched"),
        Entry("modelexpress load_state_dict", "state", {}, "fresh"),
        Entry("modelexpress with mx-streamer", "streamed", {}, "touched"),
        Entry("safetensors load_file + clone", "safetensors", {}, "fresh"),
        Entry("runai-model-streamer", "runai-model-streamer", {}, "fresh"),
        Entry("fastsafetensors", "fastsafetensors", {}, "fresh"),
        *(Entry("tensorizer", "tensorizer", {"readers": readers}, "fresh") for readers in plan.pick((1, 4), (1,))),
    ]
    plan.say(f"{total / 1e9:.2f} GB from {directory}")
    with started(specifications) as (workers, not_started):
        measured, failed = measure(plan, workers, entries, digest_of_directory(directory))
    limits = [entry.seconds for entry in measured if entry.worker == _PREADV]
    limit = min(limits) if limits else None
    by_worker = {entry.worker: entry.seconds for entry in measured if entry.worker != _PREADV}
    return Report(
        "local",
        f"{total / 1e9:.2f} GB in 4 files in the page cache; limit: the fastest preadv",
        [entry.row(total, limit) for entry in measured],
        _targets(limit, by_worker),
        [*not_started, *failed],
        plan.rounds,
        plan.quick,
    )


def _targets(limit: float | None, seconds: Mapping[str, float]) -> list[Target]:
    into, state = seconds.get("into"), seconds.get("state")

    def faster_than(name: str) -> float | None:
        return seconds[name] / state if state is not None and name in seconds else None

    return [
        Target(
            "load_into touched memory: goodput over that of the fastest preadv",
            limit / into if limit is not None and into is not None else None,
            0.9,
        ),
        *(
            Target(f"load_state_dict into fresh memory: times as fast as {name}", faster_than(name), 1.0)
            for name in ("safetensors", "runai-model-streamer", "fastsafetensors")
        ),
    ]
