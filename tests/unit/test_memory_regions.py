"""Which memory a tensor occupies, and which pieces of memory overlap: compared with sets of addresses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelexpress_core.fetch import Ticket
from modelexpress_core.placement.memory import Region, has_memory, region_of
from modelexpress_core.placement.pending_memory import PendingMemory
from modelexpress_core.placement.strides import collapse_dims
from tests.support.memory import addresses
from tests.support.properties import examples

_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BUFFER = torch.zeros(1 << 13, dtype=torch.uint8)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors in one buffer, with strides of any kind: gaps, no gaps, repeated and overlapping elements."""
    dtype = _DTYPES[draw(st.sampled_from([1, 2, 4, 8]))]
    sizes = draw(st.lists(st.integers(0, 5), max_size=3))
    dense = [1]
    for size in sizes:
        dense.append(max(1, dense[-1] * size))
    kind = draw(st.sampled_from(["dense", "gaps", "any"]))
    if kind == "any":
        strides = [draw(st.integers(0, 30)) for _ in sizes]
    else:
        step = draw(st.integers(1, 4)) if kind == "gaps" else 1
        strides = draw(st.permutations([stride * step for stride in dense[: len(sizes)]]))
    return _BUFFER.view(dtype).as_strided(sizes, strides, draw(st.integers(0, 60)))


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Two parts of one matrix."""
    matrix = _BUFFER.view(_DTYPES[draw(st.sampled_from([1, 2, 4]))])[:96].view(8, 12)
    return tuple(  # type: ignore[return-value]
        matrix[draw(st.integers(0, 7)) :, draw(st.integers(0, 11)) :][
            : draw(st.integers(1, 8)), : draw(st.integers(1, 12))
        ]
        for _ in range(2)
    )


@settings(deadline=None, max_examples=examples(500))
@given(tensors())
def test_a_region_is_the_memory_of_its_tensor(t: torch.Tensor) -> None:
    """Start, end and gaplessness are those of the set of addresses; a tensor without elements has none."""
    region, exact = region_of(t), addresses(t)

    if not exact:
        assert region is None
        return
    assert region is not None
    assert (min(exact), max(exact) + 1) == (region.start, region.end)
    assert not region.gapless or len(exact) == region.end - region.start


@settings(deadline=None, max_examples=examples(500))
@given(tensors())
def test_the_dimensions_of_a_region_name_its_bytes(t: torch.Tensor) -> None:
    """Sizes and strides in bytes lead to every address of the tensor and to no other."""
    region = region_of(t)
    if region is None:
        return

    reached = {
        region.start + sum(i * stride for i, (_, stride) in zip(index, region.dims, strict=True))
        for index in itertools.product(*(range(size) for size, _ in region.dims))
    }

    assert addresses(t) == reached


@settings(deadline=None, max_examples=examples(1500))
@given(tensors(), tensors())
def test_regions_that_share_a_byte_overlap(a: torch.Tensor, b: torch.Tensor) -> None:
    """``overlaps`` is never False where a byte belongs to both, and does not depend on who asks."""
    first, second = region_of(a), region_of(b)
    if first is None or second is None:
        return

    found = first.overlaps(second)

    assert found or not addresses(a) & addresses(b)
    assert found == second.overlaps(first)


@settings(deadline=None, max_examples=examples(500))
@given(rectangles())
def test_parts_of_one_matrix_overlap_exactly_where_they_share_an_element(
    parts: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Columns beside columns do not wait for each other; this is what tensor-parallel ranks write."""
    a, b = parts
    first, second = region_of(a), region_of(b)
    assert first is not None
    assert second is not None

    assert bool(addresses(a) & addresses(b)) == first.overlaps(second)


@settings(deadline=None, max_examples=examples(300))
@given(st.lists(st.integers(1, 6), max_size=4).flatmap(st.permutations), st.permutations(range(4)))
def test_a_dense_tensor_is_one_run(sizes: list[int], order: list[int]) -> None:
    """However its dimensions are permuted, merging leaves one, of stride 1."""
    t = torch.zeros(sizes).permute([dim for dim in order if dim < len(sizes)])

    expected = [(t.numel(), 1)] if t.numel() > 1 else []
    assert expected == [(size, stride) for size, stride, _ in collapse_dims(t.shape, t.stride(), t.stride())]


def test_only_tensors_with_memory_of_their_own_have_it() -> None:
    """Strided tensors and parameters have; sparse and quantised tensors and wrapping classes do not say where."""
    assert has_memory(torch.zeros(2))
    assert has_memory(torch.nn.Parameter(torch.zeros(2)))
    assert not has_memory(torch.zeros(2).to_sparse())


class _Pending:
    """What ``PendingMemory`` should do, with sets."""

    def __init__(self) -> None:
        self.entries: list[tuple[Region, Ticket]] = []

    def overlapping(self, region: Region) -> list[Ticket]:
        return [ticket for other, ticket in self.entries if other.overlaps(region)]


@settings(deadline=None, max_examples=examples(400))
@given(
    st.lists(st.tuples(st.sampled_from(["add", "ask", "done", "purge"]), tensors(), st.integers(0, 50)), max_size=60),
    st.sampled_from([3, 6, 24]),
)
def test_what_is_pending_is_found_by_overlap(steps: Sequence[tuple[str, torch.Tensor, int]], bits: int) -> None:
    """After any additions and purges, the owners that overlap a region are found, in the order of addition."""
    pending: PendingMemory[Ticket] = PendingMemory(bits)
    model = _Pending()

    for step, t, number in steps:
        region = region_of(t)
        if step == "add" and region is not None:
            ticket = Ticket()
            pending.add(region, ticket)
            model.entries.append((region, ticket))
        elif step == "ask" and region is not None:
            assert model.overlapping(region) == pending.overlapping(region)
        elif step == "done" and model.entries:
            model.entries[number % len(model.entries)][1].done = True
        elif step == "purge":
            pending.purge()
            model.entries = [entry for entry in model.entries if not entry[1].done]

    assert [ticket for _, ticket in model.entries] == pending.owners()
    assert len(model.entries) == len(pending)
