"""Loads from a GCS emulator: right, damaged on the way, changed while loading, and by the command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import modelexpress_core as mx
from devtools.fake_gcs import FakeGcs
from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.events import LoadStarted


@pytest.fixture(scope="session")
def in_gcs(gcs_server: FakeGcs, sharded: Path) -> str:
    """The URI of the generated checkpoint in the emulator."""
    return gcs_server.upload(sharded, "models", "sharded")


@pytest.fixture
def environ(gcs_server: FakeGcs) -> dict[str, str]:
    return {**gcs_server.environ(), "MX_RETRY_BUDGET_SECONDS": "20"}


def test_a_checkpoint_is_equal_to_what_safetensors_reads(
    in_gcs: str, sharded: Path, environ: dict[str, str], expected: Any, assert_equal: Any
) -> None:
    """Every tensor arrives bit by bit."""
    assert_equal(expected(sharded), mx.load_state_dict(in_gcs, environ=environ))


def test_the_command_loads_and_verifies(
    mx: Callable[..., Any], in_gcs: str, sharded: Path, environ: dict[str, str], tmp_path: Path, expected: Any
) -> None:
    """Every generation, size and CRC32C is checked; the tensors' bytes are those that safetensors reads."""
    done = mx("load", in_gcs, "--json", "--digests", str(tmp_path / "digests.json"), environ=environ)

    assert (0, "") == (done.returncode, done.stderr)
    report = json.loads(done.stdout)
    assert {"versions": 3, "sizes": 3, "digests": 3} == report["verified"]
    assert "mx-gcs" == report["storage"]["plugin"]
    assert report["bytes_needed"] == report["bytes_fetched"]
    import torch

    reference = {
        name: hashlib.sha256(bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())).hexdigest()
        for name, tensor in expected(sharded).items()
    }
    assert reference == json.loads((tmp_path / "digests.json").read_text())


def test_the_command_pulls_every_file(
    mx: Callable[..., Any], in_gcs: str, sharded: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    """``mx pull`` makes a directory with the same bytes."""
    done = mx("pull", in_gcs, str(tmp_path / "copy"), environ=environ)

    assert 0 == done.returncode, done.stderr
    for file in sharded.iterdir():
        assert file.read_bytes() == (tmp_path / "copy" / file.name).read_bytes()


def test_a_bit_that_flips_on_the_way_is_found(gcs_server: FakeGcs, in_gcs: str) -> None:
    """The CRC32C that GCS keeps does not fit, nor after the bytes were read again: the load fails."""

    def flip(_number: int, head: bytes) -> Fault | None:
        return Fault("flip", after_bytes=1000, of_body=True) if b"GET /download/" in head else None

    with TcpProxy("127.0.0.1", gcs_server.port, flip) as proxy:
        environ = {"STORAGE_EMULATOR_HOST": f"127.0.0.1:{proxy.port}", "MX_RETRY_BUDGET_SECONDS": "5"}
        with pytest.raises(mx.ModelExpressError) as caught:
            mx.load_state_dict(f"{in_gcs}/model-00001-of-00003.safetensors", environ=environ)

    assert isinstance(caught.value, (mx.IntegrityError, mx.CheckpointError))


def test_a_bad_network_does_not_change_a_load(
    gcs_server: FakeGcs, in_gcs: str, sharded: Path, expected: Any, assert_equal: Any
) -> None:
    """Every third answer is cut, reset or refused; the load is complete and right."""
    kinds = ("reset", "truncate", "unavailable")

    def policy(number: int, head: bytes) -> Fault | None:
        if number % 3 or b"GET /download/" not in head:
            return None
        return Fault(kinds[number // 3 % 3], after_bytes=5000, of_body=True)  # type: ignore[arg-type]

    with TcpProxy("127.0.0.1", gcs_server.port, policy) as proxy:
        environ = {"STORAGE_EMULATOR_HOST": f"127.0.0.1:{proxy.port}", "MX_RETRY_BUDGET_SECONDS": "60"}
        state = mx.load_state_dict(in_gcs, environ=environ)

    assert_equal(expected(sharded), state)


def test_an_object_that_is_replaced_during_a_load_fails_it(
    gcs_server: FakeGcs, sharded: Path, environ: dict[str, str]
) -> None:
    """Bytes of two generations are never mixed; the error names the object."""
    name = "replaced/model.safetensors"
    content = (sharded / "model-00001-of-00003.safetensors").read_bytes()
    gcs_server.put(name, content)

    class Replacing:
        @mx.hookimpl
        def mx_load_started(self, event: LoadStarted) -> None:
            gcs_server.put(name, content)

    plugins = mx.PluginManager.discover(environ)
    plugins.register(Replacing(), name="replacing")
    with pytest.raises(mx.SourceChangedError, match=f"gs://models/{name}"):
        mx.load_state_dict(f"gs://models/{name}", environ=environ, plugins=plugins)
