"""What an operation does to its arguments, as its schema says: looks at them anew, reads them, writes them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from attrs import frozen

__all__ = ["Operation", "operation"]

#: Operations that only ask a tensor for its shape, dtype and layout.
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

#: Views whose values are not the bytes that they look at.
_VALUE_VIEWS = frozenset({"aten::_conj", "aten::_neg_view"})


@frozen
class Operation:
    """What core needs to know of an operation.

    Attributes:
        name: For the report: ``"aten.mul"``.
        view: It returns another look at its input and writes nothing. Some do so only where they can, and copy
            otherwise (``reshape``): whoever relies on it checks the result.
        value_view: It returns a view whose values are not the bytes that it looks at.
        reshapes_in_place: It changes size or strides of its argument (``t_``).
        shape_only: It reads no element.
        composite: It is made of other operations, and torch can take it apart.
        written: Positions of the arguments that it writes.
        written_names: Names of those that can be given by name.
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
    schema = func._schema  # the only place that says it
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
        composite=torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
        written=frozenset(position for position, _ in written),
        written_names=frozenset(name for _, name in written),
    )
