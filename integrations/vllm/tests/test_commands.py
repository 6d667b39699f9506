"""``mx vllm`` and ``mx explain-vllm`` without vLLM: which source they choose, what they run, and what they refuse."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import modelexpress_core as mx
from devtools.fake_hub import FakeHub
from devtools.seaweedfs import SeaweedFS
from integrations.vllm.tests.workers import Server

_HEADER = b'{"model.norm.weight":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _nothing_configured(nothing_configured: None) -> None:
    pass


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(len(_HEADER).to_bytes(8, "little") + _HEADER + b"1234")
    return directory


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A function that runs ``mx`` with arguments; a program named vllm on the PATH prints how it was started."""
    programs = tmp_path / "bin"
    programs.mkdir()
    vllm = programs / "vllm"
    vllm.write_text('#!/bin/sh\necho "uri=$MX_MODEL_URI plugins=$VLLM_PLUGINS arguments=$*"\nexit 7\n')
    vllm.chmod(0o755)

    def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "modelexpress_core", *arguments],
            env={
                **os.environ,
                "PATH": f"{programs}:{os.environ['PATH']}",
                "XDG_CACHE_HOME": str(tmp_path / "cache"),
                "COLUMNS": "300",
                "HF_HUB_OFFLINE": "1",
                "HF_HOME": str(tmp_path / "hub"),
                **environ,
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=tmp_path,
        )

    return run


def _without_vllm() -> bool:
    return not Path(sys.executable).with_name("vllm").exists()


@pytest.mark.skipif(not _without_vllm(), reason="the environment has a real vLLM, which other tests start")
def test_vllm_replaces_the_command(run: Run, model: Path) -> None:
    """vLLM gets our arguments and the user's, MX_MODEL_URI is set, and its exit code is that of the command."""
    done = run("vllm", "tiny", "--", "--port", "80", VLLM_PLUGINS="others")

    expected = f"uri={model} plugins=others,modelexpress arguments=serve {model} --load-format mx"
    assert f"{expected} --served-model-name tiny --port 80\n" == done.stdout
    assert 7 == done.returncode


@pytest.mark.skipif(not _without_vllm(), reason="the environment has a vLLM")
def test_without_vllm_the_message_says_what_to_install(run: Run, model: Path) -> None:
    """The command fails before it starts a program, and gives the install command."""
    done = run("vllm", "tiny", PATH="/usr/bin:/bin")

    assert 1 == done.returncode
    assert "vLLM is not installed in this environment" in done.stderr
    assert "pip install vllm" in done.stderr


def test_small_files_of_a_bucket_are_copied(run: Run, model: Path, s3_server: SeaweedFS, tmp_path: Path) -> None:
    """Configuration and tokenizer are copied once; weights are not copied."""
    uri = s3_server.upload(model, "models", "commands/tiny")

    first = run("vllm", uri, "--dry-run", "--", "--load-format=modelexpress", **s3_server.environ())
    second = run("vllm", f"{uri}/model.safetensors", "--dry-run", **s3_server.environ())

    [copied] = [path for path in (tmp_path / "cache" / "modelexpress").iterdir() if path.is_dir()]
    assert {"config.json", "tokenizer.json"} == {path.name for path in copied.iterdir() if path.is_file()}
    assert f"MX_MODEL_URI={uri} " in first.stdout
    assert f" {copied} --served-model-name tiny --load-format=modelexpress\n" in first.stdout
    assert "0 B skipped" in first.stderr
    assert f"MX_MODEL_URI={uri}/model.safetensors " in second.stdout
    assert f" {copied} --load-format mx --served-model-name model.safetensors\n" in second.stdout
    assert "0 B copied" in second.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["tiny", "--", "--load-format", "auto"], 2, "needs --load-format mx, but the arguments set 'auto'"),
        (["tiny", "--", "--model", "other"], 2, "the URI is the model, but the arguments name another: other"),
        (["tiny", "--", "other"], 2, "the URI is the model, but the arguments name another: other"),
        (["tiny", "--port", "80"], 2, "No such option: --port"),
        ([], 2, "Missing argument"),
        (["tinny"], 1, "`vllm serve NAME --load-format mx` serves a model of the Hugging Face Hub"),
        (["zz://bucket/tiny"], 1, "zz"),
        (["tiny/bare"], 1, "holds no config.json"),
        (["memory://tiny", "--directory", "tiny/model.safetensors"], 1, "memory://tiny"),
    ],
)
def test_invalid_arguments_are_refused(run: Run, model: Path, arguments: list[str], code: int, expected: str) -> None:
    """The message says what is wrong; there is no traceback."""
    (model / "bare").mkdir()

    done = run("vllm", *arguments, "--dry-run") if "--" not in arguments else run("vllm", *arguments)

    assert code == done.returncode, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_that_cannot_be_used_are_refused(run: Run, model: Path) -> None:
    """vLLM is not started, and the message names the variables."""
    done = run("vllm", "tiny", MX_CONCURRENCY="many", MX_FALLBACK="perhaps")

    assert 1 == done.returncode
    assert "" == done.stdout
    assert "MX_CONCURRENCY='many'" in done.stderr
    assert "MX_FALLBACK='perhaps'" in done.stderr
    assert "Traceback" not in done.stderr


