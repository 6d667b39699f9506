"""The destinations of the public functions: new tensors, a model, and deferred tensors that the caller copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from modelexpress_core.checkpoint import Checkpoint
from modelexpress_core.errors import IncompleteLoadError, PlacementError
from modelexpress_core.fetch import FetchEngine
from modelexpress_core.fetch.pages import use_huge_pages
from modelexpress_core.loads.destination import Destination
from modelexpress_core.messages import listed
from modelexpress_core.placement import Recorder
from modelexpress_core.placement.coverage import Coverage
from modelexpress_core.placement.destinations import Destinations
from modelexpress_core.placement.devices import device_with_memory
from modelexpress_core.placement.dtypes import torch_dtype, torch_shape
from modelexpress_core.report import LoadReport
from modelexpress_core.resources import allocating

__all__ = ["DeferredTarget", "NewTensors", "Target"]


class NewTensors(Destination):
    """New tensors with the shapes and dtypes of the checkpoint.

    Args:
        names: Names of the tensors to load; None for all.
        device: Device for the tensors.

    Attributes:
        tensors: The tensors by name.

    Raises:
        PlacementError: torch cannot create tensors on the device.
    """

    def __init__(self, names: Sequence[str] | None, device: str | torch.device) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        super().__init__(renew=self.tensors.clear)
        self._names = names
        self._device = device_with_memory(device)

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Raise unless ``checkpoint`` has every requested tensor."""
        for name in self._names or ():
            if name not in checkpoint.tensors:
                message = f"{checkpoint.uri} has no tensor {name!r}"
                raise PlacementError(message, tensor=name, hint="`mx inspect` lists the tensors that it has")

    def new_recorder(self, checkpoint: Checkpoint, engine: FetchEngine) -> Recorder:
        """Return a recorder for new memory, which no other code uses yet."""
        return Recorder(checkpoint, engine, fresh=True)

    def copy_from(self, checkpoint: Checkpoint, recorder: Recorder) -> None:
        """Allocate each tensor, and record its copy."""
        with allocating(f"the tensors of {checkpoint.uri} on {self._device}"):
            for name in checkpoint.tensors if self._names is None else self._names:
                info = checkpoint.tensors[name]
                tensor = torch.empty(torch_shape(info), dtype=torch_dtype(info), device=self._device)
                self.tensors[name] = tensor
                if self._device.type == "cpu":
                    use_huge_pages(tensor.data_ptr(), tensor.nbytes)
                recorder.copy_whole(info, tensor)


def _keep() -> None:
    """Do nothing: the next load overwrites every tensor that a failed one wrote."""


class Target(Destination):
    """The tensors of a model, or of a mapping.

    Args:
        tensors: The tensors, and the check whether a checkpoint fits them.
        strict: Refuse a checkpoint with tensors that have no destination.
        cast: Convert to the destination's dtype if it differs.
        renew: Initializes the tensors after a failed load; by default does nothing, since the next load writes all of
            them. None if only the owner can.
    """

    def __init__(
        self,
        tensors: Destinations,
        *,
        strict: bool,
        cast: bool,
        renew: Callable[[], None] | None = _keep,
    ) -> None:
        super().__init__(renew)
        self._destinations = tensors
        self._strict = strict
        self._cast = cast

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Raise unless names, shapes and dtypes fit."""
        self._destinations.check(checkpoint, strict=self._strict, cast=self._cast)

    def copy_from(self, checkpoint: Checkpoint, recorder: Recorder) -> None:
        """Record the copy of each tensor that has a destination."""
        for name, info in checkpoint.tensors.items():
            if name in self._destinations.tensors:
                recorder.copy_whole(info, self._destinations.tensors[name])

    def run_time_tensors(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors that are written."""
        return self._destinations.tensors

    def complete(self, report: LoadReport) -> None:  # noqa: ARG002 - signature of the base class
        """Give the model the memory of its tensors that were on the meta device."""
        self._destinations.adopt()


class DeferredTarget(Destination):
    """Any memory that the caller's code copies deferred tensors to. Only the caller can initialize it again.

    Args:
        model: If given, each of its parameters and persistent buffers must be written.
    """

    def __init__(self, model: nn.Module | Mapping[str, torch.Tensor] | None) -> None:
        super().__init__()
        self._coverage = None if model is None else Coverage(_named_tensors(model))

    def new_recorder(self, checkpoint: Checkpoint, engine: FetchEngine) -> Recorder:
        """Return a recorder that also tracks which tensors of the model were written."""
        return Recorder(checkpoint, engine, self._coverage)

    def complete(self, report: LoadReport) -> None:
        """Raise if a tensor of the model was not written, or no tensor of the checkpoint was used."""
        missing = () if self._coverage is None else self._coverage.missing()
        if missing:
            raise IncompleteLoadError(
                f"{len(missing)} tensors of the model were not completely written: {listed(missing)}",
                missing=missing,
                cause="the checkpoint belongs to another model, the loading code skips names that it does not know, or "
                "the model is on the meta device, which has no memory",
                hint="compare the names with `mx inspect`; give a model on the meta device memory with to_empty",
            )
        if not report.tensors and report.tensors_in_checkpoint:
            raise IncompleteLoadError(
                f"no tensor of {report.uri} was used",
                cause="the loading code knows none of its names",
                hint="compare the names with `mx inspect`",
            )


def _named_tensors(model: nn.Module | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    if isinstance(model, Mapping):
        return model
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if torch.is_tensor(tensor)}
