"""Who calls, and whether they may."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["caller"]

#: Who makes the call that is being answered; empty where nobody has to prove who they are.
caller: ContextVar[str] = ContextVar("caller", default="")
