"""Random programs of views, copies, arithmetic and reads do the same to deferred tensors as to real ones."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

import modelexpress_core as mx
from modelexpress_core.hooks import hookimpl
from modelexpress_core.placement.pending_copies import CopyLimits, PendingCopies
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from modelexpress_core.storage.memory import MemoryStorage, store
from modelexpress_core.uri import ModelURI
from tests.support.properties import examples

# -- what is stored ---------------------------------------------------------------------------------------------------

#: Shapes of the stored tensors, of each dtype: scalars, odd sizes, no element at all.
_SHAPES: Sequence[tuple[int, ...]] = ((), (7,), (0, 3), (6, 4), (3, 5, 2), (8, 16))
_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.complex64,
)
#: Elements of each destination buffer.
_BUFFER = 700
#: Errors that torch raises for what cannot be done.
_REFUSALS = (RuntimeError, TypeError, IndexError, ValueError, AttributeError, BufferError)


def _values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Small values, so that arithmetic and casts between dtypes are exact."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-6, 7, shape, generator=generator)
    if dtype == torch.bool:
        return numbers > 0
    if dtype == torch.complex64:
        return torch.complex(numbers.float(), torch.randint(-6, 7, shape, generator=generator).float())
    if dtype == torch.uint8:
        return numbers.abs().to(dtype)
    return numbers.to(dtype) if dtype == torch.int64 else (numbers.float() / 2).to(dtype)


def _stored() -> dict[str, torch.Tensor]:
    return {
        f"t{number}.{index}": _values(shape, dtype, number * 31 + index)
        for number, dtype in enumerate(_DTYPES)
        for index, shape in enumerate(_SHAPES)
    }


STORED = _stored()
NAMES = tuple(STORED)


class Slow(MemoryStorage):
    """Answers late, in another order than asked, and with fewer bytes than asked for."""

    def __init__(self, name: str, *, delay_seconds: float, short: bool) -> None:
        super().__init__(name)
        self._objects = store(name)._objects
        self._delay_seconds = delay_seconds
        self._short = short
        self._random = random.Random(0)
        self._random_lock = threading.Lock()

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        with self._random_lock:
            wait, share = self._random.random() ** 4, self._random.random()
        time.sleep(wait * self._delay_seconds)
        wanted = max(1, int(len(buffer) * share)) if self._short and len(buffer) < 4096 else len(buffer)
        return super().read_into(path, offset, buffer[:wanted], version=version)


class Plugin:
    @hookimpl
    def mx_register_storages(self) -> list[StorageProvider]:
        def provider(scheme: str, request_cost_bytes: int, **options: Any) -> StorageProvider:
            def opened(uri: ModelURI, _settings: Mapping[str, str]) -> Slow:
                return Slow(uri.authority, **options)

            capabilities = StorageCapabilities(concurrency=4, request_cost_bytes=request_cost_bytes)
            return StorageProvider(scheme, (scheme,), opened, capabilities=capabilities)

        return [
            provider("late", 16, delay_seconds=0.003, short=False),
            provider("short", 0, delay_seconds=0.0, short=True),
        ]


@pytest.fixture(scope="module")
def plugins() -> mx.PluginManager:
    manager = mx.PluginManager.discover({})
    manager.register(Plugin(), name="tests")
    return manager


@pytest.fixture(scope="module")
def uris(tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """The tensors in two files; and again beside a large one, so that the smaller ones are fetched ahead."""
    halves = [{name: STORED[name] for name in NAMES[side::2]} for side in (0, 1)]
    size = sum(tensor.nbytes for tensor in STORED.values())
    ballast = {"ballast": torch.zeros(size * 25, dtype=torch.uint8)}
    found = []
    for name, extra in (("alone", {}), ("ballast", ballast)):
        directory = tmp_path_factory.mktemp(name)
        for number, tensors in enumerate((halves[0], halves[1] | extra), 1):
            content = save(tensors)
            file = f"model-{number:05d}-of-00002.safetensors"
            (directory / file).write_bytes(content)
            store(f"programs-{name}").put(file, content)
        found += [str(directory), *(f"{scheme}://programs-{name}" for scheme in ("memory", "late", "short"))]
    return found


# -- what a program is ------------------------------------------------------------------------------------------------


class Numbers:
    """The numbers of one step, used one after another."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers
        self._position = 0

    def below(self, count: int) -> int:
        """A number from 0 to ``count`` - 1."""
        number = self._numbers[self._position % len(self._numbers)] + self._position // len(self._numbers)
        self._position += 1
        return number % max(count, 1)

    def of(self, options: Sequence[Any]) -> Any:
        return options[self.below(len(options))]


