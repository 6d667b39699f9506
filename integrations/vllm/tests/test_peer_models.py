"""Kinds of models that workers of real vLLM read from each other: checksums of all tensors and tokens are equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from devtools.seaweedfs import SeaweedFS
from integrations.vllm.tests.workers import NO_NIXL, Server, Start, scheme

_CHECKSUMS = ("call", "compute_weight_checksums")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["qwen3", "mixtral", "gemma2"])
def test_tied_weights_experts_and_scaled_embeddings_travel(
    model: str, checkpoint: Callable[[str], Path], s3_server: SeaweedFS, server: Server, start: Start
) -> None:
    """Qwen3 ties its embeddings, Mixtral has experts, Gemma-2 scales and normalises where others do not."""
    directory = checkpoint(model)
    uri = s3_server.upload(directory, "models", f"vllm/peer-{model}")
    first = start(directory, uri, NO_NIXL)
    assert "ready" == first.ready
    server.wait_for(1)
    second = start(directory, uri, NO_NIXL, load_format="mx-target")
    results = [(engine.do("tokens"), engine.do(*_CHECKSUMS)) for engine in (first, second)]

    assert results[0] == results[1]
    assert ["s3", "grpc"] == [scheme(place) for engine in (first, second) for place in engine.loaded_from()]


@pytest.mark.timeout(1800)
def test_a_quantisation_that_repacks_weights_is_not_offered(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, server: Server, start: Start
) -> None:
    """vLLM's own gate says so; the tokens come from storage."""
    directory = checkpoint("llama-int8")
    uri = s3_server.upload(directory, "models", "vllm/peer-int8")
    own = start(directory, "", load_format="auto")
    first = start(directory, uri, NO_NIXL)

    assert own.do("tokens") == first.do("tokens")
    assert "does not take weights that are processed already" in first.log
    assert [] == server.sources()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA adapter of the small Llama."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{name}.weight": torch.randn(
            shape, generator=generator
        ).to(torch.bfloat16)
        for layer in range(2)
        for name, shape in (("A", (8, 256)), ("B", (256, 8)))
    }
    directory = tmp_path / "adapter"
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.timeout(1800)
def test_workers_with_adapters_share_the_weights_of_their_base(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, server: Server, start: Start, adapter: Path
) -> None:
    """vLLM wraps layers for adapters after it has loaded them; the weights inside are those of the checkpoint."""
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", "vllm/peer-adapters")
    options = {"enable_lora": True, "max_lora_rank": 8}
    first = start(directory, uri, NO_NIXL, **options)
    base, adapted = first.do("tokens"), first.do("tokens", str(adapter))
    server.wait_for(1)
    second = start(directory, uri, NO_NIXL, **options)

    assert (adapted, base) == (second.do("tokens", str(adapter)), second.do("tokens"))
    assert base != adapted
    assert ["grpc"] == [scheme(place) for place in second.loaded_from()]


_TWO = {"distributed_executor_backend": "mp"}


@pytest.mark.timeout(1800)
def test_a_draft_model_comes_from_its_own_files_beside_a_model_from_a_worker(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, server: Server, start: Start, changed: Path
) -> None:
    """On each rank; MX_MODEL_URI is the address of the model alone."""
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", "vllm/peer-draft")
    draft = {"model": str(changed), "num_speculative_tokens": 2, "method": "draft_model"}
    options = {**_TWO, "tensor_parallel_size": 2, "speculative_config": draft}
    first = start(directory, uri, NO_NIXL, **options)
    assert "ready" == first.ready
    server.wait_for(2)
    second = start(directory, uri, NO_NIXL, **options)
    results = [(engine.do("tokens"), engine.do(*_CHECKSUMS)) for engine in (first, second)]

    assert results[0] == results[1]
    assert ["s3", "s3", "file", "file"] == [scheme(place) for place in first.loaded_from()]
    assert ["grpc", "grpc", "file", "file"] == [scheme(place) for place in second.loaded_from()]
    assert {changed.as_uri()} == set(second.loaded_from()[2:])


@pytest.mark.timeout(1800)
def test_a_pipeline_stage_reads_the_same_stage(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, server: Server, start: Start
) -> None:
    """Without tokens: vLLM for CPUs fails when it hands them from stage to stage."""
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", "vllm/peer-stages")
    engines = [start(directory, uri, NO_NIXL, **_TWO, pipeline_parallel_size=2)]
    assert "ready" == engines[0].ready
    server.wait_for(2)
    engines.append(start(directory, uri, NO_NIXL, **_TWO, pipeline_parallel_size=2))
    checksums = [engine.do(*_CHECKSUMS) for engine in engines]

    assert checksums[0] == checksums[1]
    assert checksums[0][0] != checksums[0][1]
    assert ["grpc", "grpc"] == [scheme(place) for place in engines[1].loaded_from()]


@pytest.mark.timeout(1800)
def test_another_placement_of_experts_is_not_read(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, server: Server, start: Start
) -> None:
    """Whole experts on each rank, instead of a part of each expert."""
    directory = checkpoint("mixtral")
    uri = s3_server.upload(directory, "models", "vllm/peer-placement")
    first = start(directory, uri, NO_NIXL, **_TWO, tensor_parallel_size=2)
    assert "ready" == first.ready
    server.wait_for(2)
    second = start(directory, uri, NO_NIXL, **_TWO, tensor_parallel_size=2, enable_expert_parallel=True)

    assert "error" not in second.do("tokens")
    assert ["s3", "s3"] == [scheme(place) for place in second.loaded_from()]
    assert "expert_parallel_size is 0, not 2" in second.log
