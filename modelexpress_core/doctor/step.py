"""The result of one step of a diagnosis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
from attrs import field, frozen

__all__ = ["PEER_STEPS", "STEPS", "Step", "can_load"]

#: Every step for a storage, in their order; each has a result, if only that it was skipped.
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

#: Every step for a worker, likewise.
PEER_STEPS = ("settings", "uri", "plugin", "name", "connection", "tls", "worker", "read")


@frozen
class Step:
    """One step of a diagnosis.

    Attributes:
        name: One of ``STEPS`` or ``PEER_STEPS``.
        status: ``"ok"``, ``"noted"`` (no obstacle, but worth knowing), ``"failed"`` or ``"skipped"``.
        seen: What was seen, what went wrong, or why the step was skipped; for people, without secrets.
        milliseconds: Its duration.
        facts: The same for scripts: numbers, texts, lists and mappings of them.
        cause: The likely cause of a failure.
        hint: The next step for the user.
        error: Name of the error's class; empty if there was none.
    """

    name: str = field(validator=attrs.validators.in_({*STEPS, *PEER_STEPS}))
    status: str = field(validator=attrs.validators.in_(("ok", "noted", "failed", "skipped")))
    seen: str
    milliseconds: float = 0.0
    facts: Mapping[str, Any] = field(factory=dict, hash=False)
    cause: str | None = None
    hint: str | None = None
    error: str = ""


def can_load(steps: Iterable[Step]) -> bool:
    """Whether a load can succeed: the headers were read, and so were bytes in the middle of a file, or of a worker.

    Other steps may fail: a storage may have a proxy or authorities of its own, which they do not see.
    """
    status = {step.name: step.status for step in steps}
    if "worker" in status:
        return status["worker"] == status.get("read") == "ok"
    return status.get("checkpoint") == "ok" and status.get("read") != "failed"
