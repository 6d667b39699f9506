"""Real vLLM with several load formats: time to load and until ready, bytes read, and memory.

Each start is a separate process in vLLM's environment that runs ``benchmarks.vllm_run``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.contenders import Contender
from benchmarks.measuring import Absent, Plan, Report, Target, median
from benchmarks.workers import Entry, measure, started
from devtools.seaweedfs import SeaweedFS
from devtools.tcp_proxy import TcpProxy

__all__ = ["ENVIRON", "ROOT", "Start", "forget", "generated_checkpoint", "python_of_vllm", "run"]

ROOT = Path(__file__).resolve().parents[1]
_BUCKET, _PREFIX = "models", "llama"
_SOURCES = ("page cache", "disk", "S3")
_RANKS = (1, 2)
_SHARDS = 5
_START_SECONDS = 900
_MIB = 1 << 20
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - not for files of ours

ENVIRON = {
    "HF_HUB_OFFLINE": "1",
    "MX_FALLBACK": "0",
    # By default one second without data ends a request, and a few such requests end the load: too short on shared CPUs.
    "RUNAI_STREAMER_S3_REQUEST_TIMEOUT_MS": "30000",
    "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "modelexpress",
}


def run(plan: Plan) -> Report:
    """Measure."""
    python = python_of_vllm()
    directory = generated_checkpoint(plan.scratch, quick=plan.quick)
    total = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    rows: list[dict[str, Any]] = []
    absent: list[Absent] = []
    plan.say("starting SeaweedFS and uploading ...")
    with SeaweedFS(_BUCKET) as server:
        server.upload(directory, _BUCKET, _PREFIX, checksum="CRC64NVME")
        os.sync()  # so that the disk is idle during the measurements
        environ = {**ENVIRON, **server.environ(), "VLLM_CACHEROOT": str(plan.scratch / "vllm")}
        for ranks in _RANKS:
            plan.say(f"{total / 1e9:.2f} GB, tensor parallel over {ranks}")
            contenders = _contenders(ranks)
            specifications = {
                name: (
                    "benchmarks.vllm:Start",
                    {"python": python, "directory": str(directory), "options": options},
                    {**environ, **more},
                )
                for name, (options, more) in contenders.items()
            }
            entries = [Entry(name, name, {"source": source}, "fresh") for name in contenders for source in _SOURCES]
            with started(specifications) as (workers, not_started):
                expected = workers["auto"].run(digest=True, source="page cache").digest
                measured, failed = measure(plan, workers, entries, str(expected))
            rows += _rows(measured, ranks, total)
            absent += [*not_started, *failed]
    return Report(
        "vllm",
        f"vLLM {rows[0]['details']['version']} for CPUs, {total / 1e9:.2f} GB of bfloat16 in {_SHARDS} files; load: of "
        "the slowest rank, from the loader's first call until the weights are loaded, before vLLM packs them for its "
        "kernels, and boto3's download for auto from S3; ready: from the start of the process; read: from the disk "
        "(read_bytes of proc(5), all ranks), or from S3 (by a proxy, in the round that is not counted); peak: resident "
        "memory of the largest rank in that time, mapped files included; rise: above what it had before",
        rows,
        [target for source in _SOURCES for target in _targets(rows, source)],
        absent,
        plan.rounds,
        plan.quick,
    )


def python_of_vllm() -> str:
    """Return the interpreter of vLLM's environment."""
    environment = ROOT / os.environ.get("VLLM_VENV", ".venv-vllm")
    python = environment / "bin" / "python"
    if not python.exists():
        message = (
            f"there is no environment with vLLM in {environment}: create it with `make bench-vllm`, "
            "or set VLLM_VENV to another"
        )
        raise SystemExit(message)
    return str(python)


def _contenders(ranks: int) -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """Return vLLM's options and the environment variables for each contender."""
    parallel = {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp" if ranks > 1 else None}
    contenders: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        load_format: ({"load_format": load_format, **parallel}, {}) for load_format in ("mx", "auto", "runai_streamer")
    }
    if ranks > 1:
        options = {"load_format": "runai_streamer", "model_loader_extra_config": {"distributed": True}, **parallel}
        # Without it, the library does not distribute over gloo, the only backend on CPUs.
        contenders["runai_streamer, distributed"] = options, {"RUNAI_STREAMER_DIST": "1"}
    return contenders


