"""``mx doctor`` of workers: which step fails, and which way the bytes take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import trustme

from modelexpress_core.doctor import PEER_STEPS, Step, can_load, diagnose
from modelexpress_core.sources.offered_tensors import OfferedTensors
from modelexpress_core.wire.settings import TlsSettings
from tests.support.network import CLOSED_PORT
from tests.support.peers import ServingWorker, every_layout, serving_worker


@pytest.fixture(scope="module")
def worker() -> Iterator[ServingWorker]:
    with serving_worker(every_layout(), ["grpc"]) as worker:
        yield worker


def examine(uri: str, environ: Mapping[str, str] | None = None) -> dict[str, Step]:
    steps = list(diagnose(uri, environ=environ or {}, timeout_seconds=10))
    assert list(PEER_STEPS) == [step.name for step in steps]
    return {step.name: step for step in steps}


def test_a_chunk_is_read_and_the_way_is_named(worker: ServingWorker) -> None:
    """Over the bulk channel, or over gRPC with the reason; no lease is left."""
    steps = examine(worker.uri("grpc"))

    assert can_load(steps.values())
    assert "with the right digest; way of the bytes: bulk channel on port" in steps["read"].seen
    assert (9, 9) == (steps["worker"].facts["tensors"], steps["worker"].facts["chunks"])
    assert 4 << 20 == steps["read"].facts["bytes"]
    assert (
        "way of the bytes: gRPC, since MX_BULK_PORT is 0"
        in examine(worker.uri("grpc"), {"MX_BULK_PORT": "0"})["read"].seen
    )
    assert 0 == worker.leases.out()


@pytest.mark.parametrize(
    ("uri", "failed", "seen"),
    [
        ("grpc://127.0.0.1:{port}/ffff/w", "worker", "holds source '0123456789abcdef'"),
        ("grpc://127.0.0.1:{port}/0123456789abcdef/other", "worker", "this is worker 'w'"),
        ("grpc://127.0.0.1:{port}", "plugin", "does not name the source and the worker"),
        ("grpc://127.0.0.1:{closed}/0123456789abcdef/w", "connection", "Connection refused"),
        ("nixl://127.0.0.1:{port}/0123456789abcdef/w", "read", "does not offer its tensors over 'nixl', but over grpc"),
    ],
)
def test_what_is_wrong_is_named(worker: ServingWorker, uri: str, failed: str, seen: str) -> None:
    """In the step that finds it, with the next step."""
    steps = examine(uri.format(port=worker.port, closed=CLOSED_PORT))

    assert [failed] == [step.name for step in steps.values() if step.status == "failed"]
    assert seen in steps[failed].seen
    assert steps[failed].hint
    assert not can_load(steps.values())


def test_weights_that_changed_are_found() -> None:
    """By the digest of the chunk."""
    tensors = {"weight": torch.zeros(5000, dtype=torch.uint8)}

    def digest_and_change(offered: OfferedTensors) -> None:
        offered.digest()
        tensors["weight"][17] = 1

    with serving_worker(tensors, ["grpc"], prepare=digest_and_change) as worker:
        steps = examine(worker.uri("grpc"))

    assert "failed" == steps["read"].status
    assert "are not those that the worker had when it offered them" in steps["read"].seen


def test_certificates_are_compared_with_the_name_that_is_set(tmp_path: Path) -> None:
    """In the step of TLS and by gRPC."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    pair = str(tmp_path / "pair.pem")
    authority.issue_cert("workers.example").private_key_and_cert_chain_pem.write_to_path(pair)
    trusting = {"MX_TLS_CA_PATH": str(tmp_path / "ca.pem")}
    tls = TlsSettings(certificate=pair, key=pair)
    environ = {"MX_TLS_CERT_PATH": pair, "MX_TLS_KEY_PATH": pair}
    with serving_worker(every_layout(), ["grpc"], tls=tls, environ=environ) as worker:
        steps = examine(worker.uri("grpc", tls="1"), {"MX_TLS_PEER_NAME": "workers.example", **trusting})
        assert ["ok", "ok", "ok"] == [steps[name].status for name in ("tls", "worker", "read")]
        steps = examine(worker.uri("grpc", tls="1"), trusting)
        assert ["failed", "failed", "skipped"] == [steps[name].status for name in ("tls", "worker", "read")]
