"""Workers of real vLLM that read from each other, rank by rank; the oracle is vLLM's own checksums, beside tokens.

Where the tests need run-time weights, ``unpacked_plugin`` leaves linear weights unpacked, as they are on GPUs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from devtools.seaweedfs import SeaweedFS
from integrations.vllm.tests.workers import Engine, Server
from modelexpress_core.uri import ModelURI

Start = Callable[..., Engine]
_CHECKSUMS = ("call", "compute_weight_checksums")
_NIXL = {"MX_NIXL_OFFER": "1", "NIXL_LOG_LEVEL": "WARN"}
_NO_NIXL = {"MX_DISABLED_PLUGINS": "mx-nixl"}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def start(server: Server, s3_server: SeaweedFS) -> Iterator[Start]:
    """A function that starts an engine whose MX_MODEL_URI is in the object store; all end with the test."""
    with ExitStack() as engines:

        def start(
            model: Path, uri: str, environ: Mapping[str, str] | None = None, *, packed: bool = False, **options: Any
        ) -> Engine:
            variables = {
                "MODEL_EXPRESS_URL": server.url,
                **({"MX_MODEL_URI": uri} if uri else {}),
                **s3_server.environ(),
                **(environ or {}),
            }
            given = {"model": str(model), "load_format": "mx", **options}
            return engines.enter_context(Engine(given, variables, packed=packed))

        yield start


@pytest.fixture
def changed(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """The checkpoint with other values in some tensors."""
    copy = shutil.copytree(checkpoint("llama"), tmp_path / "changed")
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: -each if "o_proj" in name else each for name, each in tensors.items()}, file, {"format": "pt"})
    return copy


def _scheme(uri: str) -> str:
    return ModelURI.parse(uri).scheme


@pytest.mark.timeout(1800)
def test_three_engines_read_from_storage_then_over_nixl_then_over_grpc(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, server: Server, start: Start
) -> None:
    """Checksums and tokens are equal, and the logs and the list of sources tell the same story."""
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", "vllm/peers")
    first = start(directory, uri, _NIXL)
    assert "ready" == first.ready
    server.wait_for(1)
    second = start(directory, uri, _NIXL)
    assert "ready" == second.ready
    third = start(directory, uri, _NO_NIXL)
    results = [(engine.do("tokens"), engine.do(*_CHECKSUMS)) for engine in (first, second, third)]

    assert results[0] == results[1] == results[2]
    assert ["s3"] == [_scheme(place) for place in first.loaded_from()], first.log
    assert ["nixl"] == [_scheme(place) for place in second.loaded_from()], second.log
    assert ["grpc"] == [_scheme(place) for place in third.loaded_from()], third.log
    assert "no worker has the same tensors" in first.log
    assert "because it holds the same tensors of the same version of the checkpoint" in second.log
    server.wait_for(3)


@pytest.mark.timeout(1800)
def test_packed_weights_are_not_offered_and_storage_gives_the_right_tokens(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, server: Server, start: Start
) -> None:
    """vLLM as it is built for CPUs leaves parameters empty; `mx-target` then finds nobody, and says so."""
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", "vllm/packed")
    own = start(directory, "", load_format="auto", packed=True)
    first = start(directory, uri, packed=True)
    tokens, ours = own.do("tokens"), first.do("tokens")
    target = start(directory, uri, {"MX_SOURCE_QUERY_TIMEOUT": "2"}, load_format="mx-target", packed=True)

    assert tokens == ours
    assert "parameters hold no bytes, since vLLM packed them for its kernels" in first.log
    assert [] == server.sources()
    assert "mx-target reads from workers alone, and none could be read" in target.ready["error"] + target.log


@pytest.mark.timeout(1800)
def test_a_model_is_withdrawn_while_it_is_reloaded_and_offered_as_its_new_version(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, server: Server, start: Start, changed: Path
) -> None:
    """A worker that starts with the new version reads it; `mx-source` reads no worker, `mx-target` nothing else."""
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", "vllm/rolling")
    first = start(directory, uri, _NO_NIXL, load_format="mx-source")
    assert "ready" == first.ready
    [before] = server.wait_for(1)
    tokens, checksums = first.do("tokens"), first.do(*_CHECKSUMS)
    first.do("call", "reset_weights")
    server.wait_for(0)
    s3_server.upload(changed, "models", "vllm/rolling")
    first.do("call", "reload_weights")
    after = [each for each in server.wait_for(1) if each["status"] == "ready"]
    second = start(directory, uri, _NO_NIXL, load_format="mx-target")
    results = [(engine.do("tokens"), engine.do(*_CHECKSUMS)) for engine in (first, second)]

    assert "ModelExpress withdraws the weights, because of reset_weights" in first.log
    assert before["source_id"] != after[0]["source_id"]
    assert results[0] == results[1] != (tokens, checksums)
    assert ["s3", "s3"] == [_scheme(place) for place in first.loaded_from()]
    assert ["grpc"] == [_scheme(place) for place in second.loaded_from()]
    # vLLM for CPUs only pretends to sleep.
    server.wait_for(2)
    second.do("call", "sleep", {"level": 1})
    server.wait_for(1)
    second.do("call", "wake_up")
    server.wait_for(2)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("different", [{"dtype": "float16"}, {"quantization": "int8_per_channel_weight_only"}])
def test_a_worker_whose_bytes_mean_something_else_is_not_read(
    different: dict[str, Any],
    checkpoint: Callable[[str], Path],
    s3_server: SeaweedFS,
    server: Server,
    start: Start,
) -> None:
    """The line that names the source says what differs."""
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", "vllm/different")
    first = start(directory, uri, _NO_NIXL)
    assert "ready" == first.ready
    server.wait_for(1)
    second = start(directory, uri, _NO_NIXL, **different)
    own = start(directory, "", load_format="auto", **different)

    assert own.do("tokens") == second.do("tokens")
    assert ["s3"] == [_scheme(place) for place in second.loaded_from()]
    if "dtype" in different:
        assert "dtype is bfloat16, not float16" in second.log


@pytest.mark.timeout(1800)
def test_two_ranks_read_from_the_same_ranks(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, server: Server, start: Start
) -> None:
    """With tensor parallelism each rank reads the bytes of its own rank."""
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", "vllm/ranks")
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    first = start(directory, uri, _NO_NIXL, **two)
    assert "ready" == first.ready
    listed = server.wait_for(2)
    second = start(directory, uri, _NO_NIXL, **two)
    results = [(engine.do("tokens"), engine.do(*_CHECKSUMS)) for engine in (first, second)]

    assert [0, 1] == sorted(each["rank"] for each in listed)
    assert results[0] == results[1]
    assert 2 == len(results[0][1])
    assert ["grpc", "grpc"] == [_scheme(place) for place in second.loaded_from()], second.log


@pytest.mark.timeout(1800)
def test_a_worker_that_is_killed_while_it_is_read_is_replaced_by_storage(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, server: Server, start: Start, faulty_plugin: str
) -> None:
    """Into a new model, since the old one was written to; the tokens are those of before."""
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", "vllm/killed")
    first = start(directory, uri, _NO_NIXL)
    assert "ready" == first.ready
    server.wait_for(1)
    results = [(first.do("tokens"), first.do(*_CHECKSUMS))]
    second = start(directory, uri, {**_NO_NIXL, "PYTHONPATH": faulty_plugin, "TEST_KILL": str(first.process.pid)})
    results.append((second.do("tokens"), second.do(*_CHECKSUMS)))

    assert first.process.wait() < 0
    assert results[0] == results[1]
    assert "ModelExpress loads the weights into a new model, because" in second.log
    assert ["s3"] == [_scheme(place) for place in second.loaded_from()]
