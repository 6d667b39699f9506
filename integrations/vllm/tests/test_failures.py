"""Loads that fail: vLLM's own loader gives the right tokens, or the error says what to do."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from devtools.seaweedfs import SeaweedFS
from integrations.vllm.tests.workers import Server


def _unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def _first_tokens(result: dict[str, Any]) -> list[list[int]]:
    """The first tokens of each prompt, without probabilities: sums of another number of ranks are rounded elsewhere."""
    return [[token for token, _ in prompt[:3]] for prompt in result["tokens"]]


def _with_unknown_field(file: bytes) -> bytes:
    """Add a field to an entry of the header of a safetensors file. vLLM ignores it, and ModelExpress refuses it."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    next(entry for name, entry in header.items() if name != "__metadata__")["note"] = 1
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[end:]


@pytest.mark.timeout(1800)
def test_failures_say_why_or_fall_back(
    checkpoint: Callable[[str], Path],
    s3_server: SeaweedFS,
    generated: Callable[..., tuple[list[dict[str, Any]], str]],
    tmp_path: Path,
) -> None:
    """Each failure of MX_MODEL_URI raises an error that names place and cause, unless MX_FALLBACK=1."""
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
        "no credentials": (
            {**good, "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "MX_MODEL_URI": uri},
            "credentials",
        ),
        "no such bucket": ({**good, "MX_MODEL_URI": "s3://nothing/here"}, "s3://nothing"),
        "no such key": ({**good, "MX_MODEL_URI": f"{uri}-misspelt"}, "vllm/failing-misspelt"),
        "another architecture": ({"MX_MODEL_URI": str(checkpoint("opt"))}, "MX_MODEL_URI"),
        "another size": ({"MX_MODEL_URI": str(checkpoint("qwen3"))}, "MX_MODEL_URI"),
        "a truncated shard": ({"MX_MODEL_URI": str(truncated)}, shard.name),
        "a missing shard": ({"MX_MODEL_URI": str(partly)}, "1 of 4 shards missing"),
        "a missing tensor": ({"MX_MODEL_URI": str(incomplete)}, "layers.1.mlp.down_proj.weight"),
        "no plugin for the scheme": ({"MX_MODEL_URI": "zz://model"}, "zz"),
    }
    run = {"model": str(directory), "tensor_parallel": 1}
    runs: list[dict[str, Any]] = [{**run, "load_format": "auto"}]
    for environ, _ in failures.values():
        runs.append({**run, "load_format": "mx", "environ": environ})
        runs.append({**run, "load_format": "mx", "environ": {**environ, "MX_FALLBACK": "1"}})

    results, printed = generated(runs)

    own, *others = results
    assert "tokens" in own
    for number, (what, (_, named)) in enumerate(failures.items()):
        failed, fallen_back = others[2 * number : 2 * number + 2]
        assert own == fallen_back, what
        assert named in failed.get("error", ""), (what, failed)
    assert len(failures) == printed.count("so vLLM's own loader loads them into")


@pytest.mark.timeout(1800)
def test_wrong_settings_fail_before_the_engine_starts(
    checkpoint: Callable[[str], Path], generated: Callable[..., tuple[list[dict[str, Any]], str]]
) -> None:
    """With one rank and with two, ``LLM(...)`` raises our error itself, and starts no other process."""
    wrong = {
        "UnknownSchemeError: ": {"MX_MODEL_URI": "zz://model"},
        "InvalidURIError: ": {"MX_MODEL_URI": "s3:/bucket/model"},
        "SettingsError: ": {"MX_CONCURRENCY": "many", "MX_FALLBACK": "1"},
    }
    run = {"model": str(checkpoint("llama")), "load_format": "mx"}
    runs = [{**run, "tensor_parallel": ranks, "environ": environ} for environ in wrong.values() for ranks in (1, 2)]

    results, printed = generated(runs)

    for error, result in zip([error for error in wrong for _ in (1, 2)], results, strict=True):
        assert result.get("error", "").startswith(error), result
        assert "Next step: " in result["error"]
    assert "EngineCore" not in printed


