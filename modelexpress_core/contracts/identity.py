"""The identity of weights in a worker's memory, and the id that all programs of the protocol derive from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import IntEnum

import attrs
from attrs import field, frozen

from modelexpress_core.immutable import unmodifiable

__all__ = ["CONTENT_KEY", "WIRE_VERSION", "Engine", "SourceIdentity", "SourceType"]

#: The ``mx_version`` of our identities. It changes with the protocol, not with the package, so that workers of two
#: releases find each other while a fleet is upgraded.
WIRE_VERSION = "0.7"

#: Key in ``extra_parameters`` for the version of the content: equal layouts may hold other values.
CONTENT_KEY = "content_version"

_ID_DIGITS = 16

#: The hash leaves these out if they are empty.
_OPTIONAL = (
    "backend_framework_version",
    "compile_config_digest",
    "cuda_version",
    "gpu_arch",
    "torch_version",
    "triton_version",
)


class Engine(IntEnum):
    """Inference engines by their number in the protocol."""

    UNKNOWN = 0
    VLLM = 1
    SGLANG = 2
    TRT_LLM = 3


class SourceType(IntEnum):
    """Kinds of data that a source holds, by their number in the protocol."""

    WEIGHTS = 0
    LORA = 1
    CUDA_GRAPH = 2
    TORCH_COMPILE_CACHE = 3
    TRITON_CACHE = 4
    DEEP_GEMM_CACHE = 5
    TILELANG_CACHE = 6
    CUTE_DSL_CACHE = 7
    FLASHINFER_CACHE = 8
    TVM_FFI_CACHE = 9


@frozen
class SourceIdentity:
    """A model as an engine holds it in memory. Workers with equal identities can read from each other.

    Attributes:
        model_name: Name of the model.
        mx_version: Version of the protocol.
        mx_source_type: The kind of data; an unknown number is kept as it is.
        backend_framework: The engine; an unknown number is kept as it is.
        tensor_parallel_size: Ranks that tensors are split over.
        pipeline_parallel_size: Ranks that layers are split over.
        expert_parallel_size: Ranks that experts are split over; 0 if they are not split.
        dtype: Data type of the weights: ``"bfloat16"``.
        quantization: How the weights are quantised; empty if they are not.
        extra_parameters: Other parameters that distinguish sources.
        revision: Revision of the model; empty for the newest.
        backend_framework_version: Version of the engine.
        torch_version: Version of torch.
        cuda_version: Version of CUDA.
        triton_version: Version of Triton.
        gpu_arch: Architecture of the accelerator: ``"sm_90"``.
        compile_config_digest: Digest of how the model was compiled.
    """

    model_name: str
    mx_version: str = WIRE_VERSION
    mx_source_type: int = SourceType.WEIGHTS
    backend_framework: int = Engine.UNKNOWN
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    expert_parallel_size: int = 0
    dtype: str = ""
    quantization: str = ""
    extra_parameters: Mapping[str, str] = field(factory=dict, converter=unmodifiable, hash=False)
    revision: str = ""
    backend_framework_version: str = ""
    torch_version: str = ""
    cuda_version: str = ""
    triton_version: str = ""
    gpu_arch: str = ""
    compile_config_digest: str = ""

    @property
    def content_version(self) -> str:
        """Tells models of one layout with other values apart; empty if it is unknown."""
        return self.extra_parameters.get(CONTENT_KEY, "")

    def with_content_version(self, version: str) -> SourceIdentity:
        """The identity of ``version`` of the same model."""
        return attrs.evolve(self, extra_parameters={**self.extra_parameters, CONTENT_KEY: version})

    def differences(self, other: SourceIdentity) -> Mapping[str, tuple[str, str]]:
        """The fields that make the ids of two identities differ, by name, each with the value here and in ``other``.

        Those of ``extra_parameters`` have their own names.
        """
        ours, theirs = self._compared(), other._compared()
        return {
            name: (ours.get(name, ""), theirs.get(name, ""))
            for name in dict.fromkeys((*ours, *theirs))
            if ours.get(name) != theirs.get(name)
        }

    def _compared(self) -> Mapping[str, str]:
        """What ``source_id`` is derived from, as texts by name."""
        named = {
            name: str(int(value) if isinstance(value, int) else value).lower()
            for name, value in attrs.asdict(self, recurse=False).items()
            if name != "extra_parameters"
        }
        extra = _lowered(self.extra_parameters)
        return {**named, **{name if name not in named else f"{name} (extra)": extra[name] for name in extra}}

    @property
    def source_id(self) -> str:
        """The ``mx_source_id``: 16 lower-case hex digits; sources with equal ids are interchangeable.

        The digits are the start of the SHA-256 of compact JSON with sorted keys and lower-case texts.
        """
        values: dict[str, object] = {}
        for name in attrs.fields_dict(type(self)):
            value = getattr(self, name)
            if name == "extra_parameters":
                values[name] = _lowered(value)
            elif isinstance(value, str):
                if value or name not in _OPTIONAL:
                    values[name] = value.lower()
            else:
                values[name] = int(value)
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_ID_DIGITS]


def _lowered(parameters: Mapping[str, str]) -> dict[str, str]:
    """Keys and values in lower case. If keys become equal, the first of them in sorted order counts."""
    lowered: dict[str, str] = {}
    for key in sorted(parameters):
        lowered.setdefault(key.lower(), parameters[key].lower())
    return lowered
