"""The allocations that hold tensors: NIXL registers each of them once, whatever number of tensors it holds."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence

import torch

__all__ = ["HOST", "Allocation", "allocations_of", "device_of", "kind_of", "merged"]

#: The device number of memory of the host.
HOST = -1

#: First byte, first byte after it, and device.
Allocation = tuple[int, int, int]


def kind_of(device: int) -> str:
    """NIXL's word for the memory of a device."""
    return "DRAM" if device == HOST else "VRAM"


def device_of(tensor: torch.Tensor) -> int:
    """The number of the device that holds ``tensor``."""
    return HOST if tensor.device.type == "cpu" else tensor.device.index or 0


def allocations_of(tensors: Iterable[torch.Tensor]) -> set[Allocation]:
    """The allocations that hold ``tensors``: their storages, or the segments of torch's allocator on CUDA devices."""
    found: set[Allocation] = set()
    segments: list[Allocation] | None = None
    for tensor in tensors:
        storage, device = tensor.untyped_storage(), device_of(tensor)
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        if device != HOST:
            if segments is None:
                segments = [
                    (each["address"], each["address"] + each["total_size"], each["device"])
                    for each in torch.cuda.memory_snapshot()
                ]
            for first, last, where in segments:
                if where == device and first <= start and end <= last:
                    start, end = first, last
        found.add((start, end, device))
    return found


def merged(allocations: Iterable[Allocation]) -> Sequence[Allocation]:
    """Allocations whose pages touch, as one: registration covers whole pages anyway."""
    found: list[Allocation] = []
    for start, end, device in sorted(allocations, key=lambda each: (each[2], each[0])):
        page = mmap.PAGESIZE if device == HOST else 1
        first, last = start // page * page, -(-end // page) * page
        if found and found[-1][2] == device and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(last, found[-1][1]), device)
        else:
            found.append((first, last, device))
    return found
