"""The client that others have, unchanged, against our server; and both clients in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modelexpress_core as mx
from devtools.fake_hub import FakeHub
from devtools.models import generate_sharded
from modelexpress_core.contracts.identity import Engine
from modelexpress_core.sources.worker_service import WorkerServer
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from tests.support.tools import skip_without
from tests.support.waiting import eventually

_ROOT = Path(__file__).resolve().parents[2]
_SOURCE_ID = "5a5f555570065064"
_TOKEN = "t0ken" * 8
_PROGRAM = Path(__file__).with_name("existing_client.py")
_CACHE_PROGRAM = Path(__file__).with_name("existing_cache_client.py")

#: What the client needs, and ours beside it. Its own requirements would bring torch and NIXL.
_REQUIREMENTS = ("grpcio", "protobuf<7", "google-crc32c", "huggingface_hub", "pydantic", "attrs", "pluggy")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with the client 0.7.0 from PyPI."""
    environment = tmp_path_factory.mktemp("existing") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    for arguments in (_REQUIREMENTS, ("--no-deps", "modelexpress==0.7.0")):
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            skip_without(f"a package index that has {' '.join(arguments)}: {done.stderr[-500:]}")
    return python


@pytest.mark.timeout(600)
def test_it_publishes_lists_gets_and_updates(python: str, start: Callable[..., Any], tmp_path: Path) -> None:
    """With its token, and the ids that it computes elsewhere; what either client publishes, the other finds.

    And it reads what a worker of ours offers, under a lease. Neither is offered the other's tensors of the same model.
    """
    (tmp_path / "token").write_text(_TOKEN)
    (tmp_path / "tokens").write_text(f"workers:{_TOKEN}\n")
    serving = start(MX_AUTH_MODE="token", MX_AUTH_TOKENS_PATH=str(tmp_path / "tokens"))
    tensors = [p2p_pb2.TensorDescriptor(name=name, addr=1, size=2) for name in ("a", "b")]
    manifest = p2p_pb2.GetTensorManifestResponse(tensors=tensors, mx_source_id=_SOURCE_ID, worker_id="w-1")
    environ = {
        "MODEL_EXPRESS_URL": serving.url,
        "MX_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "MX_WORKER_HOST": "127.0.0.1",
        "MX_WORKER_GRPC_PORT": "0",
    }
    weights = {"w": torch.zeros(2048, dtype=torch.bfloat16)}
    identity = mx.own_identity(
        "deepseek-ai/DeepSeek-V3",
        weights,
        engine=Engine.VLLM,
        content_version="1",
        tensor_parallel_size=8,
        dtype="bfloat16",
    )
    with (
        WorkerServer(manifest, "127.0.0.1:0") as worker,
        mx.publish(weights, identity=identity, worker_rank=3, environ=environ) as offer,
    ):
        assert eventually(lambda: offer.state.status == "ready")
        done = subprocess.run(
            [python, str(_PROGRAM), serving.url, f"127.0.0.1:{worker.port}"],
            env={**os.environ, "PYTHONPATH": str(_ROOT), "MX_AUTH_TOKEN_PATH": str(tmp_path / "token")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert 0 == worker.leases.out()
        found = mx.explain("memory://nowhere/model", weights, identity, worker_rank=3, environ=environ)

    assert done.returncode == 0, done.stderr
    assert {
        "source_id": _SOURCE_ID,
        "ready before": [],
        "updated": True,
        "updated another": False,
        "listed": ["w-1", 3, 0.25, {"rack": "7"}],
        "found all": True,
        "found another": False,
        "seen by us": ["w-1"],
        "seen by them": ["w-1", "w-2"],  # and not what ``offer`` published
        "read from a worker": ["a", "b"],
        "manifest": 2,
        "through a service": [_SOURCE_ID, ["a", "b"]],
        "another source": "FAILED_PRECONDITION",
    } == json.loads(done.stdout)
    ours, *others = [place for place in found.places if place.worker_id]
    assert ("chosen", offer.worker_id) == (ours.status, ours.worker_id)
    assert {("w-1", "unusable"), ("w-2", "unusable")} == {(each.worker_id, each.status) for each in others}
    for place in others:
        assert {"content_version", "layout_signature", "mx_version"} <= {name for name, _, _ in place.differences}


@pytest.mark.timeout(600)
def test_it_installs_a_model_from_the_cache(python: str, start: Callable[..., Any], tmp_path: Path) -> None:
    """First what is no weights, then the weights, into the snapshot that the Hub's own library finds; byte for byte."""
    source = generate_sharded(tmp_path / "source", shards=2, layers=2, hidden=512)
    (source / "config.json").write_text("{}")
    (source / "empty.txt").write_text("")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    weights = {name for name in files if name.endswith(".safetensors")}
    with FakeHub() as hub:
        hub.upload(source, "org/model")
        commit = hub.repositories["org/model"].branches["main"]
        serving = start("--cache-dir", str(tmp_path / "cache"), MX_CACHE_MIN_FREE_BYTES="1", **hub.environ())
        directory = tmp_path / "installed"
        done = subprocess.run(
            [python, str(_CACHE_PROGRAM), serving.url, str(directory)],
            env={**os.environ, "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            check=False,
        )
    assert not done.returncode, done.stderr
    answers = json.loads(done.stdout)

    assert commit == answers["commit"]
    assert {name: len(files[name]) for name in files if name not in weights} == answers["listed"]
    assert {name: len(content) for name, content in files.items()} == answers["all"]
    assert str(directory / "models--org--model" / "snapshots" / commit) == answers["snapshot"]
    assert sorted(set(files) - weights) == answers["first"]
    assert sorted(files) == answers["second"]
    for snapshot in (answers["snapshot"], answers["whole"]):
        assert files == {path.name: path.read_bytes() for path in Path(snapshot).iterdir()}
    assert "org/none" in answers["error"]
