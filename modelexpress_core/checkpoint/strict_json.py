"""What JSON allows and we do not, a key that stands twice in one object, and how messages show what was found."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

__all__ = ["repeated_key", "shown"]

_short = reprlib.Repr()
_short.maxlist = 8
_short.maxstring = 80


def repeated_key(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """The first key that stands in ``pairs`` a second time, or None; parsers of JSON keep any one of them."""
    if len(dict(pairs)) == len(pairs):  # the rule, and many times faster than looking at each
        return None
    seen = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError("fewer keys than pairs, so one stands twice")


def shown(value: object) -> str:
    """``value`` as a message gives it: short, however long it is."""
    text = _short.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
