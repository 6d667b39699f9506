"""Devices as users name them."""

from __future__ import annotations

import torch

from modelexpress_core.errors import PlacementError

__all__ = ["device_with_memory"]


def device_with_memory(device: str | torch.device) -> torch.device:
    """Return the device, on which torch can create tensors.

    Raises:
        PlacementError: torch does not know it, cannot use it here, or it is the meta device, which has no memory.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, ValueError, ImportError) as exc:
        # torch built without CUDA asserts.
        reason = str(exc).strip().partition("\n")[0]
        raise PlacementError(
            f"torch cannot create tensors on the device {device!r}: {reason}",
            cause="the name is misspelt, the machine has no such device, or torch was built without support for it",
            hint="pass a device such as 'cpu' or 'cuda:0'; torch.cuda.device_count() tells how many GPUs there are",
        ) from exc
    if found.type == "meta":
        message = f"cannot load to {device!r}: tensors on the meta device have no memory"
        raise PlacementError(message, hint="pass a device such as 'cpu' or 'cuda:0'")
    return found
