"""From copies to reads: plans are carried out against bytes in memory, and every element is accounted for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import pytest
import torch
from attrs import frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from modelexpress_core.checkpoint import CheckpointFile, TensorInfo
from modelexpress_core.errors import CheckpointError
from modelexpress_core.fetch import Range
from modelexpress_core.placement.memory import bytes_at
from modelexpress_core.placement.plan import Copy, ReadPlanner
from tests.support.properties import examples

_WORDS = {torch.uint8: "U8", torch.int16: "I16", torch.float32: "F32", torch.int64: "I64", torch.float64: "F64"}
_HEADER_BYTES = 24


def content(length: int) -> bytes:
    """Bytes that differ from place to place, so that a shift by any distance shows."""
    return bytes((i * 7 + i // 251) % 256 for i in range(length))


@frozen
class Stored:
    """A file of tensors, one after another."""

    data: bytes
    tensors: tuple[tuple[TensorInfo, torch.Tensor], ...]

    @classmethod
    def of(cls, *tensors: tuple[torch.dtype, Sequence[int]], name: str = "a.safetensors") -> Stored:
        metas = [torch.empty(tuple(shape), dtype=dtype, device="meta") for dtype, shape in tensors]
        data = content(_HEADER_BYTES + sum(meta.nbytes for meta in metas))
        file = CheckpointFile(name, name, len(data), None, _HEADER_BYTES)
        found, position = [], _HEADER_BYTES
        for number, meta in enumerate(metas):
            info = TensorInfo(f"t{number}", _WORDS[meta.dtype], tuple(meta.shape), file, position, meta.nbytes)
            found.append((info, meta))
            position += meta.nbytes
        return cls(data, tuple(found))

    def real(self, info: TensorInfo, meta: torch.Tensor) -> torch.Tensor:
        """The plain tensor of ``info``."""
        raw = bytearray(self.data[info.offset : info.offset + info.length])
        return torch.frombuffer(raw, dtype=torch.uint8).view(meta.dtype).view(info.shape)


def ranges_of(planner: ReadPlanner, copies: Iterable[Copy]) -> list[Range]:
    return [range_ for batch in planner.batches(copies) for range_ in batch]


def carry_out(data: bytes, ranges: Iterable[Range]) -> None:
    """Do what the engine does."""
    for range_ in ranges:
        read = data[range_.offset : range_.offset + range_.length]
        assert len(read) == range_.length, "a range ends after the file"
        if range_.direct is not None:
            range_.direct[:] = read
            continue
        buffer = memoryview(bytearray(read))
        for segment in range_.segments:
            start = segment.offset - range_.offset
            part = buffer[start : start + segment.length]
            assert 0 <= start, "a segment begins before its range"
            assert len(part) == segment.length, "a segment ends after its range"
            if segment.consume is not None:
                segment.consume(part)
            elif segment.memory is not None:
                segment.memory[:] = part


def bytes_of(info: TensorInfo, view: torch.Tensor) -> set[int]:
    """Positions in the file of every byte of ``view``."""
    starts = [
        info.offset
        + view.itemsize * (view.storage_offset() + sum(i * s for i, s in zip(at, view.stride(), strict=True)))
        for at in itertools.product(*map(range, view.shape))
    ]
    return {start + byte for start in starts for byte in range(view.itemsize)}


@st.composite
def views(draw: st.DrawFn, meta: torch.Tensor) -> torch.Tensor:
    """A view of ``meta`` with at least one element, each of them once."""
    view = meta
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.integers(0, 4))
        dim = draw(st.integers(0, max(view.dim() - 1, 0)))
        if kind == 0 and view.dim():
            start = draw(st.integers(0, view.shape[dim] - 1))
            view = view.narrow(dim, start, draw(st.integers(1, view.shape[dim] - start)))
        elif kind == 1 and view.dim():
            index = [slice(None)] * dim + [
                slice(draw(st.integers(0, view.shape[dim] - 1)), None, draw(st.integers(1, 3)))
            ]
            view = view[tuple(index)]
        elif kind == 2 and view.dim() > 1:
            view = view.transpose(dim, draw(st.integers(0, view.dim() - 1)))
        elif kind == 3 and view.dim():
            view = view.select(dim, draw(st.integers(0, view.shape[dim] - 1)))
        elif kind == 4 and view.dim():
            view = view.unfold(dim, draw(st.integers(1, view.shape[dim])), draw(st.integers(1, 3)))
    return view


@st.composite
def places(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A destination for a tensor of ``shape``, and the buffer around it."""
    dtype = draw(st.sampled_from([dtype, dtype, dtype, torch.float64]))
    order = draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else list(range(len(shape)))
    step = draw(st.sampled_from([1, 1, 1, 2, 3]))
    strides = [0] * len(shape)
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim] + draw(st.sampled_from([0, 0, 0, 1, 5]))
    offset = draw(st.integers(0, 5))
    buffer = torch.full((offset + step * 2 + 8,), 77).to(dtype)
    return buffer.as_strided(list(shape), strides, offset), buffer


