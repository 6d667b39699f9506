"""Whether tensors are written completely, on the meta device: compared with the values of tensors that have memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelexpress_core.placement.observed_writes import ObservedWrites
from tests.support.properties import examples

Write = Callable[[torch.Tensor], Any]


@st.composite
def writes(draw: st.DrawFn) -> Write:
    """A write of ones to a part of a matrix of 6 by 8, as loading code writes."""
    first, count = draw(st.integers(0, 5)), draw(st.integers(1, 6))
    column, width = draw(st.integers(0, 7)), draw(st.integers(1, 8))
    kind = draw(st.integers(0, 4))

    def write(matrix: torch.Tensor) -> None:
        rows = matrix[first : first + count]
        if kind == 0:
            rows.copy_(torch.ones(rows.shape, dtype=matrix.dtype))
        elif kind == 1:
            rows[:, column : column + width].fill_(1)
        elif kind == 2:
            matrix.t()[column].copy_(torch.ones(6, dtype=matrix.dtype))
        elif kind == 3:
            matrix.data.view(-1)[first * 8 + column :].narrow(0, 0, 1).add_(1)
        else:
            torch.ones(rows.shape, out=rows) if matrix.device.type == "cpu" else rows.fill_(1)

    return write


@settings(deadline=None, max_examples=examples(500))
@given(st.lists(st.tuples(st.booleans(), writes()), max_size=12), st.sampled_from([torch.bfloat16, torch.int32]))
def test_a_tensor_is_missing_unless_every_element_was_written(
    program: list[tuple[bool, Write]], dtype: torch.dtype
) -> None:
    """For each order of writes to two parameters."""
    real = {"a": torch.zeros(6, 8, dtype=dtype), "b": torch.zeros(6, 8, dtype=dtype)}
    model = {name: torch.nn.Parameter(tensor.to("meta"), requires_grad=False) for name, tensor in real.items()}

    with ObservedWrites(model) as observed:
        for is_first, write in program:
            write(model["a" if is_first else "b"].data)
    for is_first, write in program:
        write(real["a" if is_first else "b"])

    assert tuple(name for name, tensor in real.items() if not tensor.all()) == observed.missing()


def test_tensors_of_one_storage_are_told_apart() -> None:
    """Views of one storage on the meta device have no addresses that differ."""
    whole = torch.empty(4, 4, device="meta")
    with ObservedWrites({"top": whole[:2], "bottom": whole[2:], "all": whole}) as observed:
        whole[1:].zero_()

    assert ("all", "top") == observed.missing()


def test_what_was_copied_is_kept() -> None:
    """For tensors that are named, with the part of the storage that it was copied to."""
    model = {"a": torch.empty(4, 3, device="meta"), "b": torch.empty(3, device="meta")}
    ones, twos = torch.ones(2, 3), torch.full((3,), 2.0)
    with ObservedWrites(model, keep=["a"]) as observed:
        model["a"][1:3].copy_(ones)
        model["b"].copy_(twos)
        model["a"][:, 0].fill_(1)

    [(size, stride, offset, source)] = observed.copies_to("a")
    assert ((2, 3), (3, 1), 3) == (size, stride, offset)
    assert source is ones
    assert frozenset({"a"}) == observed.kept


def test_writes_to_other_tensors_do_not_count() -> None:
    """Neither writes to a tensor of the same shape, nor reads."""
    model = {"a": torch.empty(3, device="meta")}
    with ObservedWrites(model) as observed:
        torch.empty(3, device="meta").fill_(1)
        torch.empty(3, device="meta").copy_(model["a"])

    assert ("a",) == observed.missing()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_memory_of_any_device(device: str) -> None:
    """A module may have kept some of its tensors in memory; those without elements need no write."""
    model = {"a": torch.empty(3, device=device), "empty": torch.empty(0, device=device)}
    with ObservedWrites(model) as observed:
        torch._foreach_zero_([model["a"]])

    assert () == observed.missing()