def test_explain_chooses_mx_model_uri(run: Run, model: Path, tmp_path: Path) -> None:
    """The place in MX_MODEL_URI is chosen, with its size. With MX_FALLBACK=1 vLLM's own loader is next."""
    alone = run("explain-vllm", "some/model", "--json", MX_MODEL_URI=str(model))
    done = run("explain-vllm", "some/model", "--json", MX_MODEL_URI=str(model), MX_FALLBACK="1")

    result = json.loads(done.stdout)
    first, second = result["places"]
    assert [first] == json.loads(alone.stdout)["places"]
    assert result["usable"]
    assert (model.as_uri(), "chosen", 1, 1, 4) == tuple(
        first[key] for key in ("place", "status", "tensors", "files", "bytes")
    )
    assert "MX_MODEL_URI" in first["why"]
    assert ("some/model", "next", "vLLM's own loader") == (second["place"], second["status"], second["reader"])


def test_explain_gives_the_reason_of_an_unusable_place(run: Run, model: Path) -> None:
    """An unusable place is shown with the reason; the exit code is 1 if no place is usable."""
    with_fallback = run("explain-vllm", "tiny", MX_MODEL_URI="/nowhere", MX_FALLBACK="1")
    without = run("explain-vllm", "tiny", MX_MODEL_URI="/nowhere")

    assert 0 == with_fallback.returncode
    assert "1. file:///nowhere: unusable" in with_fallback.stdout
    assert "nothing is there" in with_fallback.stdout
    assert "2. tiny: chosen" in with_fallback.stdout
    assert 1 == without.returncode
    assert "vLLM could not load the weights from any of these places" in without.stdout


def test_explain_without_mx_model_uri(run: Run, model: Path) -> None:
    """Shows a directory, a name on the Hub, a directory without weights, and a URI."""
    directory = run("explain-vllm", "tiny")
    hub = run("explain-vllm", "some/model")
    (model / "model.safetensors").unlink()
    bare = run("explain-vllm", "tiny")
    uri = run("explain-vllm", "memory://tiny")

    assert f"1. {model.as_uri()}: chosen" in directory.stdout
    assert "1 tensors, 4 B in 1 file" in directory.stdout
    assert "vLLM downloads it from the Hugging Face Hub" in hub.stdout
    assert 1 == bare.returncode
    assert "the directory has no weights" in bare.stdout
    assert 1 == uri.returncode
    assert "mx vllm memory://tiny" in uri.stdout


def test_settings_of_the_integration_are_listed(run: Run) -> None:
    """``mx settings`` lists them with their values and without secrets, under the owner mx-vllm."""
    done = run("settings", "--json", MX_MODEL_URI="s3://key:hunter2@bucket/model", MX_FALLBACK="0")

    found = {setting["name"]: setting for setting in json.loads(done.stdout) if setting["owner"] == "mx-vllm"}
    assert {"MX_MODEL_URI", "MX_FALLBACK", "MX_SOURCE_QUERY_TIMEOUT"} == set(found)
    assert "False" == found["MX_FALLBACK"]["value"]
    assert "s3://***@bucket/model" == found["MX_MODEL_URI"]["value"]
    assert "hunter2" not in done.stdout