@pytest.mark.timeout(1800)
def test_if_the_files_of_vllms_model_fail_its_own_loader_reads_them(
    checkpoint: Callable[[str], Path], generated: Callable[..., tuple[list[dict[str, Any]], str]], tmp_path: Path
) -> None:
    """Without MX_MODEL_URI both loaders read the same files, so a fallback is allowed unless MX_FALLBACK=0."""
    odd = shutil.copytree(checkpoint("llama"), tmp_path / "odd")
    shard = min(odd.glob("*.safetensors"))
    shard.write_bytes(_with_unknown_field(shard.read_bytes()))
    run = {"model": str(odd), "tensor_parallel": 1}

    results, printed = generated(
        [
            {**run, "load_format": "auto"},
            {**run, "load_format": "mx"},
            {**run, "load_format": "mx", "environ": {"MX_FALLBACK": "0"}},
        ]
    )

    own, fallen_back, failed = results
    assert "tokens" in own, own
    assert own == fallen_back
    assert shard.name in failed.get("error", ""), failed
    assert 1 == printed.count("so vLLM's own loader loads them into")


@pytest.mark.timeout(1800)
def test_if_both_loaders_fail_both_reasons_are_given(
    checkpoint: Callable[[str], Path],
    generated: Callable[..., tuple[list[dict[str, Any]], str]],
    tmp_path: Path,
) -> None:
    """For example, MX_MODEL_URI is wrong, and the model's directory holds no weights."""
    bare = shutil.copytree(checkpoint("llama"), tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*"))
    environ = {"MX_MODEL_URI": str(tmp_path / "nowhere"), "MX_FALLBACK": "1"}

    results, _ = generated([{"model": str(bare), "load_format": "mx", "tensor_parallel": 1, "environ": environ}])

    assert "nowhere" in results[0]["error"]
    assert "Cannot find any model weights" in results[0]["error"]


@pytest.mark.timeout(1800)
def test_a_shard_that_is_replaced_during_the_load(
    checkpoint: Callable[[str], Path],
    s3_server: SeaweedFS,
    generated: Callable[..., tuple[list[dict[str, Any]], str]],
    faulty_plugin: str,
    tmp_path: Path,
) -> None:
    """A shard is replaced by one of the same layout after the headers were read: the new one is not used."""
    directory = checkpoint("llama")
    shard = min(directory.glob("*.safetensors"))
    other = tmp_path / shard.name
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, other, {"format": "pt"})
    assert shard.stat().st_size == other.stat().st_size
    run = {"model": str(directory), "tensor_parallel": 1}
    runs: list[dict[str, Any]] = [{**run, "load_format": "auto"}]
    for fallback in ("1", ""):
        copy = shutil.copytree(directory, tmp_path / f"copy{fallback}")
        uri = s3_server.upload(directory, "models", f"vllm/replaced{fallback}")
        for place, environ in ((str(copy), {}), (uri, s3_server.environ())):
            replacement = {"TEST_REPLACEMENT": str(other), "TEST_REPLACED": f"{place}/{shard.name}"}
            combined = {**environ, **replacement, "MX_MODEL_URI": place, "MX_FALLBACK": fallback}
            runs.append({**run, "load_format": "mx", "environ": combined})

    results, _ = generated(runs, PYTHONPATH=faulty_plugin)

    own, *others = results
    assert "tokens" in own
    assert [own, own] == others[:2]
    for failed in others[2:]:
        assert "SourceChangedError" in failed.get("error", ""), failed
        assert shard.name in failed["error"]


@pytest.mark.timeout(1800)
def test_all_ranks_use_the_same_source(
    checkpoint: Callable[[str], Path],
    generated: Callable[..., tuple[list[dict[str, Any]], str]],
    faulty_plugin: str,
    tmp_path: Path,
) -> None:
    """With MX_FALLBACK=1, if one of two ranks or both cannot load their weights, vLLM's own loader loads both ranks."""
    directory = checkpoint("llama")
    run = {"model": str(directory), "tensor_parallel": 2}
    one = {"MX_MODEL_URI": f"refusing://{directory}"}
    neither = {"MX_MODEL_URI": str(tmp_path / "nowhere")}

    results, printed = generated(
        [
            {**run, "load_format": "auto"},
            {**run, "load_format": "mx", "environ": one},
            {**run, "load_format": "mx", "environ": neither},
        ],
        PYTHONPATH=faulty_plugin,
        MX_FALLBACK="1",
    )

    own, *others = results
    assert "tokens" in own, own
    assert [own, own] == others
    assert 1 == printed.count("into a new model (MX_FALLBACK=0 prevents this): could not read")
    assert 1 == printed.count("could not load the weights of another rank, so vLLM's own loader loads all")
    assert 2 == printed.count("into the model, which is still unchanged")