def _dim(t: torch.Tensor, n: Numbers) -> int:
    return n.below(t.dim())


def _narrow(t: torch.Tensor, n: Numbers) -> torch.Tensor:
    dim = _dim(t, n)
    start = n.below(t.shape[dim] + 1)
    return t.narrow(dim, start, n.below(t.shape[dim] - start + 1))


def _step(t: torch.Tensor, n: Numbers) -> torch.Tensor:
    index: list[Any] = [slice(None)] * _dim(t, n)
    return t[(*index, slice(n.below(4), None if n.below(2) else -1, 1 + n.below(3)))]


def _as_strided(t: torch.Tensor, n: Numbers) -> torch.Tensor:
    sizes = [1 + n.below(4) for _ in range(n.below(3))]
    strides = [n.below(7) for _ in sizes]
    # Now and then out of bounds, which torch refuses.
    return t.as_strided(sizes, strides, None if n.below(3) else n.below(40))


def _reshape(t: torch.Tensor, n: Numbers) -> torch.Tensor:
    first = n.of([size for size in range(1, t.numel() + 1) if t.numel() % size == 0] or [1])
    return n.of((t.view, t.reshape))(first, t.numel() // first)


def _permute(t: torch.Tensor, n: Numbers) -> torch.Tensor:
    order = list(range(t.dim()))
    random.Random(n.below(24)).shuffle(order)
    return t.permute(order)


def _around(n: Numbers) -> int:
    """A number that may be out of bounds, on either side."""
    return n.below(12) - 5


def _dims_around(t: torch.Tensor, n: Numbers) -> torch.Tensor:
    forms: Sequence[Callable[[], torch.Tensor]] = (
        lambda: t.narrow(_around(n), _around(n), _around(n)),
        lambda: t.narrow(-1, _around(n), 1),
        lambda: t.narrow(dim=0, start=_around(n), length=1),
        lambda: t.narrow(0, torch.tensor(_around(n)), 1),
        lambda: t.select(_around(n), _around(n)),
        lambda: t.transpose(_around(n), _around(n)),
        lambda: t.transpose(-1, -2),
    )
    return forms[n.below(len(forms))]()


def _index_around(t: torch.Tensor, n: Numbers) -> torch.Tensor:
    bounds = slice(_around(n), _around(n), 1 + n.below(3))
    forms: Sequence[Any] = (
        _around(n),
        bounds,
        slice(None, None, _around(n)),
        (_around(n), bounds),
        (bounds, _around(n)),
        (bounds, bounds),
        (None, bounds),
        (..., bounds),
        (),
        ((0, _around(n)),),
        [_around(n)],
        np.int64(_around(n)),
        bool(n.below(2)),
        torch.tensor(_around(n)),
        1.5,
    )
    return t[forms[n.below(len(forms))]]


def _unfold(t: torch.Tensor, n: Numbers) -> torch.Tensor:
    return t.unfold(_dim(t, n), 1 + n.below(3), 1 + n.below(3))


def _reinterpreted(t: torch.Tensor, n: Numbers) -> torch.Tensor:
    dtype = n.of((torch.uint8, torch.int16, torch.float32, torch.int64, torch.bfloat16))
    return t.view(dtype) if t.numel() else t  # without elements torch may refuse for strides that mean nothing


VIEWS: Sequence[Callable[[torch.Tensor, Numbers], torch.Tensor]] = (
    _narrow,
    _narrow,
    _step,
    _step,
    _as_strided,
    _reshape,
    _permute,
    _unfold,
    _dims_around,
    _index_around,
    _index_around,
    lambda t, n: t.select(_dim(t, n), n.below(max(t.shape[:1] or (1,)))),
    lambda t, n: t[n.below(4)],
    lambda t, n: t[..., n.below(4), None],
    lambda t, n: t.transpose(_dim(t, n), _dim(t, n)),
    lambda t, _: t.t(),
    lambda t, _: t.mT if t.dim() else t,
    lambda t, n: t.movedim(_dim(t, n), _dim(t, n)),
    lambda t, _: t.flatten(),
    lambda t, n: t.flatten(_dim(t, n)),
    lambda t, n: t.unflatten(_dim(t, n), (-1, 1 + n.below(2))),
    lambda t, n: t.unsqueeze(n.below(t.dim() + 1)),
    lambda t, _: t.squeeze(),
    lambda t, n: t.squeeze(_dim(t, n)),
    lambda t, n: t.expand(1 + n.below(3), *t.shape),
    lambda t, n: t.broadcast_to((1 + n.below(2), *t.shape)),
    lambda t, n: n.of(t.chunk(1 + n.below(3), _dim(t, n))),
    lambda t, n: n.of(t.split(1 + n.below(3), _dim(t, n))),
    lambda t, n: n.of(torch.tensor_split(t, 2, _dim(t, n))),
    lambda t, n: n.of(t.unbind(_dim(t, n)) or (t,)),
    lambda t, n: t.diagonal(n.below(3) - 1),
    _reinterpreted,
    lambda t, _: t.detach(),
    lambda t, _: t.data,
    lambda t, _: t.conj(),
    lambda t, _: t.real,
    lambda t, _: t.imag,
    lambda t, _: torch.view_as_real(t),
    lambda t, _: t.contiguous(),
    lambda t, _: t.cpu(),
    lambda t, _: t.to("cpu", t.dtype),
    lambda t, _: t.type_as(t),
    lambda t, _: t.view_as(t),
    lambda t, _: t.expand_as(t),
    lambda t, _: t.resolve_conj(),
    lambda t, _: t.resolve_neg(),
    lambda t, _: t.alias() if hasattr(t, "alias") else t.view(t.shape),
)


READS: Sequence[Callable[[torch.Tensor, Numbers], Any]] = (
    lambda t, _: (t == 1).sum() if t.is_floating_point() or t.is_complex() else t.sum(),
    lambda t, n: t.flatten()[n.below(t.numel())].item(),
    lambda t, _: repr(t.tolist()),
    lambda t, _: np.array(t.numpy()),
    lambda t, _: np.asarray(t) + 1,
    lambda t, _: copy.deepcopy(t),
    lambda t, _: pickle.loads(pickle.dumps(t)),
    lambda t, _: (bool(t.flatten()[:1].any()), len(t), t.nonzero()),
    lambda t, _: bytes(t.untyped_storage())[: t.nbytes] if t.numel() else b"",
    lambda t, _: ctypes.string_at(t.data_ptr(), t.nbytes) if t.numel() and t.is_contiguous() else None,
    lambda t, _: torch.from_dlpack(t).clone(),
    lambda t, _: [row.clone() for row in t],
    lambda t, _: t.abs().amax() if t.numel() else None,
    lambda t, _: torch.equal(t, t.clone()) if t.dtype != torch.float8_e4m3fn else None,
)

MAKES: Sequence[Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]] = (
    lambda t, _, __: t.clone(),
    lambda t, _, __: t.contiguous(),
    lambda t, _, __: t.clone(memory_format=torch.contiguous_format),
    lambda t, _, __: torch.cat([t, t], dim=-1),
    lambda t, other, __: torch.stack([t, other]),
    lambda t, _, __: torch.zeros_like(t),
    lambda t, _, __: t.new_ones(3),
    lambda t, _, __: torch.where(t.isfinite(), t, t),
    lambda t, _, __: t.repeat(2, *([1] * t.dim())),
    lambda t, _, dtype: t.to(dtype),
    lambda t, _, dtype: t.type(dtype),
)

