"""How long the caller of the present call still waits."""

from __future__ import annotations

import time
from contextvars import ContextVar

__all__ = ["begin_call", "time_out"]

#: Share of the caller's deadline that one step of its call may take: the caller gets the error before its own deadline.
_SHARE = 0.6

#: The deadline of the present call on the monotonic clock; None without a deadline, or outside of calls.
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def begin_call(seconds: float | None) -> None:
    """Note that the caller of the present call waits for ``seconds``; None: for as long as it takes."""
    _deadline.set(None if seconds is None else time.monotonic() + seconds)


def time_out(most_seconds: float) -> float:
    """Seconds that one step of the present call may take: ``most_seconds``, or less if its caller waits no longer."""
    deadline = _deadline.get()
    return most_seconds if deadline is None else min(most_seconds, max(0.0, _SHARE * (deadline - time.monotonic())))
