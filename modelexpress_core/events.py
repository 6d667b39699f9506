"""The events that observe hooks get: frozen objects, to which fields can be added without breaking plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from modelexpress_core.report import LoadReport

__all__ = ["LoadFailed", "LoadFinished", "LoadProgress", "LoadStarted"]


@frozen
class LoadStarted:
    """A load begins: the checkpoint is open, and no weight has been fetched.

    Attributes:
        load_id: Identifies the load among concurrent ones.
        uri: Redacted URI of the checkpoint.
        provider: Name of the storage plugin.
        files: Number of checkpoint files.
        tensors: Number of tensors in them.
        checkpoint_bytes: Bytes of these tensors.
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
        load_id: Identifies the load among concurrent ones.
        uri: Redacted URI of the checkpoint.
        bytes_done: Bytes that arrived.
        bytes_planned: Bytes planned so far; grows while copies are still recorded.
        planning_done: Whether ``bytes_planned`` is final.
        seconds: Time since the load began.
        bytes_per_second: Goodput of the last few seconds.
        eta_seconds: Time left at that rate; None while it is unknown.
        retries: Number of reads that were retried so far.
        limiter: What limits the load now: ``"source"`` (the storage throttles or fails), ``"network"`` (the network, or
            the disk or server behind it), ``"cpu"``, ``"destination"`` (copies to the destination), ``"planning"`` (the
            code that loads); empty while it is unknown.
        sources: Workers that have delivered bytes so far; 0 for a checkpoint.
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
    sources: int = 0


@frozen
class LoadFinished:
    """A load has ended well: every planned byte is in place and verified.

    Attributes:
        load_id: Identifies the load among concurrent ones.
        report: Figures of the load.
    """

    load_id: str
    report: LoadReport


@frozen
class LoadFailed:
    """A load has failed.

    Attributes:
        load_id: Identifies the load among concurrent ones.
        uri: Redacted URI of the checkpoint.
        error: The exception.
        seconds: Time since the load began.
    """

    load_id: str
    uri: str
    error: BaseException
    seconds: float