COMBINATIONS: Sequence[Callable[[torch.Tensor, torch.Tensor], Any]] = (
    lambda a, b: torch.equal(a, b) if a.dtype != torch.float8_e4m3fn else None,
    lambda a, b: a == b,
    lambda a, b: torch.cat([a, b]),
    lambda a, b: a @ b if a.dtype == torch.int64 else (a @ b).shape,
    lambda a, b: torch.add(a, b) == a,
    lambda a, b: torch.stack([a, b]),
)


def _fill_part(t: torch.Tensor, _: torch.Tensor) -> None:
    t[-1].fill_(1)


#: Whether the value of another tensor goes in, and what happens to the first.
CHANGES: Sequence[tuple[bool, Callable[[torch.Tensor, torch.Tensor], Any]]] = (
    (False, lambda t, _: t.mul_(2)),
    (False, lambda t, _: t.add_(1)),
    (False, lambda t, _: t.zero_()),
    (False, _fill_part),
    (False, lambda t, _: t.masked_fill_(t == t.flatten()[0], 1)),
    (True, lambda t, other: t.add_(other)),
    (True, lambda t, other: t.copy_(other)),
    (True, lambda t, other: torch.add(t, other.flatten()[0], out=t)),
    (True, lambda t, other: torch._foreach_add_([t, t], [other, other])),
)