def test_explain_shows_the_cache_of_the_server(run: Run, model: Path, tmp_path: Path) -> None:
    """It is chosen for a name of the Hub; without variables that say so, and while the server is down, it is not."""
    nowhere = "http://127.0.0.1:9"
    cache = tmp_path / "server"
    with FakeHub() as hub:
        hub.upload(model, "org/tiny")
        caching = {**hub.environ(), "MX_CACHE_SOURCES": "hf", "MX_CACHE_MIN_FREE_BYTES": "1"}
        with Server("--cache-dir", str(cache), **caching) as server:
            used = {
                "MODEL_EXPRESS_URL": server.url,
                "MODEL_EXPRESS_NO_SHARED_STORAGE": "1",
                "HF_ENDPOINT": nowhere,
                "HF_HUB_OFFLINE": "0",
            }
            streamed = run("explain-vllm", "org/tiny", "--json", **used)
            shared = run(
                "explain-vllm",
                "org/tiny",
                **{**used, "MODEL_EXPRESS_NO_SHARED_STORAGE": "0", "MODEL_EXPRESS_CACHE_DIRECTORY": str(cache)},
            )
            named = run("explain-vllm", "x/y", **{**used, "HF_ENDPOINT": hub.url}, MX_MODEL_URI="hf://org/tiny")
            unused = run(
                "explain-vllm",
                "x/y",
                MODEL_EXPRESS_URL=server.url,
                MX_MODEL_URI="hf://org/tiny",
                HF_ENDPOINT=hub.url,
                HF_HUB_OFFLINE="0",
            )
    down = run("explain-vllm", "org/tiny", **{**used, "MODEL_EXPRESS_URL": nowhere})

    [place] = [each for each in json.loads(streamed.stdout)["places"] if each["place"] != "other workers"]
    assert place["place"].startswith(f"mx://{server.url.removeprefix('http://')}/hf/org/tiny?revision=")
    assert ("chosen", 1, 4) == (place["status"], place["tensors"], place["bytes"])
    assert place["why"].startswith("the server's cache has it, and vLLM gets the configuration from there")
    assert f"{cache.as_uri()}/models--org--tiny/snapshots/" in shared.stdout
    assert "because the server's cache has it, in MODEL_EXPRESS_CACHE_DIRECTORY, and vLLM gets" in shared.stdout
    assert "/hf/org/tiny: chosen" in named.stdout
    assert "because the server's cache has it, and MX_MODEL_URI names it" in named.stdout
    assert "hf://org/tiny: next" in named.stdout
    assert "hf://org/tiny: chosen" in unused.stdout
    assert "the cache of the server: unusable" in unused.stdout
    assert "no variable says that it is used; set MODEL_EXPRESS_NO_SHARED_STORAGE=1" in unused.stdout
    assert "1. the cache of the server, for org/tiny: unusable" in down.stdout
    assert "127.0.0.1:9" in down.stdout
    assert "2. org/tiny: chosen" in down.stdout


def test_explain_lists_workers_first(run: Run, model: Path, s3_server: SeaweedFS) -> None:
    """One that may be read, and one with another version of the checkpoint, which is not."""
    variables = {"MX_MODEL_URI": s3_server.upload(model, "models", "vllm/explained"), **s3_server.environ()}
    content = mx.open_checkpoint(variables["MX_MODEL_URI"], environ=variables).content_version
    here = {"MX_WORKER_HOST": "127.0.0.1", "MX_WORKER_GRPC_PORT": "0", "MX_BULK_PORT": "0"}
    tensors = {"model.norm.weight": torch.ones(2)}
    with Server() as server, contextlib.ExitStack() as offers:
        variables["MODEL_EXPRESS_URL"] = server.url
        for version in (content, "another"):
            identity = mx.own_identity("tiny", tensors, content_version=version)
            offers.enter_context(
                mx.publish(tensors, identity=identity, transports=["grpc"], environ={**variables, **here})
            )
        server.wait_for(2)
        found = json.loads(run("explain-vllm", "tiny", "--json", **variables).stdout)
        shown = run("explain-vllm", "tiny", **variables).stdout

    assert found["usable"]
    places = {each["status"]: each for each in found["places"] if each["place"] != "the cache of the server"}
    assert {"possible", "unusable", "chosen"} == places.keys()
    assert places["possible"]["place"].startswith("grpc://127.0.0.1:")
    assert "content_version is another" in places["unusable"]["problem"]
    assert places["chosen"]["place"] == variables["MX_MODEL_URI"]
    assert "possible" in shown
