"""Loads from a real S3 server: right, missing, forbidden, deleted while loading, and from a server that is gone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from torch import nn

import modelexpress_core as mx
from devtools.seaweedfs import SeaweedFS
from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.events import LoadFailed, LoadFinished, LoadProgress, LoadStarted
from tests.support.signals import with_default_signals


class Observer:
    """Keeps every event; does something when the load starts."""

    def __init__(self, on_start: Callable[[], object] = lambda: None) -> None:
        self.events: list[Any] = []
        self._on_start = on_start

    @mx.hookimpl
    def mx_load_started(self, event: LoadStarted) -> None:
        self.events.append(event)
        self._on_start()

    @mx.hookimpl
    def mx_load_progress(self, event: LoadProgress) -> None:
        self.events.append(event)

    @mx.hookimpl
    def mx_load_finished(self, event: LoadFinished) -> None:
        self.events.append(event)

    @mx.hookimpl
    def mx_load_failed(self, event: LoadFailed) -> None:
        self.events.append(event)


def observed(environ: dict[str, str], observer: Observer) -> mx.PluginManager:
    plugins = mx.PluginManager.discover(environ)
    plugins.register(observer, name="observer")
    return plugins


def through(server: SeaweedFS, policy: Callable[[int, bytes], Fault | None] | None = None) -> TcpProxy:
    port = urlsplit(server.endpoint).port
    assert port is not None
    return TcpProxy("127.0.0.1", port, policy)


# -- right ----------------------------------------------------------------------------------------------------------


def test_a_module_is_loaded_in_place(
    s3_server: SeaweedFS, tmp_path: Path, environ: dict[str, str], assert_equal: Any
) -> None:
    """Parameters keep their memory; ties are kept; the report says that nothing was read twice."""
    from safetensors.torch import save_file

    def build() -> nn.Module:
        model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 1000))
        model[3].weight = model[0].weight
        return model

    reference, model = build(), build()
    stored = {name: tensor for name, tensor in reference.state_dict().items() if name != "3.weight"}
    save_file(stored, tmp_path / "model.safetensors")
    uri = s3_server.upload(tmp_path, "models", "module")
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}

    report = mx.load_into(model, uri, environ=environ)

    assert_equal(reference.state_dict(), model.state_dict())
    assert addresses == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert report.bytes_needed == report.bytes_fetched == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_part_from_s3(
    rank: int, uploaded: str, sharded: Path, environ: dict[str, str], expected: Any
) -> None:
    """Code that narrows and copies, as for column-parallel weights, reads half of each."""
    reference = expected(sharded)
    parts = {name: torch.empty_like(tensor.chunk(2)[rank]) for name, tensor in reference.items()}

    with mx.deferred_weights(uploaded, model=parts, environ=environ) as weights:
        for name, tensor in weights:
            part = parts[name]
            part.copy_(tensor.narrow(0, rank * part.shape[0], part.shape[0]))

    for name, tensor in reference.items():
        half = tensor.chunk(2)[rank]
        assert torch.equal(half.flatten().view(torch.uint8), parts[name].flatten().view(torch.uint8)), name
    total = sum(tensor.nbytes for tensor in reference.values())
    assert weights.report is not None
    assert weights.report.bytes_needed == total // 2
    assert weights.report.bytes_fetched <= 0.55 * total


def test_observers_see_the_load_from_start_to_end(uploaded: str, environ: dict[str, str]) -> None:
    """One start, then progress that only grows up to everything, then one finish, all of one load."""
    observer = Observer()

    mx.load_state_dict(uploaded, environ=environ, plugins=observed(environ, observer))

    first, *middle, last = observer.events
    assert isinstance(first, LoadStarted)
    assert isinstance(last, LoadFinished)
    assert middle
    assert all(isinstance(event, LoadProgress) for event in middle)
    done = [event.bytes_done for event in middle]
    assert done == sorted(done)
    assert done[-1] == middle[-1].bytes_planned == first.checkpoint_bytes
    assert len({event.load_id for event in observer.events}) == 1


# -- missing, forbidden ---------------------------------------------------------------------------------------------


def failure(uri: str, environ: dict[str, str], **changed: str) -> mx.ModelExpressError:
    environ = {**environ, "MX_RETRY_BUDGET_SECONDS": "1", **changed}
    with pytest.raises(mx.ModelExpressError) as caught:
        mx.load_state_dict(uri, environ=environ)
    text = f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"
    assert environ["AWS_SECRET_ACCESS_KEY"] not in text
    return caught.value


def test_a_missing_bucket_is_named(environ: dict[str, str]) -> None:
    """The message names the bucket and says that it does not exist."""
    error = failure("s3://no-such-bucket/model", environ)

    assert isinstance(error, mx.NotFoundError)
    assert "s3://no-such-bucket" in str(error)
    assert error.hint


def test_a_missing_model_is_named(uploaded: str, environ: dict[str, str]) -> None:
    """An empty place, and a missing file, are not found."""
    for uri in (f"{uploaded}-not", f"{uploaded}/no.safetensors"):
        error = failure(uri, environ)

        assert isinstance(error, mx.NotFoundError)
        assert uri in str(error)


def test_a_missing_shard_is_named(s3_server: SeaweedFS, sharded: Path, tmp_path: Path, environ: dict[str, str]) -> None:
    """An incomplete upload is an error before a byte of weights moves."""
    shutil.copytree(sharded, tmp_path / "model")
    (tmp_path / "model" / "model-00002-of-00003.safetensors").unlink()

    error = failure(s3_server.upload(tmp_path / "model", "models", "incomplete"), environ)

    assert isinstance(error, mx.CheckpointError)
    assert "model-00002-of-00003.safetensors" in str(error)


def test_a_truncated_shard_is_named(
    s3_server: SeaweedFS, sharded: Path, tmp_path: Path, environ: dict[str, str]
) -> None:
    """A shard that was cut short is an error before a byte of weights moves."""
    shutil.copytree(sharded, tmp_path / "model")
    os.truncate(tmp_path / "model" / "model-00003-of-00003.safetensors", 1_000_000)

    error = failure(s3_server.upload(tmp_path / "model", "models", "truncated"), environ)

    assert isinstance(error, mx.CheckpointError)
    assert "model-00003-of-00003.safetensors" in str(error)
    assert "cut short" in str(error)


def test_a_stranger_is_refused(s3_server: SeaweedFS, uploaded: str) -> None:
    """Valid credentials without the right to read."""
    error = failure(uploaded, s3_server.environ("stranger"))

    assert isinstance(error, mx.AccessDeniedError)
    assert uploaded.rpartition("/")[0] in str(error)


def test_wrong_credentials_are_refused(uploaded: str, environ: dict[str, str]) -> None:
    """A wrong secret fails at once, and does not appear in the message."""
    error = failure(uploaded, environ, AWS_SECRET_ACCESS_KEY="wrong-but-private")

    assert isinstance(error, mx.AccessDeniedError)


def test_an_endpoint_where_nobody_listens_is_named(uploaded: str, environ: dict[str, str]) -> None:
    """A refused connection names the endpoint, and how often it was tried."""
    error = failure(uploaded, environ, AWS_ENDPOINT_URL="http://127.0.0.1:9")

    assert isinstance(error, mx.UnavailableError)
    assert "127.0.0.1:9" in str(error)
    assert error.attempts > 1


# -- deleted while loading --------------------------------------------------------------------------------------------


def test_a_shard_that_is_deleted_during_the_load_fails_it(
    s3_server: SeaweedFS, sharded: Path, environ: dict[str, str]
) -> None:
    """It is not found any more, and the message names it."""
    uri = s3_server.upload(sharded, "models", "vanishing")
    client = s3_server.client()
    key = "vanishing/model-00001-of-00003.safetensors"
    observer = Observer(lambda: client.delete_object(Bucket="models", Key=key))

    with pytest.raises(mx.NotFoundError, match="model-00001-of-00003"):
        mx.load_state_dict(uri, environ=environ, plugins=observed(environ, observer))

    client.close()


# -- a server that is gone, or silent --------------------------------------------------------------------------------


def test_a_server_that_is_gone_fails_the_load_within_its_budget(
    s3_server: SeaweedFS, uploaded: str, environ: dict[str, str]
) -> None:
    """The load ends with an error soon after the budget is spent, not after every read has tried on its own."""
    proxy = through(s3_server)
    proxy.__enter__()
    environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "MX_RETRY_BUDGET_SECONDS": "1"}
    observer = Observer(proxy.__exit__)
    begun = time.monotonic()

    with pytest.raises(mx.UnavailableError):
        mx.load_state_dict(uploaded, environ=environ, plugins=observed(environ, observer))

    assert time.monotonic() - begun < 60


def test_ctrl_c_ends_a_slow_load_at_once(s3_server: SeaweedFS, uploaded: str, environ: dict[str, str]) -> None:
    """One message, exit code 130, though every read stalls."""

    def policy(number: int, head: bytes) -> Fault | None:
        return Fault("stall", 500) if number >= 5 and head.startswith(b"GET") else None

    with through(s3_server, policy) as proxy:
        environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.port}"
        process = subprocess.Popen(
            with_default_signals([sys.executable, "-m", "modelexpress_core", "load", uploaded]),
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while proxy.requests < 7 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)

        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        out, err = process.communicate(timeout=60)

    assert process.returncode == 130, err
    assert time.monotonic() - begun < 10
    assert out == ""
    assert "Interrupted" in err
    assert "Traceback" not in err