def _set_all(target: torch.Tensor, source: torch.Tensor, _: Numbers) -> None:
    target[...] = source


def _set_tail(target: torch.Tensor, source: torch.Tensor, _: Numbers) -> None:
    target[1:] = source[1:]


def _set_one(target: torch.Tensor, source: torch.Tensor, n: Numbers) -> None:
    target[n.below(3)] = source[n.below(3)]


def _set_masked(target: torch.Tensor, source: torch.Tensor, _: Numbers) -> None:
    target[torch.arange(max(target.shape[0], 1)) % 2 == 0] = source[0]


def _set_listed(target: torch.Tensor, source: torch.Tensor, n: Numbers) -> None:
    target[torch.tensor([0, -1])] = source[n.below(3)]


def _set_indexed(target: torch.Tensor, source: torch.Tensor, _: Numbers) -> None:
    target.index_copy_(0, torch.tensor([1, 0]), source[:2])


def _set_index(target: torch.Tensor, source: torch.Tensor, n: Numbers) -> None:
    index = n.of((_around(n), slice(_around(n), None), (0, slice(1, None)), (slice(None), _around(n)), (..., 0), None))
    target[index] = source if n.below(3) == 0 else source[index]


SET_ITEMS = (_set_all, _set_tail, _set_one, _set_masked, _set_listed, _set_indexed, _set_index)


