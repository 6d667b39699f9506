"""Workers that read from each other, as users run them: a server, published models, loads with an identity."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

import modelexpress_core as mx
from devtools.seaweedfs import SeaweedFS
from modelexpress_core.errors import BackendError, IntegrityError
from modelexpress_core.events import LoadFailed, LoadStarted
from tests.support.peers import identity_of, tensors_of
from tests.support.serving import Serving
from tests.support.waiting import eventually

Start = Callable[..., Serving]
Worker = Callable[[Serving, int], subprocess.Popen[str]]

_MIB = 64


@pytest.fixture
def worker() -> Iterator[Worker]:
    """Starts a worker in a process of its own; returns when it is ready."""
    with contextlib.ExitStack() as running:

        def worker(serving: Serving, mib: int) -> subprocess.Popen[str]:
            program = Path(__file__).with_name("peer_worker.py")
            process = subprocess.Popen(
                [sys.executable, str(program), serving.url, str(mib)],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            running.callback(process.wait)
            running.callback(process.kill)
            assert process.stdout is not None
            running.callback(process.stdout.close)
            assert process.stdout.readline(), "the worker has not started"
            return process

        yield worker


def environ(serving: Serving, **more: str) -> dict[str, str]:
    return {"MODEL_EXPRESS_URL": serving.url, "MX_WORKER_GRPC_PORT": "0", "MX_WORKER_HOST": "127.0.0.1", **more}


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """The model on a disk, for when no worker has it."""
    save_file(dict(tensors_of(_MIB)), tmp_path / "model.safetensors")
    return tmp_path.as_uri()


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors_of(_MIB).items()}


def assert_loaded(tensors: Mapping[str, torch.Tensor]) -> None:
    assert [name for name, tensor in tensors_of(_MIB).items() if not torch.equal(tensor, tensors[name])] == []


class Events:
    """Calls ``when_open`` when a load has connected to its place, before its first byte, and keeps the failures."""

    def __init__(self, when_open: Callable[[], object] = lambda: None) -> None:
        self.failed: list[LoadFailed] = []
        self._when_open = when_open

    @mx.hookimpl
    def mx_load_started(self, event: LoadStarted) -> None:
        if event.uri.startswith("grpc://"):
            self._when_open()

    @mx.hookimpl
    def mx_load_failed(self, event: LoadFailed) -> None:
        self.failed.append(event)


def load(uri: str, variables: Mapping[str, str], events: Events | None = None) -> mx.LoadReport:
    plugins = mx.PluginManager.discover(variables)
    plugins.register(events or Events(), name="events")
    tensors = zeros()
    report = mx.load_into(tensors, uri, identity=identity_of(tensors), environ=variables, plugins=plugins)
    assert_loaded(tensors)
    return report


def test_a_worker_reads_from_another_one(start: Start, worker: Worker, checkpoint: str) -> None:
    """Found by its identity; without one that is alive, and with another identity, the checkpoint is read."""
    serving = start()
    first = load(checkpoint, environ(serving))
    process = worker(serving, _MIB)

    second = load(checkpoint, environ(serving))

    assert checkpoint == first.uri
    assert second.uri.startswith("grpc://127.0.0.1:")
    assert "mx-grpc-stream" == second.storage["plugin"]
    tensors = zeros()
    other = mx.own_identity("acme/another", tensors, content_version="1")
    assert checkpoint == mx.load_into(tensors, checkpoint, identity=other, environ=environ(serving)).uri
    process.kill()
    process.wait()
    assert checkpoint == load(checkpoint, environ(serving)).uri


@pytest.mark.parametrize("seconds", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_ends_amid_a_load(
    start: Start, worker: Worker, checkpoint: str, number: signal.Signals, seconds: float
) -> None:
    """Killed or stopped: the load goes on from the checkpoint unless it had all bytes, and every byte is right."""
    serving = start()
    process = worker(serving, _MIB)

    def end() -> None:
        if seconds:
            threading.Timer(seconds, process.send_signal, (number,)).start()
        else:
            process.send_signal(number)

    events = Events(end)

    report = load(checkpoint, environ(serving, MX_STALL_SECONDS="1", MX_SERVER_DEADLINE_SECONDS="2"), events)

    assert bool(events.failed) is (report.uri == checkpoint)
    assert seconds or events.failed
    assert all(isinstance(event.error, BackendError) for event in events.failed)


def test_a_published_model_is_read_while_the_block_lasts(start: Start, checkpoint: str) -> None:
    """In this process too; afterwards it is not found, and its port is closed."""
    serving = start()
    variables = environ(serving)
    tensors = dict(tensors_of(_MIB))
    with mx.publish(tensors, identity=identity_of(tensors), environ=variables) as offer:
        assert eventually(lambda: offer.state.status == "ready")
        uri = load(checkpoint, variables).uri
        assert uri.endswith(f"/{identity_of(tensors).source_id}/{offer.worker_id}")
        assert uri == load(uri, {}).uri  # named by its address alone

    assert checkpoint == load(checkpoint, variables).uri


@pytest.mark.parametrize(("ucx_tls", "first"), [("all", "nixl://"), ("tcp", "grpc://")])
def test_nixl_is_offered_if_the_user_says_so(
    start: Start, checkpoint: str, monkeypatch: pytest.MonkeyPatch, ucx_tls: str, first: str
) -> None:
    """Because a reader gets access to the whole process. It comes first through shared memory, and last over TCP."""
    pytest.importorskip("nixl_cu12", reason="the wheel exists for x86-64")
    monkeypatch.setenv("UCX_TLS", ucx_tls)
    serving = start()
    variables = environ(serving)
    without_grpc = {**variables, "MX_DISABLED_PLUGINS": "mx-grpc-stream"}
    tensors = dict(tensors_of(_MIB))
    for offered in ("0", "1"):
        wanted = {**variables, "MX_NIXL_OFFER": offered}
        with mx.publish(tensors, identity=identity_of(tensors), environ=wanted) as offer:
            assert eventually(lambda: offer.state.status == "ready")

            assert load(checkpoint, variables).uri.startswith(first if offered == "1" else "grpc://")
            assert load(checkpoint, without_grpc).uri.startswith("nixl://" if offered == "1" else checkpoint)


def test_weights_that_change_while_they_are_offered_are_not_believed(start: Start, checkpoint: str) -> None:
    """The digests are those of when they were offered; the message names the tensor."""
    serving = start()
    variables = environ(serving)
    tensors = {name: tensor.clone() for name, tensor in tensors_of(_MIB).items()}
    events = Events()
    with mx.publish(tensors, identity=identity_of(tensors), environ=variables) as offer:
        assert eventually(lambda: offer.state.status == "ready")
        tensors["layers.7.weight"][-1] ^= 1

        report = load(checkpoint, variables, events)

    assert checkpoint == report.uri
    [failed] = events.failed
    assert isinstance(failed.error, IntegrityError)
    assert "layers.7.weight" in str(failed.error)


def test_with_tokens_a_reader_needs_a_grant(start: Start, checkpoint: str, tmp_path: Path) -> None:
    """The load gets it by itself; without a token, the worker is not found, and the checkpoint is read."""
    (tmp_path / "tokens").write_text(f"fleet:{'w0rk' * 8}")
    (tmp_path / "token").write_text("w0rk" * 8)
    serving = start(MX_AUTH_MODE="token", MX_AUTH_TOKENS_PATH=str(tmp_path / "tokens"))
    variables = environ(serving, MX_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    tensors = dict(tensors_of(_MIB))
    with mx.publish(tensors, identity=identity_of(tensors), environ=variables) as offer:
        assert eventually(lambda: offer.state.status == "ready")

        assert load(checkpoint, variables).uri.startswith("grpc://")
        assert checkpoint == load(checkpoint, environ(serving)).uri
        with pytest.raises(mx.AccessDeniedError, match="a token is wanted"):
            load(f"grpc://{offer.endpoint}/{identity_of(tensors).source_id}/{offer.worker_id}", environ(serving))


# -- the content -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(s3_server: SeaweedFS) -> Callable[[str, int], str]:
    """Puts a model with the values of ``seed`` at ``name``, and returns its URI."""

    def bucket(name: str, seed: int) -> str:
        with contextlib.closing(s3_server.client()) as client:
            content = save({name: torch.full_like(tensor, seed) for name, tensor in _LAYOUT.items()})
            client.put_object(Bucket="models", Key=f"{name}/model.safetensors", Body=content)
        return f"s3://models/{name}"

    return bucket


_LAYOUT = {"a": torch.zeros(1000), "b": torch.zeros(3, 5, dtype=torch.int16)}


def loaded(uri: str, variables: Mapping[str, str]) -> tuple[mx.LoadReport, float]:
    """The report of a load, and the value that all elements have."""
    tensors = {name: torch.full_like(tensor, -1) for name, tensor in _LAYOUT.items()}
    report = mx.load_into(tensors, uri, identity=mx.own_identity("acme/model", tensors), environ=variables)
    [value] = {value for tensor in tensors.values() for value in tensor.flatten().tolist()}
    return report, value


@contextlib.contextmanager
def published(report: mx.LoadReport, value: float, variables: Mapping[str, str]) -> Iterator[None]:
    """A worker that loaded ``value`` offers it."""
    tensors = {name: torch.full_like(tensor, value) for name, tensor in _LAYOUT.items()}
    identity = mx.own_identity("acme/model", tensors, content_version=report.content_version)
    with mx.publish(tensors, identity=identity, environ=variables) as offer:
        assert eventually(lambda: offer.state.status == "ready")
        yield


def test_only_workers_with_the_same_content_are_read(
    start: Start, s3_server: SeaweedFS, bucket: Callable[[str, int], str]
) -> None:
    """One layout and name: a fine-tuned model elsewhere, and an object that was replaced, are read from the bucket."""
    variables = {**environ(start()), **s3_server.environ()}
    base, tuned = bucket("content-base", 1), bucket("content-tuned", 2)
    first, value = loaded(base, variables)
    assert (base, 1.0) == (first.uri, value)
    with published(first, value, variables):
        again, value = loaded(base, variables)
        assert again.uri.startswith("grpc://")
        assert (1.0, first.content_version) == (value, again.content_version)

        other, value = loaded(tuned, variables)
        assert (tuned, 2.0) == (other.uri, value)

        bucket("content-base", 3)
        replaced, value = loaded(base, variables)
        assert (base, 3.0) == (replaced.uri, value)
        assert 3 == len({first.content_version, other.content_version, replaced.content_version})
        with published(replaced, value, variables):
            again, value = loaded(base, variables)
            assert (3.0, True) == (value, again.uri.startswith("grpc://"))


def test_without_a_content_version_there_is_no_worker(
    start: Start, checkpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A file's version means nothing on another machine; offers without one are refused."""
    variables = environ(start())
    tensors = dict(tensors_of(_MIB))
    caplog.set_level(logging.INFO, "modelexpress_core")

    report = mx.load_into(zeros(), checkpoint, identity=mx.own_identity("acme/model", tensors), environ=variables)

    assert (checkpoint, "") == (report.uri, report.content_version)
    assert "no worker is asked" in caplog.text
    with pytest.raises(mx.PlacementError, match="which content"):
        mx.publish(tensors, identity=mx.own_identity("acme/model", tensors), environ=variables).__enter__()
