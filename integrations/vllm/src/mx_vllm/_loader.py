"""The model loader of vLLM for the formats ``mx`` and ``modelexpress``."""

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
from modelexpress_core.report import LoadReport, format_bytes
from modelexpress_core.settings import from_env
from mx_vllm._vllm import (
    Source,
    forgotten_layers,
    must_be_loaded,
    own_loader,
    own_weights,
    safetensors_folder,
    sources_of,
)
from mx_vllm.settings import VllmSettings

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.load import LoadConfig

__all__ = ["MxModelLoader"]

# A child of vLLM's, so that its settings for logs hold.
_log = logging.getLogger("vllm.modelexpress")


class MxModelLoader(BaseModelLoader):
    """Reads weights through ModelExpress, from MX_MODEL_URI or from the files that vLLM finds.

    Weights are handed to the model as deferred tensors: what it slices and copies is read, straight into its
    parameters, and nothing else, so that each rank reads its own bytes.
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
        self._of_another_model = False

    def download_model(self, model_config: ModelConfig) -> None:
        """Have the files ready, where they are not read from MX_MODEL_URI."""
        if self._settings.model_uri is None:
            self._own.download_model(model_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """The model with its weights. Where ours fail, vLLM's own loader makes it anew.

        Not with MX_FALLBACK=0, and not where the model is spread over several ranks.

        Raises:
            ModelExpressError: The weights cannot be read, and there is no fallback.
        """
        # A draft model of speculative decoding has files of its own.
        self._of_another_model = model_config is not vllm_config.model_config
        with forgotten_layers(vllm_config) as forget:
            try:
                model: nn.Module = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            except Exception as exc:
                # Ranks that decide alone could end up with weights of two places.
                if not self._settings.fallback or vllm_config.parallel_config.world_size > 1:
                    raise
                reason = f"{type(exc).__name__}: {exc}" if not isinstance(exc, ModelExpressError) else str(exc)
            else:
                return model
            # The half-written model has gone with the traceback that held it.
            forget()
        _log.warning(
            "ModelExpress could not load the weights, so vLLM's own loader does, into a new model "
            "(MX_FALLBACK=0 forbids that): %s",
            reason,
        )
        return self._fall_back(vllm_config, model_config, prefix, reason)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Load into a model that exists.

        Raises:
            ModelExpressError: The weights cannot be read, or leave a parameter unwritten.
        """
        sources = sources_of(model, model_config)
        # What a checkpoint lacks may come from another, so only one that is alone has to hold everything.
        quantized = model_config.quantization is not None
        wanted = must_be_loaded(model, quantized=quantized) if len(sources) == 1 else None
        blocks: list[mx.DeferredWeights] = []
        weights: list[Iterable[tuple[str, torch.Tensor]]] = []
        with contextlib.ExitStack() as stack:
            for source in sources:
                uri = self._uri(source)
                if uri is None:  # files of another kind
                    weights.append(own_weights(self._own, source))
                    continue
                block = stack.enter_context(mx.deferred_weights(uri, model=wanted))
                blocks.append(block)
                weights.append(_prefixed(source.prefix, block))
            try:
                load: Any = model.load_weights
                load(itertools.chain.from_iterable(weights))
            except (KeyError, ValueError, AssertionError, IndexError) as exc:
                places = ", ".join(str(block.checkpoint.uri) for block in blocks)
                raise PlacementError(
                    f"the code of {type(model).__name__} cannot load {places}: {type(exc).__name__}: {exc}",
                    cause="it is the checkpoint of another model",
                    hint="compare MX_MODEL_URI with --model; `mx inspect` lists the names",
                ) from exc
        for block in blocks:
            if block.report is not None:
                _log.info("%s", _summary(block.report))

    def _uri(self, source: Source) -> str | None:
        if source.primary and self._settings.model_uri is not None and not self._of_another_model:
            _log.info("ModelExpress reads the weights from MX_MODEL_URI")
            return self._settings.model_uri
        folder = safetensors_folder(self._own, source)
        if folder is None:
            _log.info("ModelExpress leaves the weights to vLLM, which found files of another kind than safetensors")
        else:
            _log.info("ModelExpress reads the weights from %s, which vLLM found", folder)
        return folder

    def _fall_back(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str, reason: str) -> nn.Module:
        try:
            own: nn.Module = self._own.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        except Exception as exc:
            message = f"neither ModelExpress nor vLLM's own loader can load {model_config.model}: {reason}"
            cause = f"and vLLM's loader says: {exc}"
            raise IncompleteLoadError(
                message, cause=cause, hint="mend the first; MX_FALLBACK=0 shows it alone"
            ) from exc
        return own


def _prefixed(prefix: str, weights: mx.DeferredWeights) -> Iterator[tuple[str, torch.Tensor]]:
    return ((prefix + name, tensor) for name, tensor in weights)


def _summary(report: LoadReport) -> str:
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.phase_seconds.items())
    parts = (
        f"{format_bytes(report.bytes_fetched)} fetched ({report.bytes_fetched} bytes)",
        f"{format_bytes(report.bytes_needed)} needed",
        f"{format_bytes(report.bytes_materialised)} materialised",
        f"{format_bytes(report.goodput_bytes_per_second)}/s",
        f"{report.retries} retries",
        f"{report.seconds:.2f} s ({phases})",
    )
    return f"ModelExpress loaded {report.uri}: {', '.join(parts)}"
