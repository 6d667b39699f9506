"""A worker that offers tensors over ``nixl``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import pytest
import torch

from devtools.missing import ToolMissingError
from mx_nixl._agent import has_library
from tests.support.peers import ServingWorker, every_layout, serving_worker

#: Variables of UCX that a test must not find set.
_UCX = "UCX_"


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(_UCX) and name != "UCX_LOG_FILE":
            monkeypatch.delenv(name)


@pytest.fixture
def nixl() -> None:
    """Skips the test if no package of NIXL is installed."""
    if not has_library():
        reason = "NIXL: pip install nixl-cu12 (x86-64 Linux)"
        raise ToolMissingError(reason)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Tensors of every kind of layout."""
    return every_layout()


@pytest.fixture
def worker(nixl: None, tensors: Mapping[str, torch.Tensor]) -> Iterator[ServingWorker]:
    """A worker of this process with ``tensors``."""
    with serving_worker(tensors, ["nixl"]) as worker:
        yield worker
