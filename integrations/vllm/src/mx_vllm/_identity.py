"""The identity of a worker of vLLM: all that gives bytes of equal shapes their meaning."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from attrs import field, frozen
from torch import nn
from vllm.config import ModelConfig, VllmConfig

import modelexpress_core as mx
from modelexpress_core.contracts.identity import Engine
from mx_vllm._names import name_of
from mx_vllm._vllm import identity_fields, rank_of, version

__all__ = ["Worker", "number_of", "tensors_of"]

#: Where a layer of the model is inside one that adds adapters.
_WRAPPED = ".base_layer."


@frozen
class Worker:
    """What is known of a worker before its weights are loaded.

    Attributes:
        model_name: Name of the model, as others look for it.
        rank: Rank of the worker, which is also the rank of its part of the model.
        device: Number of the worker on its host, by which it chooses its port.
        fields: The fields of its identity, without layout and content.
        layout: Digest of the layout of its tensors before any was loaded.
    """

    model_name: str
    rank: int
    device: int
    fields: Mapping[str, Any] = field(repr=False)
    layout: str

    @classmethod
    def of(cls, vllm_config: VllmConfig, model_config: ModelConfig, model: nn.Module) -> Worker:
        """Describe this process, whose ``model`` was just built and has no weights yet."""
        rank, device = rank_of(vllm_config)
        name = name_of(model_config.model)
        fields = identity_fields(vllm_config, model_config, model)
        layout = _identity(name, fields, tensors_of(model), "").extra_parameters["layout_signature"]
        return cls(name, rank, device, fields, layout)

    def identity(self, model: nn.Module, content_version: str) -> mx.SourceIdentity:
        """Return the identity of ``model`` as its tensors are now."""
        return _identity(self.model_name, self.fields, tensors_of(model), content_version)


def tensors_of(model: nn.Module) -> dict[str, Any]:
    """Return parameters and buffers of ``model``, also those that no checkpoint holds, under each of their names.

    They are the names that it was built with: where adapters (LoRA) may be loaded, vLLM wraps layers later, and never
    changes the weights inside.
    """
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name.replace(_WRAPPED, "."): tensor.detach() for name, tensor in named}


def _identity(
    name: str, fields: Mapping[str, Any], tensors: Mapping[str, Any], content_version: str
) -> mx.SourceIdentity:
    return mx.own_identity(
        name,
        tensors,
        engine=Engine.VLLM,
        engine_version=version(),
        content_version=content_version,
        **fields,
    )


def number_of(text: str) -> int:
    """Return a number of 62 bits that differs for different texts."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