@st.composite
def plans(draw: st.DrawFn) -> tuple[Stored, list[tuple[Copy, torch.Tensor]], int, int]:
    dtypes = st.sampled_from([torch.uint8, torch.int16, torch.float32, torch.int64])
    shapes = st.lists(st.integers(1, 9), max_size=3)
    stored = Stored.of(*draw(st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=5)))
    copies = []
    for _ in range(draw(st.integers(1, 6))):
        info, meta = draw(st.sampled_from(stored.tensors))
        view = draw(views(meta))
        destination, buffer = draw(places(tuple(view.shape), view.dtype))
        copies.append((Copy(info, view, destination), buffer))
    return stored, copies, draw(st.sampled_from([8, 16, 100, 4096])), draw(st.sampled_from([0, 4, 16, 64, 1024]))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as bits, where nothing was cast."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@settings(deadline=None, max_examples=examples(800))
@given(plans())
def test_every_element_arrives_and_nothing_else_is_touched(
    plan: tuple[Stored, list[tuple[Copy, torch.Tensor]], int, int],
) -> None:
    """For any views, destinations, chunk sizes and request costs, the destinations hold what torch would copy."""
    stored, copies, chunk_bytes, cost = plan
    expected = []
    for copy, buffer in copies:
        reference, to = buffer.clone(), copy.destination
        whole = stored.real(copy.info, copy.source)
        source = whole.as_strided(copy.source.shape, copy.source.stride(), copy.source.storage_offset())
        reference.as_strided(to.shape, to.stride(), to.storage_offset()).copy_(source)
        expected.append(reference)

    carry_out(stored.data, ranges_of(ReadPlanner(chunk_bytes, cost), [copy for copy, _ in copies]))

    assert all(same(reference, buffer) for reference, (_, buffer) in zip(expected, copies, strict=True))


@settings(deadline=None, max_examples=examples(800))
@given(plans())
def test_reads_are_bounded(plan: tuple[Stored, list[tuple[Copy, torch.Tensor]], int, int]) -> None:
    """No read is longer than the chunk, leaves its file, begins or ends with waste, or reads through a wide gap."""
    stored, copies, chunk_bytes, cost = plan
    needed = set().union(*(bytes_of(copy.info, copy.source) for copy, _ in copies))

    ranges = ranges_of(ReadPlanner(chunk_bytes, cost), [copy for copy, _ in copies])

    for range_ in ranges:
        wanted = [at in needed for at in range(range_.offset, range_.offset + range_.length)]
        assert 0 < range_.length <= chunk_bytes
        assert _HEADER_BYTES <= range_.offset
        assert range_.offset + range_.length <= len(stored.data)
        assert wanted[0]
        assert wanted[-1]
        assert max((len(list(run)) for want, run in itertools.groupby(wanted) if not want), default=0) <= cost
    assert needed <= {at for range_ in ranges for at in range(range_.offset, range_.offset + range_.length)}