def _exact(t: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether every value of ``t`` has one representation in ``dtype``: torch leaves the others open."""
    if t.dtype == dtype:
        return True
    if t.is_complex() and not dtype.is_complex:
        return False
    wide = torch.view_as_real(t.to(torch.complex128)) if t.is_complex() else t.double()
    return bool((wide.isfinite() & (wide.abs() < 100)).all()) and (dtype != torch.uint8 or bool((wide >= 0).all()))


def _overlaps_itself(t: torch.Tensor) -> bool:
    places = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        places = places.unsqueeze(-1) + torch.arange(size) * stride
    return len(places.flatten().unique()) < t.numel()


class World:
    """One run of a program.

    Args:
        handles: The stored tensors, real or deferred.
        skipped: Steps that have no one result (writes to memory that overlaps itself, casts that torch leaves open).
            None to find them out, which takes real tensors.
    """

    def __init__(self, handles: list[torch.Tensor], skipped: set[int] | None = None) -> None:
        self.handles = handles
        self.skipped: set[int] = set() if skipped is None else skipped
        self.first = skipped is None
        self.buffers = [_values((_BUFFER,), dtype, seed) for seed, dtype in enumerate(_DTYPES)]
        self.parameters = [nn.Parameter(b[16:].view(-1, 4), requires_grad=True) for b in self.buffers[:3]]
        self.outcomes: list[Any] = []

    # What a step works on.

    def handle(self, n: Numbers) -> torch.Tensor:
        return self.handles[n.below(len(self.handles))]

    def target(self, n: Numbers, shape: Sequence[int], dtype: torch.dtype | None) -> torch.Tensor:
        """A place for a tensor of ``shape``: somewhere in a buffer, with gaps, transposed, or just so."""
        same = dtype is not None and dtype in _DTYPES and n.below(3)
        buffer = self.buffers[_DTYPES.index(dtype) if same and dtype else n.below(len(self.buffers))]
        sizes = list(shape)
        if n.below(5) == 0:
            sizes.insert(0, 2)
        order = list(range(len(sizes)))
        if n.below(3) == 0:
            random.Random(n.below(6)).shuffle(order)
        step = n.of((1, 1, 1, 2, 3))
        strides = [0] * len(sizes)
        for dim in reversed(order):
            strides[dim] = step
            step = step * max(sizes[dim], 1) + n.of((0, 0, 0, 1))
        return buffer.as_strided(sizes, strides, n.below(60))

    def part(self, n: Numbers) -> torch.Tensor:
        """A view of a buffer or a parameter."""
        t: torch.Tensor = n.of([*self.buffers, *self.parameters])
        for _ in range(n.below(3)):
            with contextlib.suppress(*_REFUSALS):
                t = n.of(VIEWS)(t, n)
        return t

    def skips(self, step: int, source: torch.Tensor | None, target: torch.Tensor, *, unclear: bool = False) -> bool:
        if self.first and (
            unclear or _overlaps_itself(target) or (source is not None and not _exact(source, target.dtype))
        ):
            self.skipped.add(step)
        return step in self.skipped

    # Steps.

    def run(self, steps: Sequence[tuple[str, Sequence[int]]]) -> None:
        for number, (name, numbers) in enumerate(steps):
            try:
                outcome = getattr(self, name)(Numbers(numbers), number)
            except _REFUSALS as exc:
                outcome = type(exc)
            self.outcomes.append((number, name, _frozen(outcome)))

    def view(self, n: Numbers, _: int) -> Any:
        t = self.handle(n)
        for _ in range(1 + n.below(3)):
            t = n.of(VIEWS)(t, n)
        self.handles.append(t)
        return t.shape, t.dtype, t.stride() if t.numel() else None

    def copy(self, n: Numbers, step: int) -> None:
        source = self.handle(n)
        target = self.target(n, source.shape, source.dtype)
        if not self.skips(step, source, target):
            for _ in range(1 + n.below(2)):
                target.copy_(source)

    def copy_part(self, n: Numbers, step: int) -> None:
        source, target = self.handle(n), self.part(n)
        if not self.skips(step, source, target):
            with torch.no_grad() if n.below(4) else contextlib.nullcontext():
                target.copy_(source)

    def set_item(self, n: Numbers, step: int) -> None:
        source = self.handle(n)
        target = self.target(n, source.shape, source.dtype)
        if not self.skips(step, source, target):
            n.of(SET_ITEMS)(target, source, n)

    def change(self, n: Numbers, step: int) -> None:
        self._changed(self.part(n) if n.below(2) else self.target(n, (2, 3), None), n, step)

    def change_handle(self, n: Numbers, step: int) -> None:
        self._changed(self.handle(n), n, step)

    def _changed(self, t: torch.Tensor, n: Numbers, step: int) -> None:
        other = self.handle(n)
        takes_other, change = n.of(CHANGES)
        if not self.skips(step, other if takes_other else None, t):
            with torch.no_grad():
                change(t, other)

    def read(self, n: Numbers, _: int) -> Any:
        return n.of(READS)(self.handle(n), n)

    def read_part(self, n: Numbers, _: int) -> Any:
        return n.of(READS)(self.part(n).detach(), n)

    def make(self, n: Numbers, step: int) -> Any:
        t, other = self.handle(n), self.handle(n)
        dtype = n.of((torch.float32, torch.float64, torch.bfloat16, torch.int64))
        if self.skips(step, t, torch.empty(1, dtype=dtype)):
            dtype = t.dtype
        made = n.of(MAKES)(t, other, dtype)
        self.handles.append(made)
        return made

    def combine(self, n: Numbers, _: int) -> Any:
        return n.of(COMBINATIONS)(self.handle(n), self.handle(n))

    def move(self, n: Numbers, step: int) -> None:
        """From one buffer to another, through torch alone."""
        source = self.part(n).detach()
        target = self.target(n, source.shape, source.dtype)
        same = self.first and source.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()
        if not self.skips(step, source, target, unclear=same):
            target.copy_(source)


def _frozen(outcome: Any) -> Any:
    """What can be compared: the bytes of tensors, with all that is no number alike."""
    if isinstance(outcome, torch.Tensor):
        # Plain first, so that what is compared is what a reader sees.
        t = torch.empty(outcome.shape, dtype=outcome.dtype).copy_(outcome.detach()).resolve_conj()
        return str(t.dtype), tuple(t.shape), _bytes(t)
    if isinstance(outcome, np.ndarray):
        return str(outcome.dtype), outcome.shape, outcome.tobytes() if outcome.dtype.kind not in "fc" else repr(outcome)
    if isinstance(outcome, (list, tuple)):
        return tuple(map(_frozen, outcome))
    return repr(outcome)


def _bytes(t: torch.Tensor) -> bytes:
    if t.dtype.is_floating_point or t.dtype.is_complex:
        t = torch.view_as_real(t) if t.is_complex() else t
        t = torch.where(t.float().isnan(), torch.full((), torch.nan).to(t.dtype), t)
    return bytes(t.contiguous().flatten().view(torch.uint8).tolist())


STEPS = (
    *("view",) * 5,
    *("copy",) * 6,
    *("copy_part",) * 2,
    *("set_item",) * 3,
    *("change",) * 2,
    "change_handle",
    *("read",) * 2,
    *("read_part",) * 2,
    *("make",) * 2,
    "combine",
    "move",
)

programs = st.lists(
    st.tuples(st.sampled_from(STEPS), st.lists(st.integers(0, 255), min_size=12, max_size=12)),
    min_size=1,
    max_size=25,
)


@st.composite
def chosen_names(draw: st.DrawFn) -> list[str]:
    """Some tensors of one or two dtypes, so that copies often go to the same buffer."""
    dtypes = draw(st.lists(st.integers(0, len(_DTYPES) - 1), min_size=1, max_size=2))
    found = st.tuples(st.sampled_from(dtypes), st.integers(0, len(_SHAPES) - 1))
    return [f"t{number}.{index}" for number, index in draw(st.lists(found, min_size=2, max_size=6, unique=True))]


@st.composite
def environments(draw: st.DrawFn) -> dict[str, str]:
    return {
        "MX_CHUNK_BYTES": draw(st.sampled_from(["32", "64", "4096"])),
        "MX_STAGING_BYTES": draw(st.sampled_from(["64", "1MiB"])),
        "MX_CONCURRENCY": draw(st.sampled_from(["1", "4"])),
    }


@contextlib.contextmanager
def _small_batches(copies: int) -> Iterator[None]:
    """Hand copies over after so many, and forget them soon, which otherwise takes larger programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PendingCopies, "limits", CopyLimits(batch_copies=copies, purge_copies=3))
        yield