# -- the checkpoint ---------------------------------------------------------------------------------------------------


def generated_checkpoint(scratch: Path, *, quick: bool) -> Path:
    """Return the directory of a Llama of 2.2 GB (10 MB in quick mode) with random weights; create it if missing."""
    directory = scratch / ("llama-small" if quick else "llama")
    if not directory.exists():
        incomplete = scratch / f"{directory.name}.incomplete"
        incomplete.mkdir(parents=True, exist_ok=True)
        if quick:
            _write(incomplete, layers=4, hidden=256, inner=1024, vocabulary=4096)
        else:
            _write(incomplete, layers=16, hidden=2048, inner=8192, vocabulary=32768)
        incomplete.rename(directory)
    return directory


def _write(directory: Path, *, layers: int, hidden: int, inner: int, vocabulary: int) -> None:
    import torch
    from safetensors.torch import save_file

    head = 64
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // head,
        "num_key_value_heads": hidden // head // 2,
        "max_position_embeddings": 128,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    few = head * int(str(config["num_key_value_heads"]))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}.self_attn.k_proj.weight"] = (few, hidden)
        shapes[f"{prefix}.self_attn.v_proj.weight"] = (few, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    generator = torch.Generator().manual_seed(21)
    names = list(shapes)
    weight_map = {}
    for shard in range(_SHARDS):
        file = f"model-{shard + 1:05}-of-{_SHARDS:05}.safetensors"
        part = names[shard * len(names) // _SHARDS : (shard + 1) * len(names) // _SHARDS]
        state = {
            name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.05, generator=generator) for name in part
        }
        save_file(state, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _warm_up(directory: Path) -> None:
    """Read all weights into the page cache."""
    buffer = bytearray(_MIB)
    for file in directory.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def forget(directory: Path) -> None:
    """Drop all weights from the page cache."""
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -- one start --------------------------------------------------------------------------------------------------------


class Start(Contender):
    """Starts vLLM, and generates a few tokens.

    Args:
        python: The interpreter of vLLM's environment.
        directory: Directory of the checkpoint.
        options: Options of vLLM's constructor; the model is set for each source.
    """

    def __init__(self, python: str, directory: str, options: Mapping[str, Any]) -> None:
        self.python = python
        self.directory = Path(directory)
        self.options = options
        self.from_s3_bytes: int | None = None
        self.tokens: Sequence[Any] = ()

    def run(self, *, source: str) -> Mapping[str, Any]:  # type: ignore[override]
        if source != "S3":
            (_warm_up if source == "page cache" else forget)(self.directory)
            figures = self.start(str(self.directory))
            return {**figures, "read_bytes": sum(rank["read_bytes"] for rank in figures["ranks"])}
        if self.from_s3_bytes is not None:
            return {**self._start_from_s3(), "read_bytes": self.from_s3_bytes}
        server = urlsplit(os.environ["AWS_ENDPOINT_URL"])
        with TcpProxy(str(server.hostname), int(server.port or 0)) as proxy:
            figures = self._start_from_s3(AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.port}")
            self.from_s3_bytes = proxy.sent_bytes
        return {**figures, "read_bytes": self.from_s3_bytes}

    def digest(self) -> str:
        return f"{zlib.crc32(json.dumps(self.tokens).encode()):08x}"

    def release(self) -> None:
        """Do nothing: the process has ended."""

    def _start_from_s3(self, **environ: str) -> Mapping[str, Any]:
        uri = f"s3://{_BUCKET}/{_PREFIX}"
        if self.options["load_format"] == "runai_streamer":
            return self.start(uri, **environ)
        with tempfile.TemporaryDirectory(dir=self.directory.parent) as local:
            if self.options["load_format"] == "auto":
                return self.start(local, download=(_BUCKET, _PREFIX, local), **environ)
            shutil.copy(self.directory / "config.json", local)
            return self.start(local, MX_MODEL_URI=uri, **environ)

    def start(self, model: str, *, download: Sequence[str] = (), **environ: str) -> Mapping[str, Any]:
        request = json.dumps({"options": {**self.options, "model": model}, "download": download})
        with tempfile.TemporaryDirectory() as temporary, _shared_memory_removed():
            results = Path(temporary, "results")
            begun = time.monotonic()
            done = subprocess.run(
                [self.python, "-m", "benchmarks.vllm_run", request],
                cwd=ROOT,
                env={**os.environ, **environ, "BENCHMARK_RESULTS": str(results)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=_START_SECONDS,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(_reason(done.stdout))
            *ranks, whole = (json.loads(line) for line in results.read_text().splitlines())
        assert len(ranks) == self.options["tensor_parallel_size"], ranks
        self.tokens = whole["tokens"]
        return {
            "version": whole["version"],
            "load_seconds": whole["download_seconds"] + max(rank["seconds"] for rank in ranks),
            "download_seconds": whole["download_seconds"],
            # The monotonic clock is the same in all processes.
            "ready_seconds": whole["ready"] - begun,
            "imported_seconds": whole["imported"] - begun,
            "begun_seconds": min(rank["begun"] for rank in ranks) - begun,
            "ranks": ranks,
        }


@contextlib.contextmanager
def _shared_memory_removed() -> Iterator[None]:
    """Remove the 16 MiB of shared memory that vLLM's ranks leave behind after each start."""
    before = set(_SHARED_MEMORY.glob("vllm_dist_*"))
    try:
        yield
    finally:
        for segment in set(_SHARED_MEMORY.glob("vllm_dist_*")) - before:
            segment.unlink(missing_ok=True)


def _reason(output: str) -> str:
    """Return the last error in the output, which is the final cause."""
    errors = re.findall(r"\w+Error: .+", output)
    return errors[-1] if errors else f"it ended with: {output[-300:]}"


# -- figures ----------------------------------------------------------------------------------------------------------


def _rows(measured: Sequence[Entry], ranks: int, total: int) -> list[dict[str, Any]]:
    def figure(entry: Entry, of: Callable[[Mapping[str, Any]], float]) -> float:
        return median([of(measurement.details) for measurement in entry.measurements])

    rows = [
        {
            "ranks": ranks,
            "source": entry.setting["source"],
            "contender": entry.contender,
            "destination": entry.destination,
            "load s": figure(entry, lambda of: of["load_seconds"]),
            "load/mx": None,
            "ready s": figure(entry, lambda of: of["ready_seconds"]),
            "ready/mx": None,
            "read/model": figure(entry, lambda of: of["read_bytes"] / total),
            "peak MiB": figure(entry, lambda of: max(rank["peak_bytes"] for rank in of["ranks"]) / _MIB),
            "peak/mx": None,
            "rise MiB": figure(
                entry,
                lambda of: max(rank["peak_bytes"] - rank["before_bytes"] for rank in of["ranks"]) / _MIB,
            ),
            "all peaks MiB": figure(entry, lambda of: sum(rank["peak_bytes"] for rank in of["ranks"]) / _MIB),
            "samples": [dict(measurement.details) for measurement in entry.measurements],
            "details": {"version": entry.measurements[0].details["version"]},
        }
        for entry in sorted(measured, key=lambda entry: _SOURCES.index(entry.setting["source"]))
    ]
    ours = {row["source"]: row for row in rows if row["contender"] == "mx"}
    for row in rows:
        if row["source"] in ours:
            for name, unit in (("load", "s"), ("ready", "s"), ("peak", "MiB")):
                row[f"{name}/mx"] = row[f"{name} {unit}"] / ours[row["source"]][f"{name} {unit}"]
    return rows


def _targets(rows: Sequence[Mapping[str, Any]], source: str) -> list[Target]:
    """Return the targets for one source, each for the number of ranks with the worst ratio."""

    def over_least_other(column: str) -> list[float]:
        ratios = []
        for ranks in _RANKS:
            of = {row["contender"]: row[column] for row in rows if (row["ranks"], row["source"]) == (ranks, source)}
            ours, others = of.pop("mx", None), of.values()
            if ours is not None and others:
                ratios.append(ours / min(others))
        return ratios

    asked = {"load s": "time until weights are loaded", "ready s": "time until ready", "peak MiB": "peak memory"}
    if source != "page cache":  # from which others read no bytes
        asked["read/model"] = "bytes read"
    return [
        Target(
            f"from {source}: mx's {what} over the least of all others', at the worst of {_RANKS} ranks",
            max(over_least_other(column), default=None),
            # A hundredth of the bytes is for the headers of more and smaller requests.
            1.01 if column == "read/model" else 1.0,
            at_most=True,
        )
        for column, what in asked.items()
    ]
