"""The format of lists, byte ranges and hints in messages."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["byte_range", "listed", "with_hint"]

#: Number of names that a message lists; it counts the others.
_LISTED = 8


def listed(names: Collection[str], *, most: int = _LISTED, separator: str = ", ") -> str:
    """``names``, or the first ``most`` of them and the number of the others: ``"a, b and 3 more"``."""
    shown = separator.join(list(names)[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def byte_range(offset: int, length: int) -> str:
    """The range of ``length`` bytes from ``offset``, with the last byte included, as in HTTP: ``"bytes 0-99"``."""
    return f"bytes {offset}-{offset + length - 1}"


def with_hint(message: str, hint: str | None) -> str:
    """``message`` and the next step, if there is one, on one line."""
    return f"{message}; {hint}" if hint else message
