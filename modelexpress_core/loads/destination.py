"""What a load writes to, and whether another candidate may still follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from modelexpress_core.errors import ModelExpressError

if TYPE_CHECKING:
    import torch

    from modelexpress_core.checkpoint import Checkpoint
    from modelexpress_core.fetch import FetchEngine
    from modelexpress_core.placement import Recorder
    from modelexpress_core.report import LoadReport

__all__ = ["Destination", "DestinationTouchedError"]


class DestinationTouchedError(ModelExpressError):
    """A load failed after it began to write, and its destination cannot be made anew here: its owner has to."""


class Destination:
    """What a load writes to: *untouched* until a load may have written to it, *touched* from then on.

    While it is untouched, the next candidate can be tried after a failure. A touched one has to be made anew first.
    Subclasses say what is written and how it is checked; the base is for owners that write on their own.

    Args:
        renew: Makes the memory anew, so that nothing of a failed load is left; None if that is not possible here.

    Attributes:
        touched: Whether anything may have been written.
    """

    def __init__(self, renew: Callable[[], None] | None = None) -> None:
        self.touched = False
        self._renew = renew

    def touch(self) -> None:
        """From now on, something may be written."""
        self.touched = True

    def prepare_for_next(self) -> None:
        """Make the destination ready for the next candidate: a touched one is made anew.

        Raises:
            DestinationTouchedError: It is touched, and cannot be made anew.
        """
        if not self.touched:
            return
        if self._renew is None:
            message = "the load failed after it began to write, and its destination cannot be used for another"
            raise DestinationTouchedError(message, hint="make the model anew, and load into that")
        self._renew()
        self.touched = False

    # -- loads of checkpoints -----------------------------------------------------------------------------------------

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Raise unless ``checkpoint`` fits; called before a byte is moved."""

    def new_recorder(self, checkpoint: Checkpoint, engine: FetchEngine) -> Recorder:
        """What records the copies from ``checkpoint`` to this destination."""
        from modelexpress_core.placement import Recorder

        return Recorder(checkpoint, engine)

    def copy_from(self, checkpoint: Checkpoint, recorder: Recorder) -> None:
        """Record the copy of each tensor of ``checkpoint`` that is wanted; not where code records copies by itself."""

    # -- loads from peers ---------------------------------------------------------------------------------------------

    def run_time_tensors(self) -> Mapping[str, torch.Tensor] | None:
        """The tensors as the engine uses them, which a peer may hold, too; None if only a checkpoint will do."""
        return None

    # -- the end ------------------------------------------------------------------------------------------------------

    def complete(self, report: LoadReport) -> None:
        """Called when every byte is in place: raise if anything is missing, else make the result the owner's."""
