"""Whatever the layout of tensors, a load from a peer writes their bytes, and no others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from attrs import frozen
from hypothesis import example, given, settings
from hypothesis import strategies as st

import modelexpress_core as mx
from modelexpress_core.transport.tensor_bytes import bytes_of
from tests.support.peers import serving_worker
from tests.support.properties import examples

pytestmark = pytest.mark.slow

_DTYPES = (
    *(torch.uint8, torch.int8, torch.float8_e4m3fn, torch.int16, torch.bfloat16, torch.float16),
    *(torch.int32, torch.float32, torch.int64, torch.float64, torch.complex64, torch.complex128),
)

_MAX_SIZE = 4
_MAX_DIMENSIONS = 4


@frozen
class View:
    """A tensor that lies in the memory of several.

    Attributes:
        memory: Number of the memory.
        dtype: Data type.
        start: First element; the start of the memory is aligned for every type.
        shape: Sizes.
        stride: Strides, in elements.
    """

    memory: int
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def end(self) -> int:
        """The first byte behind it."""
        reach = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (self.start + (reach + 1 if 0 not in self.shape else 0)) * self.dtype.itemsize

    def of(self, memories: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor."""
        typed = memories[self.memory].view(self.dtype)
        return typed.as_strided(self.shape, self.stride, self.start)

    def positions(self) -> set[int]:
        """The bytes that belong to it, in its memory."""
        found = set()
        for index in itertools.product(*map(range, self.shape)):
            element = self.start + sum(map(int.__mul__, index, self.stride))
            found.update(range(element * self.dtype.itemsize, (element + 1) * self.dtype.itemsize))
        return found


@st.composite
def views(draw: st.DrawFn, memory: int, start: int | None = None) -> View:
    """Tensors whose dimensions are permuted, have gaps, or repeat elements; no two elements overlap in part."""
    flags = memory == 0  # of a memory whose bytes are 0 or 1, as those of bool have to be
    dtype = torch.bool if flags else draw(st.sampled_from(_DTYPES))
    shape = draw(st.lists(st.integers(0, _MAX_SIZE), max_size=_MAX_DIMENSIONS))
    stride = [0] * len(shape)
    step = draw(st.sampled_from((1, 1, 2)))
    for dimension in draw(st.permutations(range(len(shape)))):
        if draw(st.sampled_from(("", "", "", "expanded"))):
            continue
        stride[dimension] = step
        step = step * max(shape[dimension], 1) + draw(st.sampled_from((0, 0, 0, 1, 3)))
    first = draw(st.integers(0, 5)) if start is None else start // dtype.itemsize
    return View(memory, dtype, first, tuple(shape), tuple(stride))


@st.composite
def offers(draw: st.DrawFn) -> dict[str, View]:
    """Tensors by name. Some begin where another one does, are the same, or overlap another one."""
    found: list[View] = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(("new", "new", "same", "same start", "overlap")))
        if kind == "new" or not found:
            found.append(draw(views(draw(st.integers(0, 9)))))
            continue
        other = draw(st.sampled_from(found))
        start = other.start * other.dtype.itemsize if kind == "same start" else None
        found.append(other if kind == "same" else draw(views(other.memory, start)))
    names = draw(st.permutations([chr(ord("a") + number) for number in range(len(found))]))
    return dict(zip(names, found, strict=True))


def memories(offer: Mapping[str, View], seed: int) -> list[torch.Tensor]:
    """Memory of random bytes for all tensors; a part of it belongs to none."""
    chance = torch.Generator().manual_seed(seed)
    made = []
    for number in range(10):
        end = max((view.end for view in offer.values() if view.memory == number), default=0) + 40
        most = 256 if number else 2
        made.append(torch.randint(0, most, (-(-end // 16) * 16,), dtype=torch.uint8, generator=chance))
    return made


@settings(max_examples=examples(1000))
@given(view=views(1))
@example(view=View(1, torch.int16, 0, (1,), (0,)))
@example(view=View(1, torch.int16, 0, (0,), (0,)))
def test_bytes_are_those_of_the_tensor_in_the_order_of_memory(view: View) -> None:
    """Each once. Written elsewhere, they give the same tensor, and gaps keep what is in them."""
    (_, there, *_), (_, here, *_) = memories({"a": view}, 1), memories({"a": view}, 2)
    positions = sorted(view.positions())
    expected = here.clone()
    expected[positions] = there[positions]

    content = bytes_of("a", view.of([there, there])).gathered()
    bytes_of("a", view.of([here, here])).scatter(content)

    assert there[positions].tolist() == content.tolist()
    assert expected.tolist() == here.tolist()


@settings(max_examples=examples(240))
@given(offer=offers())
@example(offer={"a": View(1, torch.uint8, 0, (3,), (1,)), "b": View(1, torch.uint8, 0, (9,), (1,))})
@example(offer={"a": View(1, torch.int8, 0, (2, 3), (3, 1)), "b": View(1, torch.int8, 0, (3, 2), (1, 3))})
@example(offer={"a": View(1, torch.int16, 0, (4,), (2,)), "b": View(1, torch.int16, 0, (3,), (1,))})
def test_a_load_from_a_peer_writes_the_bytes_of_the_tensors_and_no_others(offer: Mapping[str, View]) -> None:
    """Also of tensors that share memory with others, wholly or in part."""
    there, here = memories(offer, 1), memories(offer, 2)
    expected = [memory.clone() for memory in here]
    for view in offer.values():
        positions = sorted(view.positions())
        expected[view.memory][positions] = there[view.memory][positions]

    with serving_worker({name: view.of(there) for name, view in offer.items()}, ["inproc"]) as worker:
        mx.load_into({name: view.of(here) for name, view in offer.items()}, worker.uri("inproc"))

    assert [memory.tolist() for memory in expected] == [memory.tolist() for memory in here]
