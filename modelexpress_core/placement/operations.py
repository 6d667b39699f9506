"""What an operation does to its arguments, by its schema: returns views of them, reads them, writes them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from attrs import frozen

from modelexpress_core.placement.torch_private import is_composite, schema_of

__all__ = ["Operation", "operation"]

#: Operations that use only shape, dtype and layout of a tensor.
_SHAPE_ONLY = frozenset(
    f"aten::{name}"
    for name in (
        "empty_like",
        "full_like",
        "new_empty",
        "new_empty_strided",
        "new_full",
        "new_ones",
        "new_zeros",
        "ones_like",
        "rand_like",
        "randn_like",
        "zeros_like",
    )
)

#: Views whose values differ from the bytes that they show.
_VALUE_VIEWS = frozenset({"aten::_conj", "aten::_neg_view"})


@frozen
class Operation:
    """What recording has to know about an operation.

    Attributes:
        name: For the report: ``"aten.mul"``.
        view: It returns a view of its input and writes nothing. Some operations copy if no view is possible
            (``reshape``): callers check the result.
        value_view: It returns a view whose values differ from the bytes that it shows.
        reshapes_in_place: It changes size or strides of its argument (``t_``).
        shape_only: It reads no element.
        composite: It is made of other operations, and torch can replace it by them.
        written: Positions of the arguments that it writes.
        written_names: Names of those arguments, for calls that pass them by name.
    """

    name: str
    view: bool
    value_view: bool
    reshapes_in_place: bool
    shape_only: bool
    composite: bool
    written: frozenset[int]
    written_names: frozenset[str]


@cache
def operation(func: Any) -> Operation:
    """What ``func`` does."""
    schema = schema_of(func)
    written = [
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    aliases = [result.alias_info is not None and not result.alias_info.is_write for result in schema.returns]
    return Operation(
        name=schema.name.replace("::", "."),
        view=bool(aliases) and all(aliases) and not written,
        value_view=schema.name in _VALUE_VIEWS,
        reshapes_in_place=torch.Tag.inplace_view in func.tags,
        shape_only=schema.name in _SHAPE_ONLY,
        composite=is_composite(func),
        written=frozenset(position for position, _ in written),
        written_names=frozenset(name for _, name in written),
    )
