"""What one step of a diagnosis found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
from attrs import field, frozen

__all__ = ["STEPS", "Step", "can_load"]

#: Every step, in the order in which they are taken; each is reported, be it as skipped.
STEPS = (
    "settings",
    "uri",
    "plugin",
    "name",
    "connection",
    "tls",
    "clock",
    "credentials",
    "listing",
    "read",
    "checkpoint",
)


@frozen
class Step:
    """One step of a diagnosis.

    Attributes:
        name: One of ``STEPS``.
        status: ``"ok"``, ``"noted"`` (a load can do with it, but somebody should know), ``"failed"`` or ``"skipped"``.
        seen: What was seen, what went wrong, or why the step was skipped; for people, without secrets.
        milliseconds: How long it took.
        facts: What was seen, for scripts: numbers, texts, lists and mappings of them.
        cause: The likely cause of a failure.
        hint: What to do next.
        error: Name of the error's class; empty where there was none.
    """

    name: str = field(validator=attrs.validators.in_(STEPS))
    status: str = field(validator=attrs.validators.in_(("ok", "noted", "failed", "skipped")))
    seen: str
    milliseconds: float = 0.0
    facts: Mapping[str, Any] = field(factory=dict, hash=False)
    cause: str | None = None
    hint: str | None = None
    error: str = ""


def can_load(steps: Iterable[Step]) -> bool:
    """Whether the last step was reached and nothing was wrong with it: then a load can succeed, whatever else failed.

    A storage may have ways that were not seen, such as a proxy or authorities of its own.
    """
    return any(step.name == STEPS[-1] and step.status == "ok" for step in steps)
