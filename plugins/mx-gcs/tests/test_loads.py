"""Whole loads with credentials, which run out on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import modelexpress_core as mx
from devtools.fake_gcs import FakeGcs
from devtools.models import generate_sharded


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, 1.7 MB."""
    return generate_sharded(tmp_path_factory.mktemp("model") / "sharded", shards=2, layers=2, hidden=128)


@pytest.fixture(scope="module")
def uri(server: FakeGcs, checkpoint: Path) -> str:
    return server.upload(checkpoint, "models", "with-credentials")


@pytest.mark.parametrize("kind", ["key", "external impersonated", "metadata"])
def test_a_load_outlives_its_tokens(
    kind: str, google: Any, variables: Callable[[str], dict[str, str]], checkpoint: Path, uri: str
) -> None:
    """Every fifth request finds its token revoked; the load is complete and right, and is told of none of it."""
    numbers = iter(range(1_000_000))

    def revoke(_: Any) -> None:
        if next(numbers) % 5 == 4:
            google.tokens.clear()

    google.before = revoke
    # Concurrent requests could find both their tokens revoked.
    environ = {**variables(kind), "MX_CHUNK_BYTES": str(64 << 10), "MX_CONCURRENCY": "1"}
    reports: list[mx.LoadReport] = []

    class Watch:
        @mx.hookimpl
        def mx_load_finished(self, event: mx.LoadFinished) -> None:
            reports.append(event.report)

    plugins = mx.PluginManager.discover(environ)
    plugins.register(Watch(), name="watch")
    state = mx.load_state_dict(uri, environ=environ, plugins=plugins)

    expected = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert expected.keys() == state.keys()
    assert all(torch.equal(expected[name], state[name]) for name in expected)
    assert 3 < len(google.given)
    assert [0] == [report.retries for report in reports]
    assert [2] == [report.verified["digests"] for report in reports]


def test_a_load_whose_tokens_cannot_be_renewed_fails(
    google: Any, variables: Callable[[str], dict[str, str]], uri: str
) -> None:
    """With the cause and the next step, soon, and without the token."""
    numbers = iter(range(1_000_000))

    def revoke(_: Any) -> None:
        if next(numbers) == 6:
            google.tokens.clear()
            google.refusals["metadata"] = (403, {}, b"Permission 'iam.serviceAccounts.getAccessToken' denied")

    google.before = revoke
    environ = {**variables("metadata"), "MX_CHUNK_BYTES": str(64 << 10)}

    with pytest.raises(mx.AccessDeniedError) as caught:
        mx.load_state_dict(uri, environ=environ)

    assert "Workload Identity User" in str(caught.value.hint)
    assert "ya29." not in str(caught.value)
