"""What observers are told: one frozen event per call, so that fields can be added without breaking them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from modelexpress_core.report import LoadReport

__all__ = ["LoadFailed", "LoadFinished", "LoadProgress", "LoadStarted"]


@frozen
class LoadStarted:
    """A load begins: the checkpoint is open, no weight byte has moved.

    Attributes:
        load_id: Tells the events of concurrent loads apart.
        uri: Redacted URI of the checkpoint.
        provider: Name of the storage plugin.
        files: Number of checkpoint files.
        tensors: Number of tensors in them.
        checkpoint_bytes: Bytes of all tensors in them.
    """

    load_id: str
    uri: str
    provider: str
    files: int
    tensors: int
    checkpoint_bytes: int


@frozen
class LoadProgress:
    """Some of the planned bytes have arrived; sent a few times a second at most.

    Attributes:
        load_id: Tells the events of concurrent loads apart.
        uri: Redacted URI of the checkpoint.
        bytes_done: Bytes that arrived.
        bytes_planned: Bytes planned so far; grows while the engine still records.
        planning_done: Whether ``bytes_planned`` is final.
        seconds: Since the load began.
        bytes_per_second: Goodput over the last few seconds.
        eta_seconds: Time left at that rate; None while it cannot be said.
        retries: Reads tried again so far.
        limiter: What limits the load now: ``"source"`` (the storage asks for less, or fails), ``"network"`` (or what is
            behind it), ``"cpu"``, ``"destination"`` (copying to where the bytes belong), ``"planning"`` (the code that
            loads); empty while that cannot be said.
    """

    load_id: str
    uri: str
    bytes_done: int
    bytes_planned: int
    planning_done: bool
    seconds: float
    bytes_per_second: float
    eta_seconds: float | None
    retries: int
    limiter: str = ""


@frozen
class LoadFinished:
    """Every planned byte is where it belongs.

    Attributes:
        load_id: Tells the events of concurrent loads apart.
        report: What was done.
    """

    load_id: str
    report: LoadReport


@frozen
class LoadFailed:
    """A load ended with an error.

    Attributes:
        load_id: Tells the events of concurrent loads apart.
        uri: Redacted URI of the checkpoint.
        error: The exception.
        seconds: Since the load began.
    """

    load_id: str
    uri: str
    error: BaseException
    seconds: float
