"""Who is compared on a store, at which concurrency, and the report on it: the same for every store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from benchmarks.checkpoints import digest_of_directory, sections
from benchmarks.measuring import Plan, Report, Target
from benchmarks.stores import RUNAI, fastest, load_targets
from benchmarks.workers import Entry, measure, started

__all__ = ["Comparison", "Specification"]

#: Contender (``module:class``), arguments of its constructor, variables of its process.
Specification = tuple[str, Mapping[str, Any], Mapping[str, str]]

_CONTENDERS = "benchmarks.contenders"


@frozen
class Comparison:
    """What is compared on one store.

    Attributes:
        name: Of the benchmark.
        about: Size of the checkpoint, digests and server, for the report; the limit is added.
        directory: The checkpoint, which was uploaded.
        uri: Where to.
        environ: Variables for access to the store.
        connections: Numbers of connections of raw clients.
        raw: Raw clients by name: contender and arguments.
        others: Further specifications, and the entries that run them.
        runai: Variables of runai-model-streamer for the store; None where it is not compared.
        times_runai: How many times as fast as runai-model-streamer our loads are to be.
        digests: The store publishes digests, so that loads are measured with and without comparing them.
    """

    name: str
    about: str
    directory: Path
    uri: str
    environ: Mapping[str, str]
    connections: Sequence[int]
    raw: Mapping[str, tuple[str, Mapping[str, Any]]]
    others: Sequence[tuple[Specification, Entry]] = ()
    runai: Mapping[str, str] | None = None
    times_runai: float = 1.3
    digests: bool = True

    def report(self, plan: Plan) -> Report:
        """Measure, while the server of the store runs."""
        total = sum(section.length for section in sections(self.directory))
        plan.say(f"{total / 1e9:.2f} GB from {self.uri}")
        specifications = self._specifications(plan)
        with started(specifications) as (workers, not_started):
            entries = self._entries(specifications)
            measured, failed = measure(plan, workers, entries, digest_of_directory(self.directory))
        limit = fastest(measured, self.raw)
        *first, last = self.raw
        return Report(
            self.name,
            f"{total / 1e9:.2f} GB {self.about}; limit: the fastest of {', '.join(first)} and {last}",
            [entry.row(total, limit) for entry in measured],
            self._targets(limit, measured),
            [*not_started, *failed],
            plan.rounds,
            plan.quick,
        )

    def _specifications(self, plan: Plan) -> dict[str, Specification]:
        directory = {"directory": str(self.directory)}
        with_uri = {**directory, "uri": self.uri}
        into, state = f"{_CONTENDERS}:ModelExpressInto", f"{_CONTENDERS}:ModelExpressState"
        found: dict[str, Specification] = {"into": (into, with_uri, self.environ)}
        if self.digests:
            found["into unverified"] = (into, with_uri, {**self.environ, "MX_VERIFY_DIGESTS": "0"})
        found["state"] = (state, with_uri, self.environ)
        found.update({entry.worker: specification for specification, entry in self.others})
        for name, (contender, arguments) in self.raw.items():
            found[name] = (contender, {**directory, **arguments}, self.environ)
        if self.runai is not None:
            paths = [f"{self.uri}/{section.name}" for section in sections(self.directory)]
            for count in plan.pick((4, 8, 16, 32), (4,)):
                environ = {**self.environ, **self.runai, "RUNAI_STREAMER_CONCURRENCY": str(count)}
                arguments = {**directory, "paths": paths}
                found[f"{RUNAI} {count}"] = (f"{_CONTENDERS}:RunaiStreamer", arguments, environ)
        return found

    def _entries(self, specifications: Mapping[str, Specification]) -> list[Entry]:
        if self.digests:
            ours = [
                Entry("modelexpress load_into, digests verified", "into", {}, "touched"),
                Entry("modelexpress load_into, not verified", "into unverified", {}, "touched"),
                Entry("modelexpress load_state_dict, verified", "state", {}, "fresh"),
            ]
        else:
            ours = [
                Entry("modelexpress load_into", "into", {}, "touched"),
                Entry("modelexpress load_state_dict", "state", {}, "fresh"),
            ]
        return [
            *ours,
            *(entry for _, entry in self.others),
            *(Entry(name, name, {"connections": count}, "touched") for name in self.raw for count in self.connections),
            *(Entry(name, name, {}, "fresh") for name in specifications if name.startswith(RUNAI)),
        ]

    def _targets(self, limit: float | None, measured: Sequence[Entry]) -> list[Target]:
        if self.digests:
            return load_targets(limit, measured, times_runai=self.times_runai)
        into = next((entry.seconds for entry in measured if entry.worker == "into"), None)
        ratio = limit / into if limit is not None and into is not None else None
        return [Target("load_into touched memory: goodput over the best raw client's", ratio, 0.9)]
