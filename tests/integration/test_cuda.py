"""Destinations on a GPU, where there is one: bytes go through pinned staging buffers, and nothing else differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import modelexpress_core as mx

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

WEIGHTS = {
    **{f"layers.{i}.weight": torch.randn(512, 768).to(torch.bfloat16) for i in range(8)},
    "large": torch.randn(2048, 4096),  # more than one range
    "norm": torch.randn(512),
    "float8": torch.randn(64, 96).to(torch.float8_e4m3fn),
    "counts": torch.arange(1000),
    "flag": torch.tensor(True),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def uri(tmp_path: Path) -> str:
    for shard in range(2):
        part = {name: tensor for i, (name, tensor) in enumerate(WEIGHTS.items()) if i % 2 == shard}
        save_file(part, tmp_path / f"model-{shard + 1:05}-of-00002.safetensors")
    return tmp_path.as_uri()


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    found, expected = found.cpu().contiguous(), expected.contiguous()
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return torch.equal(found.flatten().view(torch.uint8), expected.flatten().view(torch.uint8))


def test_a_state_dict_on_the_device(uri: str) -> None:
    """Every byte of every dtype."""
    state = mx.load_state_dict(uri, device="cuda")

    assert state.keys() == WEIGHTS.keys()
    assert all(tensor.is_cuda for tensor in state.values())
    assert [] == [name for name, tensor in state.items() if not _same(tensor, WEIGHTS[name])]


def test_tensors_on_the_device_are_loaded_into(uri: str) -> None:
    """In place, with casts."""
    wanted = {name: tensor.double() if tensor.dtype is torch.bfloat16 else tensor for name, tensor in WEIGHTS.items()}
    target = {name: torch.zeros_like(tensor, device="cuda") for name, tensor in wanted.items()}

    mx.load_into(target, uri, cast=True)

    assert [] == [name for name, tensor in target.items() if not _same(tensor, wanted[name])]


def test_a_module_gets_its_memory_on_the_device(tmp_path: Path) -> None:
    """From the meta device."""
    weight = torch.randn(64, 32)
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        module = torch.nn.Linear(32, 64, bias=False)

    mx.load_into(module, tmp_path, device="cuda")

    assert module.weight.is_cuda
    assert _same(module.weight.detach(), weight)


def test_slices_go_to_the_device(uri: str) -> None:
    """Rows, columns, transposed and cast: each what real tensors would have given."""
    names = [f"layers.{i}.weight" for i in range(8)]

    def program(get: dict[str, torch.Tensor], into: dict[str, torch.Tensor]) -> None:
        for name in names:
            into[name].copy_(get[name].narrow(0, 256, 256))
            into[f"{name}.columns"].copy_(get[name][:, 192:384])
            into[f"{name}.turned"].copy_(get[name][:100].t())

    def places(device: str) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for name in names:
            made[name] = torch.zeros(256, 768, dtype=torch.bfloat16, device=device)
            made[f"{name}.columns"] = torch.zeros(512, 192, dtype=torch.bfloat16, device=device)
            made[f"{name}.turned"] = torch.zeros(768, 100, device=device)
        return made

    found, expected = places("cuda"), places("cpu")
    with mx.deferred_weights(uri, model=found) as weights:
        program(dict(weights), found)
    program(WEIGHTS, expected)

    assert [] == [name for name, tensor in found.items() if not _same(tensor, expected[name])]


def test_the_order_of_operations_is_kept(uri: str) -> None:
    """What is computed between two copies to the same memory sees the first, on any stream."""
    first, second = "layers.0.weight", "layers.1.weight"
    target = torch.zeros(512, 768, dtype=torch.bfloat16, device="cuda")
    side = torch.cuda.Stream()

    with mx.deferred_weights(uri, model={"target": target}) as weights:
        get = dict(weights)
        target.copy_(get[first])
        doubled = target * 2
        target.copy_(get[second])
        moved = get[first].to("cuda")
        with torch.cuda.stream(side):
            added = get[first].cuda() + 1
        side.synchronize()

    assert _same(doubled, WEIGHTS[first] * 2)
    assert _same(target, WEIGHTS[second])
    assert _same(moved, WEIGHTS[first])
    assert _same(added, WEIGHTS[first] + 1)