@pytest.mark.timeout(1800)
def test_without_fallback_a_failing_rank_ends_the_start(
    checkpoint: Callable[[str], Path],
    generated: Callable[..., tuple[list[dict[str, Any]], str]],
    faulty_plugin: str,
) -> None:
    """By default the failing rank logs the reason, and the other rank does not wait forever."""
    directory = checkpoint("llama")
    run = {"model": str(directory), "load_format": "mx", "tensor_parallel": 2}

    results, printed = generated([run], PYTHONPATH=faulty_plugin, MX_MODEL_URI=f"refusing://{directory}")

    assert "error" in results[0]
    assert "the second rank may not read" in printed
    assert "vLLM's own loader" not in printed


@pytest.mark.timeout(1800)
def test_if_the_cache_of_the_server_fails_the_weights_come_from_mx_model_uri(
    checkpoint: Callable[[str], Path],
    s3_server: SeaweedFS,
    generated: Callable[..., tuple[list[dict[str, Any]], str]],
    faulty_plugin: str,
    tmp_path: Path,
) -> None:
    """It is down, or knows no such token, or ends while two ranks read it; the log says why. Without it: an error."""
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", "vllm/cache-fails")
    tokens = tmp_path / "tokens"
    tokens.write_text(f"worker:{32 * 'a'}\n")
    wrong = tmp_path / "token"
    wrong.write_text(32 * "b")
    caching = {**s3_server.environ(), "MX_CACHE_SOURCES": "s3,hf", "MX_CACHE_MIN_FREE_BYTES": "1"}
    authenticating = {**caching, "MX_AUTH_MODE": "token", "MX_AUTH_TOKENS_PATH": str(tokens)}
    down = f"http://127.0.0.1:{_unused_port()}"
    with (
        Server("--cache-dir", str(tmp_path / "ends"), **caching) as ends,
        Server("--cache-dir", str(tmp_path / "ends-too"), **caching) as ends_too,
        Server("--cache-dir", str(tmp_path / "refuses"), **authenticating) as refuses,
    ):
        environ = {**s3_server.environ(), "MX_MODEL_URI": uri, "MODEL_EXPRESS_NO_SHARED_STORAGE": "1"}
        run = {"model": str(directory), "load_format": "mx", "tensor_parallel": 1}
        servers: dict[str, dict[str, Any]] = {
            down: {},
            refuses.url: {"MX_AUTH_TOKEN_PATH": str(wrong)},
        }
        runs = [{**run, "environ": {**environ, "MODEL_EXPRESS_URL": url, **more}} for url, more in servers.items()]
        kill = {**environ, "MODEL_EXPRESS_URL": ends_too.url, "TEST_KILL_SERVER": str(ends_too.process_id)}
        for variables in ({**runs[1]["environ"]}, kill):
            only_cache = f"mx://{variables['MODEL_EXPRESS_URL'].removeprefix('http://')}/s3/models/vllm/cache-fails"
            runs.append({**run, "environ": {**variables, "MX_MODEL_URI": only_cache}})
        results, printed = generated(
            [{**run, "load_format": "auto"}, *runs], PYTHONPATH=faulty_plugin, MX_RETRY_ATTEMPTS="3"
        )
        [two_ranks], printed_by_two = generated(
            [{**run, "tensor_parallel": 2}],
            **environ,
            PYTHONPATH=faulty_plugin,
            MODEL_EXPRESS_URL=ends.url,
            TEST_KILL_SERVER=str(ends.process_id),
            MX_RETRY_ATTEMPTS="3",
        )

    own, *ours, refused, ended = results
    assert "tokens" in own, own
    assert [own] * 2 == ours
    assert _first_tokens(own) == _first_tokens(two_ranks)
    assert ["s3"] * 2 == re.findall(r"ModelExpress loaded (\w+)://", printed)
    # The other rank may have loaded all from MX_MODEL_URI, since the server had ended before: it does so again.
    assert ["s3"] * 2 == re.findall(r"ModelExpress loaded (\w+)://", printed_by_two)[-2:]
    assert "ModelExpress loaded mx" not in printed_by_two
    lines = re.findall(r"ModelExpress reads .* from s3://.*because MX_MODEL_URI names it.*", printed)
    assert 2 == len(lines)
    for line, url in zip(lines, servers, strict=True):
        assert f"mx://{url.removeprefix('http://')}/s3/models/vllm/cache-fails was tried first: " in line
    assert "UNAUTHENTICATED" in lines[1]
    assert "UNAUTHENTICATED" in refused.get("error", ""), refused
    assert re.search(r"could not read .* of mx://.*UNAVAILABLE", ended.get("error", "")), ended
    assert "because MX_MODEL_URI names it, and no worker is read: " in printed_by_two
    assert ", and the server's cache is not used: it failed: " in printed_by_two
    assert 2 == printed_by_two.count(
        "ModelExpress loads the weights into a new model, because the server's cache failed"
    )
