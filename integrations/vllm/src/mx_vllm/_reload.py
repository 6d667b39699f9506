"""Reloading a model in place: what vLLM's ``reload_weights`` needs, and what it does not check itself.

vLLM asks the loader for the weights, moves the model to the meta device, calls ``model.load_weights`` with what it got,
processes each layer as soon as all of its weights are there, and copies the result into the memory of the model. Layers
of which weights are missing keep what was there, or get memory that nothing has written. vLLM logs a warning at most.

So the loader returns a placeholder, and replaces ``load_weights`` of the model for one call: the weights are read,
counted and processed in this call. A model whose reload has not succeeded refuses to run.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import nn

from modelexpress_core.errors import IncompleteLoadError, ModelExpressError, PlacementError
from modelexpress_core.messages import listed
from modelexpress_core.placement.observed_writes import ObservedWrites

__all__ = [
    "PendingWeights",
    "allow_to_run",
    "check_shared",
    "fully_written",
    "in_layer_order",
    "intercept_load_weights",
    "refuse_to_run",
    "shared_names",
]

#: Removes the refusals of the models that refuse to run.
_refusing: WeakKeyDictionary[nn.Module, contextlib.ExitStack] = WeakKeyDictionary()


class PendingWeights:
    """Stands for weights that are read when the model's ``load_weights`` gets it."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        message = "ModelExpress reloads weights through the model's load_weights, and other code iterates over them"
        cause = (
            "reload_weights was called with is_checkpoint_format=False, but checkpoints are not in the kernels' format"
        )
        raise PlacementError(message, cause=cause, hint="call reload_weights without is_checkpoint_format")


def intercept_load_weights(
    model: nn.Module, pending: PendingWeights, load: Callable[[Callable[..., Any]], Any]
) -> None:
    """Replace ``model.load_weights`` for one call: with ``pending`` it calls ``load`` with the original function."""
    original: Callable[..., Any] = model.load_weights  # type: ignore[assignment]  # the stubs show a tensor or module
    own = vars(model).get("load_weights")

    def load_weights(weights: Any, *args: Any, **kwargs: Any) -> Any:
        if own is None:
            del model.load_weights
        else:
            vars(model)["load_weights"] = own
        return load(original) if weights is pending else original(weights, *args, **kwargs)

    vars(model)["load_weights"] = load_weights


def in_layer_order(weights: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Return ``weights`` so that those of a module follow each other, and layers are in order of number."""
    return sorted(weights, key=lambda weight: _natural(weight[0]))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"\.", name)]


def shared_names(model: nn.Module) -> Mapping[str, frozenset[str]]:
    """Return for each parameter the names of all that share its memory, its own included."""
    names: dict[object, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        memory = (parameter.data_ptr(), parameter.dtype, tuple(parameter.shape)) if parameter.numel() else id(parameter)
        names.setdefault(memory, set()).add(name)
    return {name: frozenset(group) for group in names.values() for name in group}


@contextlib.contextmanager
def fully_written(
    required: Mapping[str, torch.Tensor], shared: Mapping[str, frozenset[str]]
) -> Iterator[ObservedWrites]:
    """A block in which each of the parameters ``required`` must be written, or one that shares its memory.

    Yields:
        The writes, for ``check_shared``.

    Raises:
        IncompleteLoadError: One was not written, or only in part.
    """
    keep = [name for name in required if len(shared.get(name, ())) > 1]
    with ObservedWrites(required, keep) as writes:
        yield writes
    unwritten = set(writes.missing())
    missing = sorted(
        name for name in unwritten if not (shared.get(name, frozenset({name})) & required.keys()) - unwritten
    )
    if missing:
        raise IncompleteLoadError(
            f"{len(missing)} parameters were not completely reloaded: {listed(missing)}",
            missing=missing,
            cause="the checkpoint belongs to another model, or lacks tensors",
            hint="compare the names with `mx inspect`",
        )


def check_shared(model: nn.Module, writes: ObservedWrites, shared: Mapping[str, frozenset[str]]) -> None:
    """Check that parameters which share memory got the same values, if the checkpoint has values for each.

    vLLM lets the embedding and the head of a model share memory if the first checkpoint has the same values for both.

    Raises:
        PlacementError: The values differ, so that one of the parameters has those of the other.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group in {names for names in shared.values() if len(names) > 1}:
        separate = [name for name in sorted(group & writes.kept) if writes.copies_to(name)]
        for name in separate if len(separate) > 1 else ():
            parameter = parameters[name]
            for size, stride, offset, source in writes.copies_to(name):
                part = parameter.detach().as_strided(size, stride, parameter.storage_offset() + offset)
                if not torch.equal(part, source.to(part.device, part.dtype)):
                    message = (
                        f"{', '.join(sorted(group))} share memory, and the checkpoint has different values for them"
                    )
                    cause = "the checkpoint that the model was started with has the same values for them"
                    raise PlacementError(message, tensor=name, cause=cause, hint="restart vLLM with this checkpoint")


def refuse_to_run(model: nn.Module, reason: str) -> None:
    """Let ``model`` raise ``reason`` wherever vLLM would use it, until ``allow_to_run``."""
    allow_to_run(model)

    def refuse(*_: Any, **__: Any) -> NoReturn:
        message = f"the model does not run, because its weights were not completely reloaded: {reason}"
        raise ModelExpressError(message, hint="call reload_weights again, or restart vLLM")

    undo = contextlib.ExitStack()
    undo.callback(model.register_forward_pre_hook(refuse).remove)
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, nn.Module):
        undo.callback(pooler.register_forward_pre_hook(refuse).remove)
    # A replayed CUDA graph calls no hook. What turns its result into tokens is called each time.
    for name in ("compute_logits", "compute_logits_local"):
        if callable(getattr(model, name, None)) and name not in vars(model):
            vars(model)[name] = refuse
            undo.callback(vars(model).pop, name, None)
    _refusing[model] = undo


def allow_to_run(model: nn.Module) -> None:
    """Let ``model`` run."""
    undo = _refusing.pop(model, None)
    if undo is not None:
        undo.close()
