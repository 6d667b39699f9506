"""The destination of a load, and whether another candidate may follow a failure."""

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
    """A load failed after it began to write, and only the owner of the destination can initialize it again."""


class Destination:
    """The destination of a load: *untouched* until a load may have written to it, *touched* from then on.

    An untouched destination is ready for the next candidate after a failure. A touched one must be initialized again
    first. Subclasses define what is written and how it is checked. The base class is for owners that write themselves.

    Args:
        renew: Initializes the memory again, so that nothing of a failed load remains; None if only the owner can.

    Attributes:
        touched: Whether anything may have been written.
    """

    def __init__(self, renew: Callable[[], None] | None = None) -> None:
        self.touched = False
        self._renew = renew

    def touch(self) -> None:
        """Mark the destination as touched: from now on a load may write to it."""
        self.touched = True

    def prepare_for_next(self) -> None:
        """Prepare the destination for the next candidate: initialize it again if it was touched.

        Raises:
            DestinationTouchedError: It is touched, and only its owner can initialize it.
        """
        if not self.touched:
            return
        if self._renew is None:
            message = "the load failed after it began to write, so its destination cannot take another load"
            raise DestinationTouchedError(message, hint="create the model again, and load into the new one")
        self._renew()
        self.touched = False

    # -- loads of checkpoints -----------------------------------------------------------------------------------------

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Raise unless ``checkpoint`` fits; called before a byte moves."""

    def new_recorder(self, checkpoint: Checkpoint, engine: FetchEngine) -> Recorder:
        """Return a recorder for the copies from ``checkpoint`` to this destination."""
        from modelexpress_core.placement import Recorder

        return Recorder(checkpoint, engine)

    def copy_from(self, checkpoint: Checkpoint, recorder: Recorder) -> None:
        """Record the copy of each requested tensor; do nothing if the owner's code makes the copies."""

    # -- loads from peers ---------------------------------------------------------------------------------------------

    def run_time_tensors(self) -> Mapping[str, torch.Tensor] | None:
        """Return the tensors as the engine uses them, which a peer may hold too; None if peers cannot be used."""
        return None

    # -- the end ------------------------------------------------------------------------------------------------------

    def complete(self, report: LoadReport) -> None:
        """Called when every byte is in place: raise if anything is missing, else hand the result to the owner."""
