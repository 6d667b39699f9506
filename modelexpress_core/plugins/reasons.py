"""The reason why a plugin fails, on one line."""

from __future__ import annotations

from modelexpress_core.errors import ModelExpressError
from modelexpress_core.messages import with_hint

__all__ = ["reason_of"]


def reason_of(exc: BaseException) -> str:
    """The message of ``exc`` on one line: with the next step if the error is ours, else with its class."""
    text = str(exc).strip().split("\n")[0]
    if isinstance(exc, ModelExpressError):
        return with_hint(text, exc.hint)
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__
