"""Whatever is wrong with the weights: vLLM's own loader gives the right tokens, or the error says what to do."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from devtools.seaweedfs import SeaweedFS


def _unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.mark.timeout(1200)
def test_what_fails_gives_way_or_says_why(
    checkpoint: Callable[[str], Path],
    s3_server: SeaweedFS,
    generated: Callable[..., tuple[list[dict[str, Any]], str]],
    tmp_path: Path,
) -> None:
    """With MX_FALLBACK=0 each of them ends in an error that names place and cause; without, in the right tokens."""
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", "vllm/failing")
    good = s3_server.environ()
    down = {**good, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{_unused_port()}", "MX_RETRY_ATTEMPTS": "2"}
    truncated = shutil.copytree(directory, tmp_path / "truncated")
    shard = sorted(truncated.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    partly = shutil.copytree(directory, tmp_path / "partly")
    (partly / "model.safetensors.index.json").unlink()
    max(partly.glob("*.safetensors")).unlink()
    incomplete = tmp_path / "incomplete.safetensors"
    weights = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, incomplete)
    failures = {
        "S3 is down": ({**down, "MX_MODEL_URI": uri}, "127.0.0.1"),
        "wrong credentials": (
            {**good, "AWS_SECRET_ACCESS_KEY": "wrong", "MX_MODEL_URI": uri, "MX_RETRY_ATTEMPTS": "2"},
            "AWS_SECRET_ACCESS_KEY",
        ),
        "no such bucket": ({**good, "MX_MODEL_URI": "s3://nothing/here"}, "s3://nothing"),
        "another architecture": ({"MX_MODEL_URI": str(checkpoint("opt"))}, "MX_MODEL_URI"),
        "another size": ({"MX_MODEL_URI": str(checkpoint("qwen3"))}, "MX_MODEL_URI"),
        "a shard that was cut short": ({"MX_MODEL_URI": str(truncated)}, shard.name),
        "a shard that is missing": ({"MX_MODEL_URI": str(partly)}, "1 of 4 shards missing"),
        "a tensor that is missing": ({"MX_MODEL_URI": str(incomplete)}, "layers.1.mlp.down_proj.weight"),
        "no plugin for the scheme": ({"MX_MODEL_URI": "zz://model"}, "zz"),
    }
    run = {"model": str(directory), "tensor_parallel": 1}
    runs: list[dict[str, Any]] = [{**run, "load_format": "auto"}]
    for environ, _ in failures.values():
        runs.append({**run, "load_format": "mx", "environ": environ})
        runs.append({**run, "load_format": "mx", "environ": {**environ, "MX_FALLBACK": "0"}})

    results, printed = generated(runs)

    own, *others = results
    assert "tokens" in own
    for number, (what, (_, named)) in enumerate(failures.items()):
        fallen_back, failed = others[2 * number : 2 * number + 2]
        assert own == fallen_back, what
        assert named in failed.get("error", ""), (what, failed)
    assert len(failures) == printed.count("so vLLM's own loader does")


@pytest.mark.timeout(900)
def test_where_both_fail_both_are_told(
    checkpoint: Callable[[str], Path],
    generated: Callable[..., tuple[list[dict[str, Any]], str]],
    tmp_path: Path,
) -> None:
    """As where a model's directory holds no weights, because they are to come from elsewhere."""
    bare = shutil.copytree(checkpoint("llama"), tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*"))
    environ = {"MX_MODEL_URI": str(tmp_path / "nowhere")}

    results, _ = generated([{"model": str(bare), "load_format": "mx", "tensor_parallel": 1, "environ": environ}])

    assert "nowhere" in results[0]["error"]
    assert "Cannot find any model weights" in results[0]["error"]


@pytest.mark.timeout(900)
def test_ranks_never_take_weights_from_two_places(
    checkpoint: Callable[[str], Path],
    generated: Callable[..., tuple[list[dict[str, Any]], str]],
    tmp_path: Path,
) -> None:
    """A model that is spread over ranks is not loaded by vLLM's own loader where ours fails: the start fails."""
    environ = {"MX_MODEL_URI": str(tmp_path / "nowhere")}
    run = {"model": str(checkpoint("llama")), "load_format": "mx", "tensor_parallel": 2, "environ": environ}

    results, printed = generated([run])

    assert "error" in results[0]
    assert "nowhere" in printed
    assert "so vLLM's own loader does" not in printed