@pytest.mark.slow
@settings(
    deadline=None, max_examples=examples(300), suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(
    names=chosen_names(),
    program=programs,
    environ=environments(),
    where=st.integers(0, 7),
    copies=st.sampled_from([1, 4, 256]),
    inference=st.booleans(),
)
def test_a_program_on_deferred_tensors_does_what_it_does_on_real_ones(
    plugins: mx.PluginManager,
    uris: Sequence[str],
    names: Sequence[str],
    program: Sequence[tuple[str, Sequence[int]]],
    environ: Mapping[str, str],
    where: int,
    copies: int,
    inference: bool,
) -> None:
    """Every value that a program sees, every error that it gets, and every byte that it leaves behind are the same."""
    with torch.inference_mode() if inference else contextlib.nullcontext():
        real = World([STORED[name].clone() for name in names])
        real.run(program)
        with _small_batches(copies):
            weights = mx.deferred_weights(uris[where], environ=environ, plugins=plugins)
            with contextlib.suppress(mx.IncompleteLoadError), weights:
                found = dict(weights)
                deferred = World([found[name] for name in names], real.skipped)
                deferred.run(program)
                left = [_frozen(t) for t in deferred.handles] if inference == (where % 2 == 0) else []

        assert real.outcomes == deferred.outcomes
        assert [_bytes(b) for b in real.buffers] == [_bytes(b) for b in deferred.buffers]
        assert not left or [_frozen(t) for t in real.handles] == left
