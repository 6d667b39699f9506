"""A worker that offers tensors over ``grpc``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch

from tests.support.peers import ServingWorker, every_layout, serving_worker


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Tensors of every kind of layout."""
    return every_layout()


@pytest.fixture
def worker(tensors: Mapping[str, torch.Tensor]) -> Iterator[ServingWorker]:
    """A worker of this process with ``tensors``."""
    with serving_worker(tensors, ["grpc"]) as worker:
        yield worker
