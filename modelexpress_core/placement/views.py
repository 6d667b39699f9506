"""Views that loading code takes of every weight, computed from sizes and strides instead of by torch.

A checkpoint has 100,000 tensors, and the few operations here are almost all that code does to each of them. Only their
plain forms are computed: whole numbers, within bounds, with a result that is not empty. In all other cases the result
is None, and torch does the operation or raises the right error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["LAYOUTS", "Layout", "LayoutOf", "is_plain_index"]

#: Sizes, strides and offset, all in elements, as torch counts them.
Layout = tuple[tuple[int, ...], tuple[int, ...], int]

#: Takes the layout of a tensor and the arguments of a method, of which the tensor is the first.
LayoutOf = Callable[[Layout, Sequence[Any]], Layout | None]


def _same(layout: Layout, args: Sequence[Any]) -> Layout | None:
    return layout if len(args) == 1 else None


def _narrow(layout: Layout, args: Sequence[Any]) -> Layout | None:
    if len(args) != 4:
        return None
    _, dim, start, length = args
    if not (type(dim) is type(start) is type(length) is int):
        return None
    sizes, strides, offset = layout
    dim += len(sizes) if dim < 0 else 0
    if not (0 <= dim < len(sizes) and start >= 0 and 0 < length <= sizes[dim] - start):
        return None
    return (*sizes[:dim], length, *sizes[dim + 1 :]), strides, offset + start * strides[dim]


def _select(layout: Layout, args: Sequence[Any]) -> Layout | None:
    if len(args) != 3:
        return None
    _, dim, index = args
    if not (type(dim) is type(index) is int):
        return None
    sizes, strides, offset = layout
    dim += len(sizes) if dim < 0 else 0
    if not (0 <= dim < len(sizes) and 0 <= index < sizes[dim]):
        return None
    after = dim + 1
    return sizes[:dim] + sizes[after:], strides[:dim] + strides[after:], offset + index * strides[dim]


def _item(layout: Layout, args: Sequence[Any]) -> Layout | None:
    _, index = args
    sizes, strides, offset = layout
    parts = index if type(index) is tuple else (index,)
    if not parts or len(parts) > len(sizes) or not is_plain_index(index):
        return None
    left_sizes, left_strides = [], []
    for part, size, stride in zip(parts, sizes, strides, strict=False):
        if type(part) is int:
            if not 0 <= part < size:
                return None
            offset += part * stride
        elif type(part) is slice:
            start, stop, step = part.indices(size)
            if start >= stop:
                return None
            offset += start * stride
            left_sizes.append((stop - start + step - 1) // step)
            left_strides.append(stride * step)
        else:
            return None
    done = len(parts)
    return (*left_sizes, *sizes[done:]), (*left_strides, *strides[done:]), offset


def _transpose(layout: Layout, args: Sequence[Any]) -> Layout | None:
    if len(args) != 3:
        return None
    _, first, second = args
    if not (type(first) is type(second) is int):
        return None
    sizes, strides, offset = layout
    first += len(sizes) if first < 0 else 0
    second += len(sizes) if second < 0 else 0
    if not (0 <= first < len(sizes) and 0 <= second < len(sizes)):
        return None
    order = list(range(len(sizes)))
    order[first], order[second] = second, first
    return tuple(sizes[dim] for dim in order), tuple(strides[dim] for dim in order), offset


def _t(layout: Layout, args: Sequence[Any]) -> Layout | None:
    sizes, strides, offset = layout
    return (sizes[::-1], strides[::-1], offset) if len(args) == 1 and len(sizes) == 2 else None


#: Methods that return views, as torch passes them to a function mode -> the layout of the result.
LAYOUTS: Mapping[Any, LayoutOf] = {
    torch.Tensor.__getitem__: _item,
    torch.Tensor.data.__get__: _same,  # type: ignore[attr-defined]  # the stubs show its value's type
    torch.Tensor.detach: _same,
    torch.Tensor.narrow: _narrow,
    torch.Tensor.select: _select,
    torch.Tensor.t: _t,
    torch.Tensor.transpose: _transpose,
}


def is_plain_index(index: Any) -> bool:
    """Whether ``tensor[index]`` is a view, known from ``index`` without reading a tensor."""
    kind = type(index)
    if kind is tuple:
        return all(type(part) is not tuple and is_plain_index(part) for part in index)
    if kind is slice:
        start, stop, step = index.start, index.stop, index.step
        bounds = (start is None or type(start) is int) and (stop is None or type(stop) is int)
        return bounds and (step is None or (type(step) is int and step > 0))
    return kind is int or index is None or index is Ellipsis
