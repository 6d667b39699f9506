"""What JSON allows and we do not: a key that stands twice in one object, of which parsers keep any one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["repeated_key"]


def repeated_key(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """The first key that stands in ``pairs`` a second time, or None."""
    seen = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return None
