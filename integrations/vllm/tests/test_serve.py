"""``vllm serve`` over its HTTP API, by environment variables alone and by ``mx vllm``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devtools.fake_hub import FakeHub
from devtools.seaweedfs import SeaweedFS
from integrations.vllm.tests.serving import SMALL, START_SECONDS, VLLM, environ_of, serving
from integrations.vllm.tests.workers import Server, install_unpacked_plugin

#: No program listens there.
_NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def expected(
    checkpoint: Callable[[str], Path], generated: Callable[..., tuple[list[dict[str, Any]], str]]
) -> list[int]:
    """The tokens with vLLM's own loader."""
    results, _ = generated([{"model": str(checkpoint("llama")), "load_format": "auto", "tensor_parallel": 1}])
    return [token for token, _ in results[0]["tokens"][1]]


@pytest.mark.timeout(1800)
def test_serving_by_environment_variables_alone(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, expected: list[int], tmp_path: Path
) -> None:
    """The directory has no weights, which are in S3. RUNAI_STREAMER_CONCURRENCY of another loader works too."""
    directory = checkpoint("llama")
    bare = shutil.copytree(directory, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*"))
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    environ = {
        **s3_server.environ(),
        "VLLM_PLUGINS": "modelexpress",
        "MX_MODEL_URI": s3_server.upload(directory, "models", "vllm/served"),
        "RUNAI_STREAMER_CONCURRENCY": "8",
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
    }

    with serving([sys.executable, "-c", VLLM, "serve", str(bare), "--load-format", "mx"], tmp_path, environ) as server:
        tokens = server.tokens(str(bare))
        measured = server.get("/metrics")
        printed = server.printed

    assert expected == tokens
    assert f"from {environ['MX_MODEL_URI']} with mx-s3, because MX_MODEL_URI names it" in printed
    assert 1 == printed.count("ModelExpress loaded ")
    assert "nothing reads the variable" not in printed
    labels = f'engine="vllm",model="{bare}"'
    assert f'mx_load_seconds_count{{{labels},outcome="success",scheme="s3"}} 1.0' in measured
    for phase in ("open", "load"):
        assert f'mx_load_phase_seconds_count{{{labels},phase="{phase}",scheme="s3"}} 1.0' in measured
    for kind in ("needed", "fetched"):
        assert re.search(rf'mx_load_bytes_total{{engine="vllm",kind="{kind}",.*scheme="s3"}} \d', measured)


@pytest.mark.timeout(1800)
def test_serving_with_only_a_bucket(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, expected: list[int], tmp_path: Path
) -> None:
    """``mx vllm`` needs only the URI, and serves the model under its name in the bucket."""
    uri = s3_server.upload(checkpoint("llama"), "models", "vllm/bucket/tiny-llama")
    mx = str(Path(sys.executable).with_name("mx"))

    with serving([mx, "vllm", uri, "--"], tmp_path, {**s3_server.environ(), "VLLM_PLUGINS": "others"}) as server:
        tokens = server.tokens("tiny-llama")
        printed = server.printed

    assert expected == tokens
    assert 1 == printed.count("ModelExpress loaded ")
    copied = [path for path in (tmp_path / "cache" / "modelexpress").rglob("*") if path.is_file()]
    assert "config.json" in {path.name for path in copied}
    assert [] == [path for path in copied if path.suffix == ".safetensors"]


@pytest.mark.timeout(1800)
def test_a_name_is_served_without_the_hub_first_from_the_server_then_from_a_worker(
    checkpoint: Callable[[str], Path], expected: list[int], tmp_path: Path
) -> None:
    """No shared storage, by variables alone: the server downloads the model; vLLM has no way to the Hub.

    The second engine reads the first, and gets configuration and tokenizer from the server too, with HF_HUB_OFFLINE=1.
    """
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    install_unpacked_plugin(plugin)
    caching = ("--cache-dir", str(tmp_path / "server"))
    command = [sys.executable, "-c", VLLM, "serve", "org/tiny", "--load-format", "mx"]
    with FakeHub() as hub:
        hub.upload(checkpoint("llama"), "org/tiny")
        with Server(*caching, **hub.environ(), MX_CACHE_SOURCES="hf", MX_CACHE_MIN_FREE_BYTES="1") as server:
            environ = {
                "HF_ENDPOINT": _NOWHERE,
                "HF_HOME": str(tmp_path / "nothing"),
                "HF_HUB_OFFLINE": "0",
                "VLLM_PLUGINS": "modelexpress,unpacked",
                "PYTHONPATH": os.pathsep.join([str(plugin), os.environ.get("PYTHONPATH", "")]),
                "MODEL_EXPRESS_URL": server.url,
                "MODEL_EXPRESS_NO_SHARED_STORAGE": "1",
                "MX_WORKER_HOST": "127.0.0.1",
                "MX_WORKER_GRPC_PORT": "0",
                "MX_DISABLED_PLUGINS": "mx-nixl",
            }
            with serving(command, tmp_path / "first", environ) as first:
                server.wait_for(1)
                tokens = first.tokens("org/tiny")
                with serving(command, tmp_path / "second", {**environ, "HF_HUB_OFFLINE": "1"}) as second:
                    more = second.tokens("org/tiny")
                    printed = [first.printed, second.printed]

    assert expected == tokens == more
    assert f"from mx://{server.url.removeprefix('http://')}/hf/org/tiny?revision=" in printed[0]
    why = "because the server's cache has it, and vLLM's configuration came from there, and no worker is read: "
    assert why in printed[0]
    assert [["mx"], ["grpc"]] == [re.findall(r"ModelExpress loaded (\w+)://", each) for each in printed], printed[1]
    for each, directory in zip(printed, ("first", "second"), strict=True):
        assert 1 == each.count("ModelExpress got configuration and tokenizer of org/tiny")
        copied = {path.name for path in (tmp_path / directory / "cache").rglob("*") if path.is_file()}
        assert {"config.json", "tokenizer.json"} <= copied
        assert not {name for name in copied if name.endswith(".safetensors")}
    assert not (tmp_path / "nothing" / "hub").exists()


@pytest.mark.timeout(600)
def test_wrong_settings_end_the_start_with_our_message_last(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """``vllm serve`` starts no engine. The end of its output says what to do."""
    done = subprocess.run(
        [sys.executable, "-c", VLLM, "serve", str(checkpoint("llama")), "--load-format", "mx", *SMALL],
        env={**environ_of(tmp_path), "VLLM_PLUGINS": "modelexpress", "MX_MODEL_URI": "ss3://bucket/model"},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )

    printed = done.stdout + done.stderr
    assert 0 != done.returncode
    assert "UnknownSchemeError" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Next step: "), printed[-3000:]
    assert "EngineCore" not in printed
