"""Declaring settings: fields of frozen attrs classes, each with its variable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
from attrs import frozen

__all__ = ["Variable", "env", "field_names", "fields", "variables"]

_METADATA = "modelexpress.env"


@frozen
class Variable:
    """How a field is read from the environment, and shown.

    Attributes:
        names: The variable, and its aliases in order of precedence.
        help: What the setting does.
        secret: Whether its value is never shown.
        shown: Text for a value that may hold a secret.
        converter: Turns the text into the value.
    """

    names: tuple[str, ...]
    help: str
    secret: bool
    shown: Callable[[Any], str] | None
    converter: Callable[[str], Any] | None

    @property
    def hidden(self) -> bool:
        """Whether messages must not quote the value."""
        return self.secret or self.shown is not None


def env(
    name: str,
    *aliases: str,
    default: object,
    help: str,  # noqa: A002 - the word of attrs, argparse and typer
    converter: Callable[[str], Any] | None = None,
    secret: bool = False,
    shown: Callable[[Any], str] | None = None,
) -> Any:  # noqa: ANN401 - an attrs field stands for a value of any type
    """Declare a field of a settings class, read from the variable ``name`` or the first alias that is set.

    Args:
        name: The variable.
        *aliases: Other variables, in order of precedence after ``name``.
        default: Value if no variable is set. An empty variable counts as not set.
        help: One sentence for the settings reference.
        converter: Turns the text into the value; raises ``ValueError`` with a reason.
        secret: Keep the value out of ``repr``, messages and ``mx settings``.
        shown: Makes the text that ``mx settings`` shows for a value that may hold a secret; it has no ``repr`` either.
    """
    return attrs.field(
        default=default,
        repr=not secret and shown is None,
        metadata={_METADATA: Variable((name, *aliases), help, secret, shown, converter)},
    )


def fields(cls: type) -> Iterator[tuple[attrs.Attribute[Any], Variable]]:
    """The fields of the settings class ``cls`` that are read, in order, with their variables."""
    for attribute in attrs.fields(cls):
        if _METADATA in attribute.metadata:
            yield attribute, attribute.metadata[_METADATA]


def field_names(cls: type) -> tuple[str, ...]:
    """The names of the fields of the settings class ``cls`` that a file may set, in order."""
    return tuple(attribute.name for attribute, _ in fields(cls))


def variables(cls: type) -> tuple[str, ...]:
    """Every variable that the settings class ``cls`` reads, aliases included."""
    return tuple(name for _, variable in fields(cls) for name in variable.names)
