"""``reload_weights``: a running model gets all weights of the version that is there, or does not run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from devtools.seaweedfs import SeaweedFS
from integrations.vllm.tests.workers import Server

Reloaded = Callable[..., tuple[list[list[Any]], str]]


@pytest.fixture
def reloaded(run_vllm: Callable[..., tuple[Any, str]]) -> Reloaded:
    """A function that runs steps on engines, one after another in one process; returns the results and the output."""

    def reloaded(engines: Sequence[dict[str, Any]], **environ: str) -> tuple[list[list[Any]], str]:
        results, printed = run_vllm("reload.py", list(engines), **environ)
        return results, printed

    return reloaded


def _engine(model: Path | str, *steps: Any, **options: Any) -> dict[str, Any]:
    return {"model": str(model), "load_format": "mx", "steps": list(steps), **options}


def _changed(directory: Path, copy: Path) -> Path:
    """Copy a checkpoint, with other values in some tensors."""
    shutil.copytree(directory, copy)
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if "lm_head" in name or "o_proj" in name:
                tensors[name] = -tensors[name]
        save_file(tensors, file, {"format": "pt"})
    return copy


_CHECKSUMS = ["call", "compute_weight_checksums"]
_RESET = ["call", "reset_weights"]
_RELOADED = ["call", "reload_weights"]
_TOKENS = ["tokens"]
_FORWARD = ["forward"]


@pytest.mark.timeout(1800)
def test_a_reload_restores_every_parameter(
    checkpoint: Callable[[str], Path],
    s3_server: SeaweedFS,
    caching: tuple[Server, Path],
    reloaded: Reloaded,
    tmp_path: Path,
) -> None:
    """After vLLM has zeroed all parameters, checksums and tokens are those of the start, also of quantised models."""
    steps = (_TOKENS, _CHECKSUMS, _RESET, _CHECKSUMS, _RELOADED, _TOKENS, _CHECKSUMS)
    names = ("llama", "llama-padded", "qwen3", "gpt2", "llama-gptq")
    engines = [
        _engine(directory, *steps, environ={"MX_MODEL_URI": directory.as_uri()}) for directory in map(checkpoint, names)
    ]
    llama = checkpoint("llama")
    online = "int8_per_channel_weight_only"
    engines.append(_engine(llama, *steps, quantization=online, environ={"MX_MODEL_URI": str(llama)}))
    bucket = {"MX_MODEL_URI": s3_server.upload(llama, "models", "vllm/reload"), **s3_server.environ()}
    engines.append(_engine(llama, *steps, environ=bucket))
    server, _ = caching
    streamed = {"MX_MODEL_URI": "", "MODEL_EXPRESS_URL": server.url, "MODEL_EXPRESS_NO_SHARED_STORAGE": "1"}
    engines.append(_engine("org/llama", *steps, environ=streamed))

    results, printed = reloaded(engines, XDG_CACHE_HOME=str(tmp_path))

    for name, result in zip((*names, online, "llama from S3", "llama from the cache"), results, strict=True):
        tokens, checksums, _, zeroed, answer, tokens_after, checksums_after = result
        assert [None] == answer, (name, answer)
        assert checksums != zeroed, name
        assert checksums == checksums_after, name
        assert tokens == tokens_after, name
    assert 2 * len(engines) == printed.count("ModelExpress loaded ")
    assert 2 == printed.count("ModelExpress loaded mx://")
    assert "buffers to load" not in printed


@pytest.mark.timeout(1800)
def test_layers_that_vllm_cannot_reload_are_refused(checkpoint: Callable[[str], Path], reloaded: Reloaded) -> None:
    """vLLM's kernels for CPUs keep packed copies of experts and of 8-bit weights: its own reload gives wrong tokens."""
    results, _ = reloaded([_engine(checkpoint(name), _RELOADED, _TOKENS) for name in ("qwen3-moe", "llama-int8")])

    for failed, refused in results:
        assert "vLLM for CPUs cannot reload" in failed["error"]
        assert "the model does not run" in refused["error"]


