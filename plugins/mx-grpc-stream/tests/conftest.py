"""A worker that offers tensors over ``grpc``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch

from tests.support.peers import ServingWorker, serving_worker


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
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


@pytest.fixture
def worker(tensors: Mapping[str, torch.Tensor]) -> Iterator[ServingWorker]:
    """A worker of this process with ``tensors``."""
    with serving_worker(tensors, ["grpc"]) as worker:
        yield worker
