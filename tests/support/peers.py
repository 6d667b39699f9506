"""Workers of this process, as the contract kit has them, and the tensors that tests read from workers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch

import modelexpress_core as mx
from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.testing import ServingWorker, serving_worker

__all__ = [
    "ServingWorker",
    "bulk_behind_proxy",
    "empty_like",
    "every_layout",
    "identity_of",
    "serving_worker",
    "tensors_of",
]

_TENSORS = 40


@contextlib.contextmanager
def bulk_behind_proxy(served: Any, faults: Callable[[int, bytes], Fault | None]) -> Iterator[TcpProxy]:
    """What a worker serves over ``grpc``, with a proxy before its bulk channel."""
    bulk = served._bulk
    with TcpProxy("127.0.0.1", bulk.server.port, faults) as proxy:

        class Proxied:
            port = proxy.port
            close = bulk.server.close

        served._bulk = attrs.evolve(bulk, server=Proxied)
        try:
            yield proxy
        finally:
            served._bulk = bulk


def every_layout() -> dict[str, torch.Tensor]:
    """Tensors of several chunks, odd sizes and every kind of layout."""
    generator = torch.Generator().manual_seed(3)
    large = torch.randint(0, 256, ((9 << 20) + 13,), dtype=torch.uint8, generator=generator)
    weight = torch.randn(300, 200, generator=generator).to(torch.bfloat16)
    return {
        "large": large,
        "weight": weight,
        "tied": weight,
        "transposed": torch.randn(33, 65, generator=generator).t(),
        "part": torch.randn(40, 60, generator=generator)[:, 3:17],
        "flags": torch.randn(7, generator=generator) > 0,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "one byte": torch.tensor([201], dtype=torch.uint8),
    }


def empty_like(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Destinations of the same layout, filled with other bytes; tied tensors share their memory."""
    made: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in made:
            span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            memory = torch.full(((max(span, 0) + 1) * tensor.element_size(),), 0x5A, dtype=torch.uint8)
            if tensor.dtype is torch.bool:
                memory.zero_()
            made[id(tensor)] = memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


def tensors_of(mib: int) -> Mapping[str, torch.Tensor]:
    """Tensors of ``mib`` MiB together and a few bytes more, whose random bytes are the same in each process."""
    generator = torch.Generator().manual_seed(mib)
    return {
        f"layers.{number}.weight": torch.randint(
            0, 256, ((mib << 20) // _TENSORS + number,), dtype=torch.uint8, generator=generator
        )
        for number in range(_TENSORS)
    }


def identity_of(tensors: Mapping[str, torch.Tensor]) -> mx.SourceIdentity:
    """Their identity, for both sides."""
    return mx.own_identity("acme/model", tensors, content_version="1")
