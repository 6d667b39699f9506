"""The cost of recording, and whether fetching hides it: a mixture of experts with 100,000 tensors, for TP 8."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import modelexpress_core as mx
from benchmarks.measuring import Plan, Report, Target, median
from benchmarks.range_server import Bandwidth
from modelexpress_core.fetch import FetchEngine, Range
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from modelexpress_core.settings import LoadSettings
from modelexpress_core.storage.file import FileStorage

__all__ = ["run"]

_RANKS = 8
_RANK = 3
_HIDDEN = 128
_INNER = 256
_SHARDS = 4
_DTYPE = torch.bfloat16

#: Bandwidth that a real network's socket buffers would hold, in seconds.
_BURST_SECONDS = 0.03

_CAPABILITIES = StorageCapabilities(read_runs=True, concurrency=8, most_concurrency=32, request_cost_bytes=128)


def _shapes(layers: int, experts: int) -> dict[str, tuple[int, int]]:
    shapes = {}
    for layer in range(layers):
        start = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{start}.self_attn.{name}.weight"] = (_HIDDEN, _HIDDEN)
        for expert in range(experts):
            for name, shape in (("gate", (_INNER, _HIDDEN)), ("up", (_INNER, _HIDDEN)), ("down", (_HIDDEN, _INNER))):
                shapes[f"{start}.mlp.experts.{expert}.{name}_proj.weight"] = shape
    return shapes


def _write(directory: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Write sparse files: they have the full length, but use no disk space."""
    directory.mkdir(parents=True)
    names = list(shapes)
    for shard in range(_SHARDS):
        header, position = {}, 0
        for name in names[shard * len(names) // _SHARDS : (shard + 1) * len(names) // _SHARDS]:
            rows, columns = shapes[name]
            length = rows * columns * _DTYPE.itemsize
            header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [position, position + length]}
            position += length
        text = json.dumps(header).encode()
        with (directory / f"model-{shard + 1:05}-of-{_SHARDS:05}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + position)


class _Model:
    """Parameters of one rank in an engine with fused experts, and the destination of each tensor."""

    def __init__(self, layers: int, experts: int) -> None:
        inner = _INNER // _RANKS
        self.tensors: dict[str, torch.Tensor] = {}
        self._goes: dict[str, Callable[[torch.Tensor], object]] = {}
        for layer in range(layers):
            start = f"model.layers.{layer}"
            w13 = self._parameter(f"{start}.w13", experts, 2 * inner, _HIDDEN)
            w2 = self._parameter(f"{start}.w2", experts, _HIDDEN, inner)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                part = self._parameter(f"{start}.{name}", _HIDDEN // _RANKS, _HIDDEN)
                self._goes[f"{start}.self_attn.{name}.weight"] = _rows_of(part)
            for expert in range(experts):
                prefix = f"{start}.mlp.experts.{expert}"
                self._goes[f"{prefix}.gate_proj.weight"] = _half_of(w13, expert, 0)
                self._goes[f"{prefix}.up_proj.weight"] = _half_of(w13, expert, 1)
                self._goes[f"{prefix}.down_proj.weight"] = _columns_of(w2, expert)

    def _parameter(self, name: str, *shape: int) -> torch.Tensor:
        self.tensors[name] = torch.full(shape, 1.0, dtype=_DTYPE)
        return self.tensors[name]

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        with torch.no_grad():
            for name, tensor in weights:
                self._goes[name](tensor)


def _rows_of(part: torch.Tensor) -> Callable[[torch.Tensor], object]:
    rows = part.shape[0]
    return lambda weight: part.copy_(weight.narrow(0, _RANK * rows, rows))


def _half_of(w13: torch.Tensor, expert: int, half: int) -> Callable[[torch.Tensor], object]:
    rows = w13.shape[1] // 2

    def load(weight: torch.Tensor) -> object:
        return w13.data[expert].narrow(0, half * rows, rows).copy_(weight.narrow(0, _RANK * rows, rows))

    return load


def _columns_of(w2: torch.Tensor, expert: int) -> Callable[[torch.Tensor], object]:
    columns = w2.shape[2]
    return lambda weight: w2.data[expert].copy_(weight.narrow(1, _RANK * columns, columns))


class _Capped(FileStorage):
    """Files with a bandwidth limit for all reads together."""

    def __init__(self, bandwidth: Bandwidth) -> None:
        super().__init__()
        self._bandwidth = bandwidth

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        self._bandwidth.take(len(buffer))
        return super().read_into(path, offset, buffer, version=version)

    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        self._bandwidth.take(len(buffer))
        return super().read_runs(path, offset, run_bytes, stride_bytes, buffer, version=version)


class _Plugin:
    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second

    @mx.hookimpl
    def mx_register_storages(self) -> list[StorageProvider]:
        return [
            StorageProvider(
                "capped",
                ("capped",),
                lambda _uri, _settings: _Capped(Bandwidth(self._rate, _BURST_SECONDS)),
                capabilities=_CAPABILITIES,
            )
        ]


def run(plan: Plan) -> Report:
    """Measure."""
    layers, experts = plan.pick((80, 416), (2, 16))
    shapes = _shapes(layers, experts)
    directory = plan.scratch / f"experts-{len(shapes)}"
    if not directory.exists():
        _write(directory, shapes)
    model = _Model(layers, experts)
    needed = sum(tensor.nbytes for tensor in model.tensors.values())
    rate = needed / plan.pick(12.0, 0.5)
    plugins = mx.PluginManager.discover({})
    plugins.register(_Plugin(rate), name="capped")
    opening, thread, wall, loads, fetches = [], [], [], [], []
    batches: list[Sequence[Sequence[Range]]] = []
    for number in range(plan.rounds):
        plan.say(f"round {number + 1} of {plan.rounds}")
        batches = []
        begun = time.perf_counter()
        with (
            _submissions(batches),
            mx.deferred_weights(f"capped://{directory}", model=model.tensors, plugins=plugins, environ={}) as weights,
        ):
            entered, thread_entered = time.perf_counter(), time.thread_time()
            model.load_weights(iter(weights))
            thread.append(time.thread_time() - thread_entered)
            wall.append(time.perf_counter() - entered)
        loads.append(time.perf_counter() - entered)
        opening.append(entered - begun)
        fetches.append(_fetch_alone(batches, rate))
    count = len(shapes)
    figures = {
        "recording, CPU": median(thread) / count * 1e6,
        "recording, wall": median(wall) / count * 1e6,
    }
    return Report(
        "recording",
        f"{count} tensors in {_SHARDS} files, {needed / 1e6:.0f} MB of them for one rank of {_RANKS}, sliced and "
        f"copied into fused experts; page cache, capped at {rate / 1e6:.0f} MB/s for all together; touched memory",
        [
            *({"what": name, "us a tensor": value, "seconds": value * count / 1e6} for name, value in figures.items()),
            {
                "what": "opening: headers of all files",
                "us a tensor": median(opening) / count * 1e6,
                "seconds": median(opening),
            },
            {
                "what": "load, opening not included",
                "us a tensor": median(loads) / count * 1e6,
                "seconds": median(loads),
            },
            {
                "what": "the same reads, fetched alone",
                "us a tensor": median(fetches) / count * 1e6,
                "seconds": median(fetches),
            },
        ],
        [
            Target(
                "recording: CPU time of the thread that records",
                figures["recording, CPU"],
                60.0,
                at_most=True,
                unit="us",
            ),
            Target("load over the fetch alone", median(loads) / median(fetches), 1.1, at_most=True),
        ],
        (),
        plan.rounds,
        plan.quick,
    )


@contextlib.contextmanager
def _submissions(batches: list[Sequence[Sequence[Range]]]) -> Iterator[None]:
    """Store all submissions to engines in the block in ``batches``."""
    submit = FetchEngine.submit

    def kept(self: FetchEngine, given: Sequence[Sequence[Range]], **options: Any) -> None:  # noqa: ANN401 - passed on
        batches.append(given)
        submit(self, given, **options)

    FetchEngine.submit = kept  # type: ignore[method-assign]
    try:
        yield
    finally:
        FetchEngine.submit = submit  # type: ignore[method-assign]


def _fetch_alone(batches: Sequence[Sequence[Sequence[Range]]], rate: float) -> float:
    """Return the seconds that the same reads take if all are known from the start."""
    with contextlib.closing(_Capped(Bandwidth(rate, _BURST_SECONDS))) as storage:
        engine = FetchEngine(storage, LoadSettings(), _CAPABILITIES)
        begun = time.perf_counter()
        for given in batches:
            engine.submit(given)
        engine.finish()
        return time.perf_counter() - begun
