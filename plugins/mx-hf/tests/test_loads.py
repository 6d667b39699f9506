"""Whole loads from the Hub: the same bytes as the safetensors library reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import modelexpress_core as mx
from devtools.fake_hub import FakeHub, HubAnswer, HubRequest
from devtools.models import generate_sharded


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files with an index, 1.7 MB."""
    return generate_sharded(tmp_path_factory.mktemp("model") / "sharded", shards=2, layers=2, hidden=128)


def read_by_safetensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(expected: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> bool:
    return expected.keys() == state.keys() and all(torch.equal(expected[name], state[name]) for name in expected)


@pytest.mark.parametrize("folder", ["", "/sub/directory"])
def test_a_load_has_the_bytes_that_safetensors_reads(folder: str, hub: FakeHub, checkpoint: Path) -> None:
    """From the root of a repository, or a directory in it. The SHA-256 of each file is verified."""
    for file in checkpoint.iterdir():
        hub.put("org/model", f"{folder}/{file.name}".lstrip("/"), file.read_bytes())
    expected = read_by_safetensors(checkpoint)
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}

    report = mx.load_into(state, f"hf://org/model{folder}", environ=hub.environ())

    assert same(expected, state)
    assert {"versions": 2, "sizes": 2, "digests": 2} == report.verified
    assert "mx-hf" == report.storage["plugin"]
    assert report.content_version


def test_two_workers_agree_on_the_content_version(hub: FakeHub, checkpoint: Path) -> None:
    """Also if one names the branch, or its commit; it differs once the branch has moved."""
    uri = hub.upload(checkpoint, "org/model")
    state = {name: torch.zeros_like(tensor) for name, tensor in read_by_safetensors(checkpoint).items()}

    uris = [uri, uri, f"{uri}?revision=main", f"{uri}?revision={hub.repositories['org/model'].branches['main']}"]
    one, *others = (mx.load_into(state, each, environ=hub.environ()).content_version for each in uris)
    hub.put("org/model", "README.md", b"changed")
    after = mx.load_into(state, uri, environ=hub.environ()).content_version

    assert {one} == set(others)
    assert one != after


def test_a_load_stays_with_its_commit(hub: FakeHub, checkpoint: Path) -> None:
    """All files are replaced once it has begun; it has the old bytes, and none of the new."""
    uri, expected = hub.upload(checkpoint, "org/model"), read_by_safetensors(checkpoint)

    class Replace:
        @mx.hookimpl
        def mx_load_started(self, event: mx.LoadStarted) -> None:
            for file in checkpoint.glob("*.safetensors"):
                content = bytearray(file.read_bytes())
                content[-1] ^= 0xFF
                hub.put("org/model", file.name, bytes(content))

    plugins = mx.PluginManager.discover(hub.environ())
    plugins.register(Replace(), name="replace")

    assert same(expected, mx.load_state_dict(uri, environ=hub.environ(), plugins=plugins))


def test_a_load_outlives_its_signed_urls(hub: FakeHub, checkpoint: Path) -> None:
    """Signatures run out again and again; the load is complete and right, and is told of none of it."""
    uri, expected = hub.upload(checkpoint, "org/model"), read_by_safetensors(checkpoint)
    numbers = iter(range(1_000_000))

    def before(request: HubRequest) -> HubAnswer | None:
        if request.server == "cdn" and next(numbers) % 5 == 4:
            hub.revoke_signatures()
        return None

    hub.before = before
    # Concurrent requests could find both their URLs run out.
    environ = {**hub.environ(), "MX_CHUNK_BYTES": str(64 << 10), "MX_CONCURRENCY": "1"}
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    report = mx.load_into(state, uri, environ=environ)

    assert same(expected, state)
    assert (0, 2) == (report.retries, report.verified["digests"])
    found = [request for request in hub.requests if "/resolve/" in request.path]
    assert 3 < len(found) < 12


def test_a_url_is_found_once_for_each_file(hub: FakeHub, checkpoint: Path) -> None:
    """However many ranges are read of it, by however many threads."""
    uri = hub.upload(checkpoint, "org/model")
    environ = {**hub.environ(), "MX_CHUNK_BYTES": str(64 << 10), "MX_CONCURRENCY": "16"}

    mx.load_state_dict(uri, environ=environ)

    found = [request.path for request in hub.requests if "/resolve/" in request.path]
    assert 3 == len(found) == len(set(found))  # two shards and the index
    assert 10 < len([request for request in hub.requests if request.server == "cdn"])


def test_files_besides_the_weights_never_fail_a_load(hub: FakeHub, checkpoint: Path) -> None:
    """Here the Hub refuses all others, and one has no usable metadata."""
    uri = hub.upload(checkpoint, "org/model")
    for name in ("tokenizer.json", "README.md", "pytorch_model.bin"):
        hub.put("org/model", name, b"other")

    def before(request: HubRequest) -> HubAnswer | None:
        if "/resolve" in request.path and ".safetensors" not in request.path:
            return 500, {}, b""
        return None

    hub.before = before

    assert same(read_by_safetensors(checkpoint), mx.load_state_dict(uri, environ=hub.environ()))


def test_damaged_bytes_of_the_cdn_fail_a_load(hub: FakeHub, checkpoint: Path) -> None:
    """By the SHA-256 that the Hub publishes, although sizes and versions are right."""
    uri = hub.upload(checkpoint, "org/model")
    for digest, content in list(hub._blobs.items()):
        if content[8:9] == b"{":
            hub._blobs[digest] = content[:-1] + bytes([content[-1] ^ 1])

    with pytest.raises(mx.IntegrityError, match="safetensors"):
        mx.load_state_dict(uri, environ=hub.environ())
