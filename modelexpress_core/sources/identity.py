"""The identity under which a worker publishes its tensors, and by which it looks for others like it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.transport.layouts import layout_digest, tensor_layouts

if TYPE_CHECKING:
    import torch

__all__ = ["own_identity"]


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
