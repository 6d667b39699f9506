"""A server that is asked for more than it serves at a time: fewer reads are under way, and the load succeeds."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors.torch import save

import modelexpress_core as mx
from devtools.seaweedfs import SeaweedFS
from modelexpress_core.errors import ThrottledError
from modelexpress_core.fetch.concurrency import SelfTunedConcurrency
from modelexpress_core.loads import checkpoint
from modelexpress_core.uri import ModelURI
from mx_s3._storage import open_s3

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("s3 throttling")]

AT_ONCE = 6
WEIGHTS = {f"weight.{i}": torch.full((1 << 20,), float(i)) for i in range(32)}


@pytest.fixture(scope="module")
def busy_server() -> Iterator[SeaweedFS]:
    with SeaweedFS() as server:
        with contextlib.closing(server.client()) as client:
            client.put_object(Bucket="models", Key="busy/model.safetensors", Body=save(WEIGHTS))
        server.limit_reads(AT_ONCE)
        yield server


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many reads the load may have under way: at first, and after each complaint of the server."""
    reads = []

    class Recorded(SelfTunedConcurrency):
        def throttled(self) -> None:
            super().throttled()
            reads.append(self.reads)

    def recorded(capabilities: Any, settings: Any, **_: Any) -> Recorded:
        reads.append(capabilities.concurrency)
        return Recorded(capabilities.concurrency, capabilities.most_concurrency)

    monkeypatch.setattr(checkpoint, "concurrency_for", recorded)
    return reads


class SlowDown:
    """Answers as S3 does where more than ``AT_ONCE`` reads are under way."""

    def __init__(self) -> None:
        self.refused = 0
        self._under_way = 0
        self._lock = threading.Lock()

    def __call__(self, request: Any) -> Any:
        if request.method != "GET" or "list-type" in request.path:
            return None
        with self._lock:
            self._under_way += 1
            refused = self._under_way > AT_ONCE
            self.refused += refused
        time.sleep(0.02)
        with self._lock:
            self._under_way -= 1
        body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
        return (503, {}, body) if refused else None


def _load(environ: dict[str, str]) -> Any:
    model = {name: torch.zeros_like(tensor) for name, tensor in WEIGHTS.items()}
    environ = {**environ, "MX_CHUNK_BYTES": "1MiB"}
    report = mx.load_into(model, "s3://models/busy", environ=environ)
    assert all(torch.equal(tensor, model[name]) for name, tensor in WEIGHTS.items())
    return report


def test_a_load_from_a_server_that_is_busy(busy_server: SeaweedFS, limits: list[int]) -> None:
    """Its 503s lower the number of reads and are tried again, until every byte is in place."""
    report = _load(busy_server.environ())

    assert 32 == limits[0]
    assert limits[0] > min(limits)
    assert report.retries


def test_a_load_from_a_stand_in_that_says_slow_down(
    server: SeaweedFS, fronted: Callable[..., str], put: Callable[..., str], limits: list[int]
) -> None:
    """S3's own words have the same effect."""
    put("busy/model.safetensors", save(WEIGHTS))
    slow_down = SlowDown()

    report = _load({**server.environ(), "AWS_ENDPOINT_URL": fronted(slow_down)})

    assert slow_down.refused
    assert limits[0] > min(limits)
    assert slow_down.refused <= report.retries


def test_what_a_busy_server_answers(busy_server: SeaweedFS) -> None:
    """Its 503 is a ThrottledError that may be tried again, and says what helps."""
    with contextlib.closing(open_s3(ModelURI.parse("s3://models"), busy_server.environ())) as storage:

        def read(_: int) -> object:
            try:
                return storage.read_into("busy/model.safetensors", 0, memoryview(bytearray(32 << 20)), version=None)
            except ThrottledError as exc:
                return exc

        with ThreadPoolExecutor(16) as pool:
            errors = [answer for answer in pool.map(read, range(64)) if isinstance(answer, ThrottledError)]

    assert errors
    assert all(error.retryable for error in errors)
    assert "HTTP 503" in str(errors[0])
    assert "MX_CONCURRENCY" in str(errors[0])
