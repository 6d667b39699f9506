"""Stricter than JSON: a key appears once in an object. And how messages show values from JSON."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

__all__ = ["repeated_key", "shown"]

_short = reprlib.Repr()
_short.maxlist = 8
_short.maxstring = 80


def repeated_key(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """The first key that appears twice in ``pairs``, or None. JSON parsers keep any one of the values."""
    if len(dict(pairs)) == len(pairs):  # the usual case, and many times as fast as the loop
        return None
    seen = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError("fewer keys than pairs, so one appears twice")


def shown(value: object) -> str:
    """``value`` for a message, shortened."""
    text = _short.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
