"""Sizes and strides: how few dimensions describe the same elements, and how far they reach. All in elements."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["collapse_dims", "contiguous_strides", "extent", "extent_of", "once", "repeats_elements"]


def collapse_dims(sizes: Sequence[int], strides: Sequence[int], other: Sequence[int]) -> list[tuple[int, int, int]]:
    """The same elements in as few dimensions as possible, by falling ``strides``.

    Args:
        sizes: Sizes of the dimensions.
        strides: Strides of the same dimensions.
        other: Their strides in a second tensor of the same sizes; two dimensions become one only if they can in
            both. The same as ``strides`` for one tensor.

    Returns:
        ``(size, stride, other stride)``; dimensions of size 1 are left out.
    """
    dims = [dim for dim in zip(sizes, strides, other, strict=True) if dim[0] != 1]
    if len(dims) > 1:
        dims.sort(key=_stride_of, reverse=True)
    collapsed: list[tuple[int, int, int]] = []
    for size, stride, other_stride in dims:
        if collapsed:
            outer_size, outer_stride, outer_other = collapsed[-1]
            if outer_stride == size * stride and outer_other == size * other_stride:
                collapsed[-1] = (outer_size * size, stride, other_stride)
                continue
        collapsed.append((size, stride, other_stride))
    return collapsed


def _stride_of(dim: tuple[int, int, int]) -> int:
    return dim[1]


def contiguous_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor; a dimension of size 0 counts as one of size 1, as in torch."""
    step = 1
    strides = []
    for size in reversed(sizes):
        strides.append(step)
        step *= size or 1
    return tuple(strides[::-1])


def extent(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last, both included, of a tensor that has any."""
    return sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1


def extent_of(dims: Sequence[tuple[int, int, int]]) -> int:
    """The same for dimensions as ``collapse_dims`` returns them."""
    return sum((size - 1) * stride for size, stride, _ in dims) + 1


def repeats_elements(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a dimension repeats the same elements, as after ``expand``."""
    return 0 in strides and any(not stride and size > 1 for size, stride in zip(sizes, strides, strict=True))


def once(sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Sizes with which each element that dimensions repeat appears once."""
    return [size if stride else min(size, 1) for size, stride in zip(sizes, strides, strict=True)]
