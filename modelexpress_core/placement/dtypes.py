"""Dtypes and shapes of the safetensors format in torch."""

from __future__ import annotations

import torch

from modelexpress_core.checkpoint import TensorInfo
from modelexpress_core.errors import PlacementError

__all__ = ["torch_dtype", "torch_shape"]

#: The format's name of a dtype -> torch's. As text, because older torch releases lack the newest.
_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """The torch dtype that ``info`` is loaded as.

    Raises:
        PlacementError: This version of torch has none.
    """
    dtype = getattr(torch, _NAMES.get(info.dtype, ""), None)
    if isinstance(dtype, torch.dtype):
        return dtype
    raise PlacementError(
        f"torch {torch.__version__} has no dtype for {info.dtype}, the dtype of {info.name} in {info.file.name}",
        tensor=info.name,
        cause="this version of torch is too old" if info.dtype in _NAMES else "torch has no such dtype",
        hint="upgrade torch" if info.dtype in _NAMES else "convert the tensor, or read its bytes from the file",
    )


def torch_shape(info: TensorInfo) -> tuple[int, ...]:
    """The shape that ``info`` has in torch, where one element of F4 holds two values.

    Raises:
        PlacementError: The last dimension is odd, so that two values do not share each byte.
    """
    if info.dtype != "F4":
        return info.shape
    if not info.shape or info.shape[-1] % 2:
        message = f"{info.name} in {info.file.name} has the shape {list(info.shape)} of F4, which torch packs in pairs"
        raise PlacementError(message, tensor=info.name, hint="pad its last dimension to an even size")
    return (*info.shape[:-1], info.shape[-1] // 2)