def test_a_contiguous_copy_is_read_straight_into_place() -> None:
    """Same dtype, no gaps on either side: one read for each chunk, into the destination's own memory."""
    stored = Stored.of((torch.float32, (64, 16)))
    info, meta = stored.tensors[0]
    buffer = torch.zeros(80, 16)
    copy = Copy(info, meta.narrow(0, 8, 40), buffer[10:50])

    ranges = ranges_of(ReadPlanner(1024, 16), [copy])

    assert [1024, 1024, 512] == [range_.length for range_ in ranges]
    assert [info.offset + 8 * 64 + at for at in (0, 1024, 2048)] == [range_.offset for range_ in ranges]
    start = buffer.data_ptr() + 10 * 64
    for at, range_ in zip((0, 1024, 2048), ranges, strict=True):
        assert range_.direct is not None
        range_.direct[0] = 200
        assert 200 == bytes_at(start + at, 1)[0]


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (11, [4, 4, 4]),  # the 12 bytes between the elements cost more than requests
        (12, [36]),  # or just as much
    ],
)
def test_gaps_are_read_through_up_to_what_a_request_costs(cost: int, expected: list[int]) -> None:
    """A column of a matrix is one read or one for each row, whichever is cheaper."""
    stored = Stored.of((torch.float32, (3, 4)))
    info, meta = stored.tensors[0]
    destination = torch.zeros(3)

    ranges = ranges_of(ReadPlanner(4096, cost), [Copy(info, meta[:, 1], destination)])
    carry_out(stored.data, ranges)

    assert expected == [range_.length for range_ in ranges]
    assert same(stored.real(info, meta)[:, 1], destination)


@pytest.mark.parametrize(("cost", "expected"), [(11, [12]), (12, [36])])
def test_gaps_between_runs_cost_what_a_run_costs(cost: int, expected: list[int]) -> None:
    """A storage that gathers runs need not send gaps that are shorter than a request costs."""
    stored = Stored.of((torch.float32, (3, 4)))
    info, meta = stored.tensors[0]
    planner = ReadPlanner(4096, 1 << 20, reads_runs=True, run_cost_bytes=cost)

    ranges = ranges_of(planner, [Copy(info, meta[:, 1], torch.zeros(3))])

    assert expected == [range_.length for range_ in ranges]


def test_small_neighbours_share_a_read_and_large_ones_do_not() -> None:
    """Neighbouring tensors are read together as long as copying out of the read is cheaper."""
    small = Stored.of(*[(torch.float32, (4,))] * 6)
    large = Stored.of(*[(torch.float32, (400,))] * 3)
    planner = ReadPlanner(1 << 20, 64)

    merged, apart = (
        ranges_of(planner, [Copy(info, meta, torch.zeros(meta.shape)) for info, meta in stored.tensors])
        for stored in (small, large)
    )

    assert [96] == [range_.length for range_ in merged]
    assert [1600] * 3 == [range_.length for range_ in apart]
    assert all(range_.direct is not None for range_ in apart)


def test_parts_of_other_ranks_are_not_read_between_small_ones() -> None:
    """Halves of many small tensors are read separately: the gaps between them are as large as they are."""
    stored = Stored.of(*[(torch.float32, (8,))] * 16)
    copies = [Copy(info, meta[:4], torch.zeros(4)) for info, meta in stored.tensors]

    ranges = ranges_of(ReadPlanner(1 << 20, 128), copies)

    assert sum(copy.needed_bytes for copy in copies) == sum(range_.length for range_ in ranges)


def test_reads_of_each_file_are_its_own() -> None:
    """Tensors of two files never share a read, and each read names its file."""
    first, second = Stored.of((torch.float32, (4,))), Stored.of((torch.float32, (4,)), name="b.safetensors")
    copies = [Copy(info, meta, torch.zeros(4)) for stored in (first, second) for info, meta in stored.tensors]

    ranges = ranges_of(ReadPlanner(1 << 20, 1 << 20), copies)

    assert ["a.safetensors", "b.safetensors"] == [range_.file.name for range_ in ranges]


def test_small_reads_are_handed_over_together_and_large_ones_alone() -> None:
    """A thread takes a batch at a time, so a batch is worth taking and no larger."""
    small = Stored.of(*[(torch.float32, (64,))] * 32)
    large = Stored.of(*[(torch.float32, (100_000,))] * 3)
    planner = ReadPlanner(1 << 20, 8)

    together, apart = (
        planner.batches([Copy(info, meta, torch.zeros(meta.shape)) for info, meta in stored.tensors])
        for stored in (small, large)
    )

    assert [32] == [len(batch) for batch in together]
    assert [1, 1, 1] == [len(batch) for batch in apart]


def test_a_view_beyond_its_tensor_is_a_fault() -> None:
    """Bytes of the next tensor are never taken for those of this one."""
    stored = Stored.of((torch.float32, (4,)), (torch.float32, (4,)))
    info, meta = stored.tensors[0]

    with pytest.raises(CheckpointError, match="a view of t0 reaches to byte 20 of 16"):
        ReadPlanner(64, 64).batches([Copy(info, meta.as_strided((4,), (1,), 1), torch.zeros(4))])
