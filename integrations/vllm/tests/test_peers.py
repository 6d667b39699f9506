"""Workers of real vLLM that read from each other, rank by rank; the oracle is vLLM's own checksums, beside tokens.

Where the tests need run-time weights, ``unpacked_plugin`` leaves linear weights unpacked, as they are on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devtools.seaweedfs import SeaweedFS
from integrations.vllm.tests.workers import NIXL, NO_NIXL, Server, Start, scheme

_CHECKSUMS = ("call", "compute_weight_checksums")


@pytest.mark.timeout(1800)
def test_three_engines_read_from_storage_then_over_nixl_then_over_grpc(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, server: Server, start: Start
) -> None:
    """Checksums and tokens are equal, and the logs and the list of sources tell the same story."""
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", "vllm/peers")
    first = start(directory, uri, NIXL)
    assert "ready" == first.ready
    server.wait_for(1)
    second = start(directory, uri, NIXL)
    assert "ready" == second.ready
    third = start(directory, uri, NO_NIXL)
    results = [(engine.do("tokens"), engine.do(*_CHECKSUMS)) for engine in (first, second, third)]

    assert results[0] == results[1] == results[2]
    assert ["s3"] == [scheme(place) for place in first.loaded_from()], first.log
    assert ["nixl"] == [scheme(place) for place in second.loaded_from()], second.log
    assert ["grpc"] == [scheme(place) for place in third.loaded_from()], third.log
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
    first = start(directory, uri, NO_NIXL, load_format="mx-source")
    assert "ready" == first.ready
    [before] = server.wait_for(1)
    tokens, checksums = first.do("tokens"), first.do(*_CHECKSUMS)
    first.do("call", "reset_weights")
    server.wait_for(0)
    s3_server.upload(changed, "models", "vllm/rolling")
    first.do("call", "reload_weights")
    after = [each for each in server.wait_for(1) if each["status"] == "ready"]
    second = start(directory, uri, NO_NIXL, load_format="mx-target")
    results = [(engine.do("tokens"), engine.do(*_CHECKSUMS)) for engine in (first, second)]

    assert "ModelExpress withdraws the weights, because of reset_weights" in first.log
    assert before["source_id"] != after[0]["source_id"]
    assert results[0] == results[1] != (tokens, checksums)
    assert ["s3", "s3"] == [scheme(place) for place in first.loaded_from()]
    assert ["grpc"] == [scheme(place) for place in second.loaded_from()]
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
    first = start(directory, uri, NO_NIXL)
    assert "ready" == first.ready
    server.wait_for(1)
    second = start(directory, uri, NO_NIXL, **different)
    own = start(directory, "", load_format="auto", **different)

    assert own.do("tokens") == second.do("tokens")
    assert ["s3"] == [scheme(place) for place in second.loaded_from()]
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
    first = start(directory, uri, NO_NIXL, **two)
    assert "ready" == first.ready
    listed = server.wait_for(2)
    second = start(directory, uri, NO_NIXL, **two)
    results = [(engine.do("tokens"), engine.do(*_CHECKSUMS)) for engine in (first, second)]

    assert [0, 1] == sorted(each["rank"] for each in listed)
    assert results[0] == results[1]
    assert 2 == len(results[0][1])
    assert ["grpc", "grpc"] == [scheme(place) for place in second.loaded_from()], second.log


@pytest.mark.timeout(1800)
def test_engines_that_start_together_read_storage_once(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, server: Server, start: Start
) -> None:
    """Of two engines of two ranks, the first rank of one waits for that of the other; then each rank reads its own."""
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", "vllm/together")
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    engines = [start(directory, uri, {**NO_NIXL, "MX_FOLLOW": "900"}, **two) for _ in range(2)]
    results = [(engine.do("tokens"), engine.do(*_CHECKSUMS)) for engine in engines]
    logs = [engine.log for engine in engines]

    assert results[0] == results[1]
    places = sorted([scheme(place) for place in engine.loaded_from()] for engine in engines)
    assert [["grpc", "grpc"], ["s3", "s3"]] == places, "\n".join(logs)
    # How long the second one waited depends on how far apart the starts of vLLM were.
    for told in ("loading without other workers after a wait of", "reading from other workers after a wait of"):
        assert [1] == [count for log in logs if (count := log.count(told))], "\n".join(logs)
    assert 4 == len(server.wait_for(4))
