"""Views that are worked out without torch: where there is an answer, it is torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelexpress_core.placement.views import LAYOUTS, is_plain_index
from tests.support.properties import examples

_MEMORY = torch.arange(400)

#: Numbers around the sizes below, from well under nought to well over.
_NUMBERS = st.integers(-7, 7)
_BOUNDS = st.none() | _NUMBERS
_SLICES = st.builds(slice, _BOUNDS, _BOUNDS, _BOUNDS)
_ODD: st.SearchStrategy[Any] = st.sampled_from([True, 1.0, "a", torch.tensor(1), [0], (0, 0), torch.tensor([0])])
_INDICES: st.SearchStrategy[Any] = _NUMBERS | _SLICES | st.none() | st.just(Ellipsis) | _ODD
_ARGUMENTS: dict[Any, st.SearchStrategy[Sequence[Any]]] = {
    torch.Tensor.__getitem__: st.tuples(_INDICES),
    torch.Tensor.narrow: st.lists(_NUMBERS | _ODD, min_size=3, max_size=4) | st.tuples(_NUMBERS, _NUMBERS, _NUMBERS),
    torch.Tensor.select: st.lists(_NUMBERS | _ODD, min_size=1, max_size=3) | st.tuples(_NUMBERS, _NUMBERS),
    torch.Tensor.transpose: st.lists(_NUMBERS | _ODD, min_size=1, max_size=3) | st.tuples(_NUMBERS, _NUMBERS),
}
_METHODS = sorted(LAYOUTS, key=lambda method: str(method.__name__))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of up to four dimensions, some without elements, with strides of any kind."""
    sizes = draw(st.lists(st.integers(0, 5), max_size=4))
    strides = [draw(st.integers(0, 12)) for _ in sizes]
    return _MEMORY.as_strided(sizes, strides, draw(st.integers(0, 50)))


@st.composite
def indexed(draw: st.DrawFn) -> tuple[torch.Tensor, Any]:
    """A tensor, and an index of about as many dimensions."""
    t = draw(tensors().filter(torch.Tensor.dim))
    index = draw(st.lists(_SLICES | _NUMBERS | _INDICES, min_size=1, max_size=t.dim()))
    return t, index[0] if draw(st.booleans()) else tuple(index)


def layout_of(t: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(t.shape), t.stride(), int(t.storage_offset())


@settings(deadline=None, max_examples=examples(800))
@given(tensors(), st.sampled_from(_METHODS), st.data())
def test_a_layout_that_is_worked_out_is_the_one_that_torch_gives(
    t: torch.Tensor, method: Any, data: st.DataObject
) -> None:
    """Whatever the arguments: either torch is left to answer, or sizes, strides and offset are those of its view."""
    args = (t, *data.draw(_ARGUMENTS.get(method, st.just(()))))
    found = LAYOUTS[method](layout_of(t), args)
    if found is None:
        return

    view = method(*args)

    assert layout_of(view) == found
    assert view.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("method", "args", "expected"),
    [
        (torch.Tensor.__getitem__, (2,), ((6,), (1,), 12)),
        (torch.Tensor.__getitem__, ((slice(1, 3), slice(None, None, 2)),), ((2, 3), (6, 2), 6)),
        (torch.Tensor.detach, (), ((4, 6), (6, 1), 0)),
        (torch.Tensor.narrow, (-1, 2, 3), ((4, 3), (6, 1), 2)),
        (torch.Tensor.select, (1, 5), ((4,), (6,), 5)),
        (torch.Tensor.t, (), ((6, 4), (1, 6), 0)),
        (torch.Tensor.transpose, (0, -1), ((6, 4), (1, 6), 0)),
    ],
)
def test_what_loaders_do_is_worked_out(method: Any, args: Sequence[Any], expected: Any) -> None:
    """The plain forms of each view do not need torch."""
    t = torch.zeros(4, 6)

    assert expected == LAYOUTS[method](layout_of(t), (t, *args))


@settings(deadline=None, max_examples=examples(800))
@given(indexed())
def test_an_item_that_is_worked_out_is_the_one_that_torch_gives(found: tuple[torch.Tensor, Any]) -> None:
    """As above, for all kinds of indices."""
    t, index = found
    layout = LAYOUTS[torch.Tensor.__getitem__](layout_of(t), found)
    if layout is None:
        return

    assert layout_of(t[index]) == layout


@settings(deadline=None, max_examples=examples(400))
@given(indexed())
@example((torch.zeros(3, 3), ((0, 1),)))
def test_a_plain_index_looks_and_copies_nothing(found: tuple[torch.Tensor, Any]) -> None:
    """Indices that pass for plain give views of the same memory, or an error, whatever they are."""
    t, index = found
    if not is_plain_index(index):
        return

    try:
        part = t[index]
    except (IndexError, ValueError, TypeError):
        return

    assert part.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()
