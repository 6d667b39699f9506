"""The identity under which a worker publishes its tensors and finds equal ones."""

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
    """The identity under which an engine publishes ``tensors`` and finds workers with equal ones.

    Workers with equal identities have tensors of the same names, shapes, strides and dtypes, created by the same
    versions of engine, torch and CUDA for the same accelerator. Their bytes are interchangeable.

    Args:
        model_name: Name of the model.
        tensors: Parameters and buffers by name, on the device where they are used.
        engine: Number of the engine, see ``Engine``.
        engine_version: Version of the engine.
        **details: Other fields of ``SourceIdentity``: ``tensor_parallel_size``, ``dtype``, ``revision`` and so on. Keys
            in ``extra_parameters`` are added to ``layout_signature``.
    """
    import torch

    device = next((tensor.device for tensor in tensors.values() if tensor.device.type != "cpu"), torch.device("cpu"))
    given = details.pop("extra_parameters", {})
    taken = sorted(key for key in given if key.lower() == "layout_signature")
    if taken:
        message = f"extra_parameters has {', '.join(taken)}, which is derived from the tensors"
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
    """``"sm_90"`` for an NVIDIA accelerator, ``"gfx942"`` for one of AMD, else torch's name of the device type."""
    import torch

    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
