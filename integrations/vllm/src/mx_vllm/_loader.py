"""vLLM's model loader for the formats ``mx`` and ``modelexpress``."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

import modelexpress_core as mx
from modelexpress_core.errors import IncompleteLoadError, ModelExpressError, PlacementError
from modelexpress_core.loads.destination import Destination, DestinationTouchedError
from modelexpress_core.settings import from_env
from mx_vllm._vllm import (
    Source,
    any_rank,
    forgotten_layers,
    is_first_rank,
    must_be_loaded,
    own_loader,
    own_weights,
    safetensors_of,
    share_log_handlers,
    sources_of,
)
from mx_vllm._watch import LoadWatch
from mx_vllm.settings import VllmSettings

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.load import LoadConfig

__all__ = ["MxModelLoader"]

# A child of vLLM's logger, so that vLLM's log settings apply.
_log = logging.getLogger("vllm.modelexpress")


class MxModelLoader(BaseModelLoader):
    """Reads weights through ModelExpress, from MX_MODEL_URI or from the files that vLLM finds.

    The model gets the weights as deferred tensors. Only the parts that it copies are read, straight into its
    parameters, so that each rank reads only its own bytes.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        if load_config.model_loader_extra_config:
            message = (
                f"--load-format mx takes no model_loader_extra_config, got {load_config.model_loader_extra_config}"
            )
            raise ValueError(message)
        self._settings = from_env(VllmSettings, os.environ)
        self._own = own_loader(load_config)
        self._is_draft_model = False
        self._may_fall_back = False
        self._destination = Destination()
        self._reason = ""

    def download_model(self, model_config: ModelConfig) -> None:
        """Download the files, unless MX_MODEL_URI is set."""
        if self._settings.model_uri is None:
            self._own.download_model(model_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Return the model with its weights. If ModelExpress fails on any rank, vLLM's own loader may load all ranks.

        MX_FALLBACK says whether it may; by default it may not if MX_MODEL_URI is set, since its weights may be others.
        There is no fallback for a draft model on several ranks.

        Raises:
            ModelExpressError: The weights cannot be read, and there is no fallback.
        """
        # A draft model of speculative decoding has separate files, and not every rank loads it.
        self._is_draft_model = model_config is not vllm_config.model_config
        ranks_agree = not self._is_draft_model or vllm_config.parallel_config.world_size == 1
        self._may_fall_back = ranks_agree and self._is_fallback_allowed()
        with forgotten_layers(vllm_config) as forget:
            try:
                model: nn.Module = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            except DestinationTouchedError:
                pass
            else:
                return model
            finally:
                self._may_fall_back = False
            # The half-written model was freed with the traceback that referred to it.
            forget()
        with self._both_reasons(model_config):
            own: nn.Module = self._own.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        return own

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Load the weights into an existing model.

        Raises:
            ModelExpressError: The weights cannot be read, or leave a parameter unwritten.
        """
        if not self._may_fall_back:
            self._load(model, model_config)
            return
        self._reason = ""
        try:
            self._load(model, model_config)
        except Exception as exc:  # noqa: BLE001 - after any error, vLLM's own loader may succeed
            self._reason = str(exc) if isinstance(exc, ModelExpressError) else f"{type(exc).__name__}: {exc}"
        # All ranks must use the same source and the same steps.
        failed, touched = any_rank([bool(self._reason), self._destination.touched])
        if not failed:
            return
        self._warn_of_failure(touched=touched)
        if touched:
            self._destination.touch()  # also if only another rank's was touched: all ranks create their models again
        self._destination.prepare_for_next()
        with self._both_reasons(model_config):
            self._own.load_weights(model, model_config)

    def _is_fallback_allowed(self) -> bool:
        # MX_MODEL_URI is not the address of a draft model.
        return self._settings.may_fall_back or (self._is_draft_model and self._settings.fallback is None)

    def _load(self, model: nn.Module, model_config: ModelConfig) -> None:
        self._destination = Destination()
        sources = sources_of(model, model_config)
        # With several checkpoints, each may lack tensors; a single one must hold all of them.
        quantized = model_config.quantization is not None
        required = must_be_loaded(model, quantized=quantized) if len(sources) == 1 else None
        share_log_handlers(logging.getLogger("modelexpress_core"))
        plugins = mx.PluginManager.discover()
        watch = LoadWatch(_log, model_config.model, first_rank=is_first_rank(), bar=self.load_config.use_tqdm_on_load)
        plugins.register(watch, name="mx-vllm-watch")
        blocks: list[mx.DeferredWeights] = []
        weights: list[Iterable[tuple[str, torch.Tensor]]] = []
        with contextlib.ExitStack() as stack:
            for source in sources:
                uri = self._uri_of(source, watch)
                if uri is None:
                    _log.info("vLLM reads the weights itself, because its files are not a safetensors checkpoint")
                    weights.append(own_weights(self._own, source))
                    continue
                block = stack.enter_context(mx.deferred_weights(uri, model=required, plugins=plugins))
                blocks.append(block)
                weights.append(_prefixed(source.prefix, block))
            self._destination.touch()
            try:
                load: Any = model.load_weights
                load(itertools.chain.from_iterable(weights))
            except (KeyError, ValueError, AssertionError, IndexError) as exc:
                uris = ", ".join(str(block.checkpoint.uri) for block in blocks)
                raise PlacementError(
                    f"the code of {type(model).__name__} cannot load {uris}: {type(exc).__name__}: {exc}",
                    cause="the checkpoint belongs to another model",
                    hint="compare MX_MODEL_URI with --model; `mx inspect` lists the names",
                ) from exc

    def _uri_of(self, source: Source, watch: LoadWatch) -> str | None:
        """Return the URI or path to read ``source`` from; None if vLLM must read it."""
        if source.primary and self._settings.model_uri is not None and not self._is_draft_model:
            watch.why = "MX_MODEL_URI names it"
            return self._settings.model_uri
        watch.why = "vLLM found it for its model" + (" and MX_MODEL_URI is not set" if source.primary else "")
        return safetensors_of(self._own, source)

    def _warn_of_failure(self, *, touched: bool) -> None:
        into = "a new model" if touched else "the model, which is still unchanged"
        if self._reason:
            _log.warning(
                "ModelExpress could not load the weights, so vLLM's own loader loads them into %s "
                "(MX_FALLBACK=0 prevents this): %s",
                into,
                self._reason,
            )
        else:
            self._reason = "another rank could not load its weights; its log says why"
            _log.warning("ModelExpress could not load the weights of another rank, so vLLM's own loader loads all")

    @contextlib.contextmanager
    def _both_reasons(self, model_config: ModelConfig) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            message = f"neither ModelExpress nor vLLM's own loader can load {model_config.model}: {self._reason}"
            cause = f"the error of vLLM's loader is: {exc}"
            hint = "fix the first error; MX_FALLBACK=0 shows it alone"
            raise IncompleteLoadError(message, cause=cause, hint=hint) from exc


def _prefixed(prefix: str, weights: mx.DeferredWeights) -> Iterator[tuple[str, torch.Tensor]]:
    return ((prefix + name, tensor) for name, tensor in weights)