@pytest.mark.timeout(1800)
def test_a_reload_gets_the_weights_that_are_there_now(
    checkpoint: Callable[[str], Path], reloaded: Reloaded, tmp_path: Path
) -> None:
    """After a change of the files in MX_MODEL_URI; from the path that reload_weights gets, until it gets another."""
    directory = checkpoint("llama")
    bare = shutil.copytree(directory, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*"))
    other = _changed(directory, tmp_path / "other")
    here = shutil.copytree(directory, tmp_path / "here")

    results, _ = reloaded(
        [
            _engine(directory, _TOKENS, load_format="auto", packed=True),
            _engine(other, _TOKENS, load_format="auto", packed=True),
            _engine(
                bare,
                _TOKENS,
                ["replace", str(other), str(here)],
                _RELOADED,
                _TOKENS,
                ["call", "reload_weights", {"weights_path": str(directory)}],
                _TOKENS,
                _RELOADED,
                _TOKENS,
                ["call", "reload_weights", {"weights_path": other.as_uri()}],
                _TOKENS,
                packed=True,
                environ={"MX_MODEL_URI": str(here)},
            ),
        ]
    )

    [first], [second], third = results
    assert first != second
    assert [first, None, [None], second, [None], first, [None], first, [None], second] == third


@pytest.mark.timeout(1800)
def test_a_model_whose_reload_failed_does_not_run(
    checkpoint: Callable[[str], Path], reloaded: Reloaded, faulty_plugin: str, tmp_path: Path
) -> None:
    """Whatever failed, before or after the first byte; a reload that succeeds lets it run again."""
    directory = checkpoint("llama")
    weights = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    here = shutil.copytree(directory, tmp_path / "here")
    truncated = shutil.copytree(directory, tmp_path / "truncated")
    shard = sorted(truncated.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    failing = {"nothing is there": (tmp_path / "empty", "here"), "a truncated shard": (truncated, shard.name)}
    for missing in (
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.norm.weight",
    ):
        file = tmp_path / missing / "model.safetensors"
        file.parent.mkdir()
        save_file({name: tensor for name, tensor in weights.items() if name != missing}, file)
        failing[missing] = (file.parent, missing.partition(".weight")[0].replace("k_proj", "qkv_proj"))
    failing["another architecture"] = (checkpoint("opt"), "LlamaForCausalLM")
    good = [["replace", str(directory), str(here)], _RELOADED, _TOKENS]
    steps: list[Any] = [_TOKENS]
    for source, _ in failing.values():
        steps += [["replace", str(source), str(here)], _RELOADED, _FORWARD, *good]
    first = min(here.glob("*.safetensors"))
    steps += [
        ["environ", {"TEST_REPLACEMENT": str(_changed(directory, tmp_path / "other") / first.name)}],
        _RELOADED,
        _FORWARD,
        ["environ", {"TEST_REPLACEMENT": ""}],
        *good,
        ["replace", str(truncated), str(here)],
        _RELOADED,
        _TOKENS,
    ]

    [[tokens, *results]], _ = reloaded(
        [_engine(directory, *steps, packed=True, environ={"MX_MODEL_URI": str(here)})],
        PYTHONPATH=faulty_plugin,
        TEST_REPLACED=str(first),
    )

    for number, (what, (_, expected)) in enumerate(failing.items()):
        _, failed, refused, _, answer, again = results[6 * number : 6 * number + 6]
        assert expected in failed["error"], (what, failed)
        assert "the model does not run" in refused["error"], what
        assert [None] == answer, what
        assert tokens == again, what
    _, failed, refused, _, _, answer, again, _, _, no_tokens = results[6 * len(failing) :]
    assert "SourceChangedError" in failed["error"]
    assert "the model does not run" in refused["error"]
    assert ([None], tokens) == (answer, again)
    assert "the model does not run" in no_tokens["error"]


@pytest.mark.timeout(1800)
def test_parameters_that_share_memory_need_equal_values(
    checkpoint: Callable[[str], Path], reloaded: Reloaded, tmp_path: Path
) -> None:
    """vLLM lets head and embedding share memory if they are equal at the start, and later takes one for both."""
    directory = shutil.copytree(checkpoint("qwen3"), tmp_path / "tied")
    weights = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    places = {"here": 1, "equal": 1, "different": -1}
    for place, sign in places.items():
        (tmp_path / place).mkdir()
        head = sign * weights["model.embed_tokens.weight"]
        save_file({**weights, "lm_head.weight": head}, tmp_path / place / "model.safetensors", {"format": "pt"})
    shutil.copy(tmp_path / "here" / "model.safetensors", directory)
    equal, different = (["replace", str(tmp_path / place), str(directory)] for place in ("equal", "different"))

    [results], _ = reloaded(
        [
            _engine(
                directory, _TOKENS, equal, _RELOADED, _TOKENS, different, _RELOADED, _FORWARD, equal, _RELOADED, _TOKENS
            )
        ]
    )

    tokens, _, first, after_first, _, failed, refused, _, second, after_second = results
    assert ([None], tokens) == (first, after_first)
    assert "lm_head.weight, model.embed_tokens.weight share memory" in failed["error"]
    assert "the model does not run" in refused["error"]
    assert ([None], tokens) == (second, after_second)


@pytest.mark.timeout(1800)
def test_two_ranks_reload_together(
    checkpoint: Callable[[str], Path], reloaded: Reloaded, faulty_plugin: str, tmp_path: Path
) -> None:
    """Each rank reads its part. If one cannot, both fail, and the engine serves nothing."""
    directory = checkpoint("llama")
    refuse = tmp_path / "refuse"
    steps = (_TOKENS, _RESET, _RELOADED, _TOKENS, ["write", str(refuse)], _RELOADED, _TOKENS)

    [results], printed = reloaded(
        [
            _engine(
                directory,
                *steps,
                tensor_parallel_size=2,
                distributed_executor_backend="mp",
                packed=True,
                environ={"MX_MODEL_URI": f"refusing://{directory}"},
            )
        ],
        PYTHONPATH=faulty_plugin,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        TEST_REFUSE=str(refuse),
    )

    tokens, _, answer, again, _, failed, refused = results
    assert ([None, None], tokens) == (answer, again)
    assert 5 == printed.count("ModelExpress loaded ")  # the last one is the first rank's, before it learns of the other
    assert "error" in failed
    assert "the second rank may not read" in printed
    assert "another rank could not reload its weights" in printed
    assert "error" in refused
