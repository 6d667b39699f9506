"""What a worker says of tensors on a GPU, where there is one: the accelerator, and addresses that hold the bytes."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable

import pytest
import torch

from modelexpress_core.contracts.identity import Engine
from modelexpress_core.sources.identity import own_identity
from modelexpress_core.sources.offering import Offer, tensor_descriptors
from modelexpress_core.sources.worker_client import WorkerClient
from tests.support.serving import Serving

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

_DEVICE_TO_HOST = 2


def _weights() -> dict[str, torch.Tensor]:
    whole = torch.arange(4096, dtype=torch.int32, device="cuda")
    return {"whole": whole, "part": whole[1000:2000], "half": torch.randn(33, 7, device="cuda").half()}


def _read(address: int, size: int) -> bytes:
    """What lies in the device's memory, as the CUDA runtime sees it."""
    version = str(torch.version.cuda).partition(".")[0]
    runtime = ctypes.CDLL(f"libcudart.so.{version}")
    buffer = ctypes.create_string_buffer(size)
    copied = runtime.cudaMemcpy(buffer, ctypes.c_void_p(address), ctypes.c_size_t(size), _DEVICE_TO_HOST)
    assert 0 == copied
    return buffer.raw


def test_descriptors_say_where_the_bytes_are() -> None:
    """On the device, also for a part of a larger tensor."""
    weights = _weights()
    torch.cuda.synchronize()

    for descriptor in tensor_descriptors(weights):
        tensor = weights[descriptor.name]
        expected = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert expected == _read(descriptor.addr, descriptor.size)
        assert torch.cuda.current_device() == descriptor.device_id


def test_the_identity_names_the_accelerator() -> None:
    """By its architecture and the version of CUDA; the same tensors on a CPU are another source."""
    weights = _weights()
    on_gpu = own_identity("acme/model", weights, engine=Engine.VLLM, engine_version="0.32")
    on_cpu = own_identity(
        "acme/model", {name: each.cpu() for name, each in weights.items()}, engine=Engine.VLLM, engine_version="0.32"
    )

    assert re.fullmatch(r"sm_\d+|gfx\w+", on_gpu.gpu_arch)
    assert on_gpu.cuda_version
    assert on_gpu.source_id != on_cpu.source_id


def test_an_offer_from_a_gpu(start: Callable[..., Serving]) -> None:
    """Is published, and its manifest says the same."""
    weights = _weights()
    identity = own_identity("acme/model", weights, engine=Engine.VLLM, engine_version="0.32")
    environ = {"MODEL_EXPRESS_URL": start().url, "MX_WORKER_GRPC_PORT": "0"}
    with Offer(identity, weights, transports=["grpc"], environ=environ, device=torch.cuda.current_device()) as offer:
        offer.ready()
        with WorkerClient(offer.endpoint) as reader, reader.lease(identity.source_id, offer.worker_id) as lease:
            assert tensor_descriptors(weights) == list(lease.manifest.tensors)
            assert identity.gpu_arch == lease.manifest.accelerator
