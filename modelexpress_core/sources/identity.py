"""What makes two sources interchangeable, and the id that all programs that speak the protocol derive from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import attrs
from attrs import field, frozen

from modelexpress_core.immutable import unmodifiable
from modelexpress_core.sources.layouts import layout_digest, tensor_layouts

if TYPE_CHECKING:
    import torch

    from modelexpress_core.wire.proto.modelexpress import p2p_pb2

__all__ = ["WIRE_VERSION", "Engine", "SourceIdentity", "SourceType", "own_identity"]

#: What our identities carry as ``mx_version``. It changes with the protocol, not with the package, so that workers of
#: two releases find one another while a fleet is upgraded.
WIRE_VERSION = "0.7"

_ID_DIGITS = 16

#: Where one of these is empty, it is left out of what is hashed.
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
    """What a source holds, by its number in the protocol."""

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
    """A model as an engine holds it in memory: workers with equal identities can read from one another.

    Attributes:
        model_name: Name of the model.
        mx_version: Version of the protocol.
        mx_source_type: What is held (a number that this version does not know is kept).
        backend_framework: The engine (likewise).
        tensor_parallel_size: Ranks that tensors are split over.
        pipeline_parallel_size: Ranks that layers are split over.
        expert_parallel_size: Ranks that experts are split over; 0 where they are not.
        dtype: Of the weights: ``"bfloat16"``.
        quantization: How the weights are quantised; empty where they are not.
        extra_parameters: Anything else that tells sources apart.
        revision: Of the model; empty for whatever is newest.
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
    def source_id(self) -> str:
        """The ``mx_source_id``: 16 lower-case hex digits; sources with equal ids are interchangeable.

        They begin the SHA-256 of compact JSON with sorted keys, in which every text is lower-case.
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

    @classmethod
    def from_message(cls, message: p2p_pb2.SourceIdentity) -> SourceIdentity:
        """The identity that a message holds."""
        return cls(**{name: getattr(message, name) for name in attrs.fields_dict(cls)})

    def to_message(self) -> p2p_pb2.SourceIdentity:
        """The message that holds it."""
        from modelexpress_core.wire.proto.modelexpress import p2p_pb2

        values = {name: getattr(self, name) for name in attrs.fields_dict(type(self))}
        values["extra_parameters"] = dict(self.extra_parameters)
        return p2p_pb2.SourceIdentity(**values)


def _lowered(parameters: Mapping[str, str]) -> dict[str, str]:
    """Keys and values in lower case; of keys that become one, the first in the order of the original keys counts."""
    lowered: dict[str, str] = {}
    for key in sorted(parameters):
        lowered.setdefault(key.lower(), parameters[key].lower())
    return lowered


def own_identity(
    model_name: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    engine: int,
    engine_version: str,
    **details: Any,  # noqa: ANN401 - fields of SourceIdentity
) -> SourceIdentity:
    """The identity under which an engine of ours publishes ``tensors``, and by which it looks for others like it.

    Whoever has an equal one has tensors of the same names, shapes, strides and dtypes, made by the same versions of
    engine, torch and CUDA for the same accelerator: the bytes of one can take the place of the other's.

    Args:
        model_name: Name of the model.
        tensors: What is published, by name: parameters and buffers, on the device where they are used.
        engine: Number of the engine, see ``Engine``.
        engine_version: Its version.
        **details: Other fields of ``SourceIdentity``: ``tensor_parallel_size``, ``dtype``, ``revision`` and so on. Keys
            in ``extra_parameters`` stand beside ``layout_signature``.
    """
    import torch

    device = next((tensor.device for tensor in tensors.values() if tensor.device.type != "cpu"), torch.device("cpu"))
    given = details.pop("extra_parameters", {})
    taken = sorted(key for key in given if key.lower() == "layout_signature")
    if taken:
        message = f"extra_parameters has {', '.join(taken)}, which is made of the tensors"
        raise ValueError(message)
    extra = {**given, "layout_signature": layout_digest(tensor_layouts(tensors))}
    return SourceIdentity(
        model_name,
        backend_framework=engine,
        backend_framework_version=engine_version,
        torch_version=torch.__version__,
        cuda_version=torch.version.cuda or torch.version.hip or "",
        gpu_arch=_architecture(device),
        extra_parameters=extra,
        **details,
    )


def _architecture(device: torch.device) -> str:
    """``"sm_90"`` for an accelerator of NVIDIA, ``"gfx942"`` for one of AMD, and else what torch calls the device."""
    import torch

    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
