"""Real vLLM that gets its weights from another worker, from the cache of a server, from S3 and from disk.

All starts keep linear weights in their parameters, as vLLM does on GPUs: its build for CPUs packs them into memory that
means nothing to another process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import vllm
from benchmarks.measuring import Plan, Report, Target, median
from benchmarks.workers import Entry, measure, started
from devtools.seaweedfs import SeaweedFS

__all__ = ["PeerStart", "run"]

_MODEL, _COMMIT = "org/model", "0123456789abcdef0123456789abcdef01234567"
_RANKS = (1, 2)

#: The sources, and the variables with which vLLM reads them. Those that are read from other workers come last.
_SOURCES: Mapping[str, Mapping[str, str]] = {
    "disk": {"MX_MODEL_URI": "{directory}"},
    "S3": {"MX_MODEL_URI": "{s3}"},
    "mx://": {"MX_MODEL_URI": "{cache}"},
    "worker over nixl": {"MX_MODEL_URI": "{s3}", "MODEL_EXPRESS_URL": "{server}"},
    "worker over grpc": {"MX_MODEL_URI": "{s3}", "MODEL_EXPRESS_URL": "{server}", "MX_DISABLED_PLUGINS": "mx-nixl"},
}
_WORKERS = [source for source in _SOURCES if source.startswith("worker")]

_LOCAL = {"MX_WORKER_HOST": "127.0.0.1", "MX_WORKER_GRPC_PORT": "0", "NIXL_LOG_LEVEL": "ERROR"}
_OFFER_SECONDS = 300.0


class PeerStart(vllm.Start):
    """Starts vLLM with the variables of one source."""

    def __init__(
        self, python: str, directory: str, options: Mapping[str, Any], environs: Mapping[str, Mapping[str, str]]
    ) -> None:
        super().__init__(python, directory, options)
        self.environs = environs

    def run(self, *, source: str) -> Mapping[str, Any]:  # type: ignore[override]
        if source == "disk":
            vllm.forget(self.directory)
        self.options = {**self.options, "load_format": "mx-target" if source in _WORKERS else "mx"}
        return self.start(str(self.directory), **self.environs[source])


def run(plan: Plan) -> Report:
    """Measure."""
    python = vllm.python_of_vllm()
    directory = vllm.generated_checkpoint(plan.scratch, quick=plan.quick)
    total = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    rows: list[dict[str, Any]] = []
    absent: list[Any] = []
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(SeaweedFS("models"))
        s3 = store.upload(directory, "models", "llama")
        server, cache = stack.enter_context(_serving(plan.scratch, directory))
        values = {"directory": str(directory), "s3": s3, "cache": cache, "server": server}
        environ = {
            **vllm.ENVIRON,
            **store.environ(),
            **_LOCAL,
            "VLLM_CACHE_ROOT": str(plan.scratch / "vllm"),
            "BENCHMARK_UNPACKED": "1",
        }
        environs = {
            source: {name: value.format(**values) for name, value in variables.items()}
            for source, variables in _SOURCES.items()
        }
        for ranks in _RANKS if not plan.quick else _RANKS[:1]:
            plan.say(f"{total / 1e9:.2f} GB, tensor parallel over {ranks}")
            parallel = {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp" if ranks > 1 else None}
            options = {"load_format": "mx", **parallel}
            arguments = {"python": python, "directory": str(directory), "options": options, "environs": environs}
            offered = {**environ, **environs["S3"], "MODEL_EXPRESS_URL": server, "MX_NIXL_OFFER": "1"}
            specifications = {"vLLM": ("benchmarks.vllm_peers:PeerStart", arguments, environ)}
            entries = [Entry(source, "vLLM", {"source": source}, "fresh") for source in _SOURCES]
            with (
                _offering(python, {**options, "load_format": "mx-source", "model": str(directory)}, offered),
                started(specifications) as (workers, not_started),
            ):
                expected = workers["vLLM"].run(digest=True, source="S3").digest
                measured, failed = measure(plan, workers, entries, str(expected))
            rows += [_row(entry, ranks, total) for entry in measured]
            absent += [*not_started, *failed]
    return Report(
        "vllm_peers",
        f"vLLM for CPUs, {total / 1e9:.2f} GB of bfloat16, linear weights unpacked; the server, the worker that is "
        "read and the reader share the CPUs; load: of the slowest rank, from the loader's first call until the weights "
        "are loaded; imports, start, rest: before the load (imports of vLLM; all until the loader's first call) and "
        "after it; peak: resident memory of the largest rank",
        rows,
        [target for source in _WORKERS for target in _targets(rows, source)],
        absent,
        plan.rounds,
        plan.quick,
    )


@contextlib.contextmanager
def _serving(scratch: Path, directory: Path) -> Iterator[tuple[str, str]]:
    """Serve the model from a cache; yield the URL of the server, and the URI of the model."""
    cache = scratch / f"cache-{directory.name}"
    command = [sys.executable, "-m", "modelexpress_core"]
    if not cache.exists():
        place = ["--revision", _COMMIT, "--cache-dir", str(cache)]
        subprocess.run([*command, "models", "import", str(directory), _MODEL, *place], check=True)
    here = ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", "--cache-dir", str(cache)]
    environ = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1"}
    with subprocess.Popen([*command, "serve", *here], env=environ, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = next(filter(None, (re.match(r"serving on (\S+),", line) for line in process.stderr)), None)
            if found is None:
                message = f"the server ended with {process.wait()}"
                raise RuntimeError(message)
            url = found[1]
            yield url, f"mx://{url.removeprefix('http://')}/{_MODEL}?revision={_COMMIT}"
        finally:
            process.kill()


@contextlib.contextmanager
def _offering(python: str, options: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[None]:
    """Run a worker that offers its weights during the ``with`` block."""
    process = subprocess.Popen(
        [python, "-m", "benchmarks.vllm_run", json.dumps({"options": options, "download": [], "stay": True})],
        cwd=vllm.ROOT,
        env={**os.environ, **environ, "BENCHMARK_RESULTS": os.devnull},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            lines: list[str] = []
            begun = time.monotonic()
            offered = 0
            for line in process.stdout:
                lines.append(line)
                offered += "ModelExpress offers the weights" in line
                if offered == options["tensor_parallel_size"]:
                    break
                if time.monotonic() - begun > _OFFER_SECONDS:
                    break
            if offered < options["tensor_parallel_size"]:
                message = f"no worker offered the model: {''.join(lines)[-600:]}"
                raise RuntimeError(message)
            # The rest is read and dropped, so that the worker never waits for a reader.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield
        finally:
            process.kill()


def _row(entry: Entry, ranks: int, total: int) -> dict[str, Any]:
    def figure(name: str) -> float:
        return median([measurement.details[name] for measurement in entry.measurements])

    def of_ranks(name: str) -> float:
        return median([max(rank[name] for rank in each.details["ranks"]) for each in entry.measurements])

    load, ready, imports, begun = (figure(f"{name}_seconds") for name in ("load", "ready", "imported", "begun"))
    return {
        "ranks": ranks,
        "source": entry.setting["source"],
        "load s": load,
        "GB/s": total / load / 1e9,
        "ready s": ready,
        "imports s": imports,
        "start s": begun - imports,
        "rest s": ready - begun - load,
        "peak MiB": of_ranks("peak_bytes") / (1 << 20),
        "samples": [dict(measurement.details) for measurement in entry.measurements],
    }


def _targets(rows: Sequence[Mapping[str, Any]], source: str) -> list[Target]:
    """Return the targets for one way from a worker, each for the number of ranks with the worst ratio."""
    ratios = []
    for ranks in _RANKS:
        of = {row["source"]: row["load s"] for row in rows if row["ranks"] == ranks}
        if source in of and "S3" in of:
            ratios.append(of["S3"] / of[source])
    return [Target(f"{source}: how many times as fast as from S3", min(ratios, default=None), 2.0)]
