"""Whether every element of a model was written: compared with sets of addresses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelexpress_core.placement.coverage import Coverage
from tests.support.memory import addresses
from tests.support.properties import examples

_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_BUFFER = torch.zeros(512, dtype=torch.uint8)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors in a small buffer, so that they often overlap, contain each other, or are the same."""
    whole = _BUFFER.view(_DTYPES[draw(st.sampled_from([1, 2, 4]))])[:48]
    kind = draw(st.integers(0, 3))
    if kind == 0:
        start = draw(st.integers(0, 47))
        return whole[start : start + draw(st.integers(0, 48))]
    matrix = whole.view(6, 8)
    if kind == 1:
        return matrix[:, draw(st.integers(0, 7)) :][:, : draw(st.integers(1, 8))]
    if kind == 2:
        return matrix[draw(st.integers(0, 5)) :: draw(st.integers(1, 3)), :: draw(st.integers(1, 3))].t()
    return whole[draw(st.integers(0, 3)) :: draw(st.integers(1, 4))]


@settings(deadline=None, max_examples=examples(1000))
@given(st.lists(tensors(), min_size=1, max_size=5), st.lists(tensors(), max_size=8))
def test_a_tensor_is_missing_unless_every_byte_was_written(
    model: list[torch.Tensor], writes: list[torch.Tensor]
) -> None:
    """For every arrangement of tensors and writes in memory: tied, nested, overlapping, with gaps."""
    named = {f"t{number}": t for number, t in enumerate(model)}
    coverage = Coverage(named)

    for write in writes:
        coverage.wrote(write)

    written: set[int] = set().union(*map(addresses, writes))
    expected = tuple(name for name, t in named.items() if not addresses(t) <= written)
    assert expected == coverage.missing()


def missing(model: Mapping[str, torch.Tensor], *writes: torch.Tensor) -> tuple[str, ...]:
    coverage = Coverage(model)
    for write in writes:
        coverage.wrote(write)
    return coverage.missing()


def test_a_tensor_beside_one_that_contains_it_is_found() -> None:
    """A fused parameter that is registered with its parts: a write to the end of it is not overlooked."""
    fused = torch.zeros(100)

    assert () == missing({"fused": fused, "part": fused[10:20]}, fused[:50], fused[50:])


def test_tensors_with_the_same_ends_and_other_gaps_are_distinguished() -> None:
    """The outer columns of a matrix end where the matrix ends, and are not all of it."""
    matrix = torch.zeros(4, 4)
    outer = matrix[:, ::3]

    assert ("whole",) == missing({"outer": outer, "whole": matrix.view(-1)}, outer)
    assert ("whole",) == missing({"whole": matrix, "outer": outer}, outer)


def test_bytes_of_one_are_not_taken_for_a_run() -> None:
    """Every second element of an 8-bit tensor is half of it."""
    weights = torch.zeros(64, dtype=torch.float8_e4m3fn)

    assert ("w",) == missing({"w": weights}, weights[::2])
    assert () == missing({"w": weights}, weights[::2], weights[1::2])


def test_tensors_without_elements_need_no_write_and_those_without_memory_get_none() -> None:
    """Empty tensors are never missing; tensors on the meta device always are."""
    model = {
        "empty": torch.zeros(0, 4),
        "meta": torch.empty(2, device="meta"),
        "nothing": torch.empty(0, device="meta"),
    }

    assert ("meta",) == missing(model, torch.empty(2, device="meta"))


def test_a_tensor_that_hides_its_memory_is_written_when_it_is_itself() -> None:
    """Of a sparse tensor only its identity is known, also under two names."""
    sparse, other = torch.zeros(4).to_sparse(), torch.zeros(4).to_sparse()

    assert ("other",) == missing({"a": sparse, "b": sparse, "other": other}, sparse, torch.zeros(4))
