"""The model loader of vLLM for the formats ``mx`` and ``modelexpress``."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

import modelexpress_core as mx
from modelexpress_core.errors import IncompleteLoadError, ModelExpressError, PlacementError
from modelexpress_core.report import LoadReport, format_bytes
from modelexpress_core.settings import from_env
from mx_vllm._vllm import Source, forgotten_layers, must_be_loaded, own_loader, safetensors_folder, sources_of
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
        blocks: list[mx.DeferredWeights] = []
        with contextlib.ExitStack() as stack:
            weights = []
            for source in sources_of(model, model_config):
                block = self._opened(stack, source, model, model_config)
                weights.append((source, block))
                if isinstance(block, mx.DeferredWeights):
                    blocks.append(block)
            try:
                load: Any = model.load_weights
                load(_named(weights))
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

    def _opened(self, stack: contextlib.ExitStack, source: Source, model: nn.Module, model_config: ModelConfig) -> Any:
        uri = self._uri(source)
        if uri is None:  # files of another kind
            return self._own._get_weights_iterator(source.of_vllm)
        quantized = model_config.quantization is not None
        alone = not getattr(model, "secondary_weights", ())
        wanted = must_be_loaded(model, quantized=quantized) if alone else None
        return stack.enter_context(mx.deferred_weights(uri, model=wanted))

    def _uri(self, source: Source) -> str | None:
        if source.primary and self._settings.model_uri is not None and not self._of_another_model:
            _log.info("ModelExpress reads the weights from MX_MODEL_URI")
            return self._settings.model_uri
        folder = safetensors_folder(self._own, source)
        if folder is None:
            _log.info("ModelExpress leaves the weights to vLLM, which found files of another kind than safetensors")
        else:
            _log.info("ModelExpress reads the weights from %s, which vLLM found; MX_MODEL_URI is not set", folder)
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


def _named(weights: list[tuple[Source, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    for source, tensors in weights:
        for name, tensor in tensors:
            yield (source.prefix + name if isinstance(tensors, mx.DeferredWeights) else name), tensor


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
