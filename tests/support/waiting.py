"""Waiting for what has to come true, however slow the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["eventually"]

_T = TypeVar("_T")


def eventually(condition: Callable[[], _T], seconds: float = 60.0) -> _T:
    """The first value of ``condition`` that is true; what it was last, where none is true in ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value
