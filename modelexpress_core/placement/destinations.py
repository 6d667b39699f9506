"""The tensors of a model that a checkpoint is loaded into, and whether the two fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from modelexpress_core.checkpoint import Checkpoint
from modelexpress_core.errors import IncompleteLoadError, PlacementError
from modelexpress_core.messages import listed
from modelexpress_core.placement.dtypes import torch_dtype, torch_shape
from modelexpress_core.placement.memory import Region, has_memory, region_of
from modelexpress_core.placement.strides import repeats_elements
from modelexpress_core.placement.torch_private import module_tables
from modelexpress_core.resources import allocating

__all__ = ["Destinations"]


class Destinations:
    """Where each tensor of a checkpoint goes.

    Parameters and buffers of a module that are on the meta device get memory here. The module gets them in ``adopt``:
    a load that fails leaves the module as it was.

    Args:
        target: A module (its parameters and persistent buffers), or tensors by name.
        device: The device on which tensors of the meta device get memory.
    """

    def __init__(self, target: nn.Module | Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._adopt: list[Callable[[], None]] = []
        if isinstance(target, nn.Module):
            with allocating(f"the parameters of {type(target).__name__} on {device}"):
                self.tensors = self._of_module(target, device)
        else:
            if not isinstance(target, Mapping) or not all(torch.is_tensor(tensor) for tensor in target.values()):
                message = f"cannot load into {type(target).__name__}"
                raise PlacementError(message, hint="pass a torch.nn.Module, or a mapping of names to torch tensors")
            self.tensors = dict(target)
        meta = [name for name, tensor in self.tensors.items() if tensor.is_meta]
        if meta:
            raise PlacementError(
                f"destinations on the meta device, which has no memory: {listed(meta)}",
                tensor=meta[0],
                hint="allocate them with torch.empty_like(tensor, device=...), or pass the module itself",
            )

    def _of_module(self, module: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
        made: dict[int, torch.Tensor] = {}
        for owner in module.modules():
            for table in module_tables(owner):
                for name, tensor in table.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    new = made.get(id(tensor))
                    if new is None:
                        new = made[id(tensor)] = _with_memory(tensor, device)
                    self._adopt.append(_setter(table, name, new))
        state = module.state_dict(keep_vars=True)
        tensors = {name: made.get(id(tensor), tensor) for name, tensor in state.items() if torch.is_tensor(tensor)}
        reached = {id(tensor) for tensor in tensors.values()}
        own = (*module.named_parameters(), *module.named_buffers())
        lost = [name for name, tensor in own if tensor.is_meta and id(made[id(tensor)]) not in reached]
        if lost:
            raise IncompleteLoadError(
                f"parameters and buffers that no checkpoint holds are on the meta device: {listed(lost)}",
                missing=lost,
                cause="the module was built on the meta device, and computes these itself",
                hint="build it on a real device, or recompute them before the load",
            )
        return tensors

    def adopt(self) -> None:
        """Replace the module's tensors on the meta device by those that were loaded."""
        for assign in self._adopt:
            assign()

    def check(self, checkpoint: Checkpoint, *, strict: bool, cast: bool) -> None:
        """Raise unless every destination can be written from the checkpoint.

        Raises:
            IncompleteLoadError: A destination has no tensor, or (``strict``) a tensor has no destination.
            PlacementError: A shape differs, or (without ``cast``) a dtype.
        """
        missing = self._missing(checkpoint)
        unexpected = [name for name in checkpoint.tensors if name not in self.tensors]
        if missing or (unexpected and strict):
            parts = []
            if missing:
                parts.append(f"{len(missing)} tensors are not in the checkpoint: {listed(missing)}")
            if unexpected and strict:
                parts.append(f"{len(unexpected)} tensors have no destination: {listed(unexpected)}")
            raise IncompleteLoadError(
                f"{checkpoint.uri} does not fit the destination: {'; '.join(parts)}",
                missing=missing,
                unexpected=unexpected,
                cause="it is the checkpoint of another model, or its names have another prefix",
                hint="compare with `mx inspect`" if missing else "pass strict=False to leave those out",
            )
        self._check_fit(checkpoint, cast=cast)
        self._check_memory()

    def _check_memory(self) -> None:
        """Refuse destinations that share memory in part, with others or themselves: one copy would undo another."""
        regions = []
        for name, tensor in self.tensors.items():
            if tensor.layout is not torch.strided:
                message = f"the destination {name} is a {tensor.layout} tensor; only strided ones have plain memory"
                raise PlacementError(message, tensor=name, hint="load into a strided tensor and convert it")
            if repeats_elements(tensor.shape, tensor.stride()):
                message = f"elements of the destination {name} share memory: it was made with expand()"
                raise PlacementError(message, tensor=name, hint="clone() it")
            region = region_of(tensor) if has_memory(tensor) else None
            if region is not None:
                regions.append((region, name))
        regions.sort(key=lambda entry: (entry[0].start, entry[0].end))
        reaching: list[tuple[Region, str]] = []
        for region, name in regions:
            reaching = [entry for entry in reaching if entry[0].end > region.start]
            for other, other_name in reaching:
                tied = _memory(self.tensors[name]) == _memory(self.tensors[other_name])
                if not tied and region.overlaps(other):
                    message = f"the destinations {other_name} and {name} share a part of their memory"
                    raise PlacementError(
                        message, tensor=name, hint="give each its own memory, or let them share all of it"
                    )
            reaching.append((region, name))

    def _missing(self, checkpoint: Checkpoint) -> list[str]:
        """Destinations without a tensor in the checkpoint, unless they share all their memory with one that has one."""
        written = {
            _memory(tensor) for name, tensor in self.tensors.items() if name in checkpoint.tensors and tensor.numel()
        }
        return [
            name
            for name, tensor in self.tensors.items()
            if name not in checkpoint.tensors and not (tensor.numel() and _memory(tensor) in written)
        ]

    def _check_fit(self, checkpoint: Checkpoint, *, cast: bool) -> None:
        shapes, dtypes = [], []
        for name, tensor in self.tensors.items():
            info = checkpoint.tensors.get(name)
            if info is None:
                continue
            if torch_shape(info) != tuple(tensor.shape):
                shapes.append(f"{name} is {list(info.shape)} in {info.file.name} and {list(tensor.shape)} here")
            elif torch_dtype(info) != tensor.dtype and not cast:
                dtypes.append(f"{name} is {info.dtype} in {info.file.name} and {tensor.dtype} here")
        if shapes:
            raise PlacementError(
                f"{len(shapes)} tensors have another shape: {listed(shapes, separator='; ')}",
                tensor=shapes[0].split(" is ")[0],
                cause="it is the checkpoint of another model, or of another size of it",
                hint="compare with `mx inspect`",
            )
        if dtypes:
            raise PlacementError(
                f"{len(dtypes)} tensors have another dtype: {listed(dtypes, separator='; ')}",
                tensor=dtypes[0].split(" is ")[0],
                hint="pass cast=True to convert, or make the destination in the checkpoint's dtype",
            )


def _memory(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _with_memory(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    memory = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(memory.detach(), requires_grad=tensor.requires_grad)
    return memory


def _setter(table: dict[str, Any], name: str, tensor: torch.Tensor) -> Callable[[], None]:
    return lambda: table.__setitem__(name, tensor)
