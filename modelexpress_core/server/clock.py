"""The server's time."""

from __future__ import annotations

import time

__all__ = ["now_ms"]


def now_ms() -> int:
    """Milliseconds since 1970: what answers carry, and the clock by which read grants expire."""
    return time.time_ns() // 1_000_000
