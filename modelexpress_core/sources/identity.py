"""The identity under which a worker publishes its tensors, and by which it finds workers with the same tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modelexpress_core.contracts.identity import CONTENT_KEY, Engine, SourceIdentity
from modelexpress_core.transport.layouts import layout_digest, tensor_layouts

if TYPE_CHECKING:
    import torch

__all__ = ["own_identity"]


def own_identity(
    model_name: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    engine: int = Engine.UNKNOWN,
    engine_version: str = "",
    content_version: str = "",
    **details: Any,  # noqa: ANN401 - fields of SourceIdentity
) -> SourceIdentity:
    """Return the identity under which an engine publishes ``tensors``, and by which it finds equal workers.

    Workers with equal identities have tensors of the same names, shapes, strides and dtypes, made by the same versions
    of engine, torch and CUDA for the same accelerator: their bytes are interchangeable.

    Args:
        model_name: Name of the model.
        tensors: The published parameters and buffers by name, on the device where they are used.
        engine: Number of the engine, see ``Engine``.
        engine_version: Its version.
        content_version: Which values the tensors have: ``LoadReport.content_version``, or any text that another content
            never has. Loads add it themselves; offers need it.
        **details: Other fields of ``SourceIdentity``: ``tensor_parallel_size``, ``dtype``, ``revision`` and so on.
            ``extra_parameters`` may hold any key but ``layout_signature`` and ``content_version``.
    """
    import torch

    device = next((tensor.device for tensor in tensors.values() if tensor.device.type != "cpu"), torch.device("cpu"))
    extra = details.pop("extra_parameters", {})
    reserved = sorted(key for key in extra if key.lower() in {"layout_signature", CONTENT_KEY})
    if reserved:
        message = f"extra_parameters must not contain {', '.join(reserved)}: the tensors and content_version give it"
        raise ValueError(message)
    extra = {**extra, "layout_signature": layout_digest(tensor_layouts(tensors))}
    if content_version:
        extra[CONTENT_KEY] = content_version
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
    """Return, for example, ``"sm_90"`` for NVIDIA, ``"gfx942"`` for AMD, and torch's name of any other device."""
    import torch

    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
