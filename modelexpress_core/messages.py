"""How messages give lists, byte ranges and hints: one way each."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["byte_range", "listed", "with_hint"]

#: Names that a message lists before it says how many more there are.
_LISTED = 8


def listed(names: Collection[str], *, most: int = _LISTED, separator: str = ", ") -> str:
    """``names``, but no more than ``most`` of them: ``"a, b and 3 more"``."""
    shown = separator.join(list(names)[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def byte_range(offset: int, length: int) -> str:
    """``length`` bytes from ``offset`` on, with the last one included as in HTTP: ``"bytes 0-99"``."""
    return f"bytes {offset}-{offset + length - 1}"


def with_hint(message: str, hint: str | None) -> str:
    """``message`` and the next step, if there is one, on one line."""
    return f"{message}; {hint}" if hint else message
