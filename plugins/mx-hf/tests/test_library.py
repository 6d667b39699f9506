"""The library huggingface_hub works with the stand-in as with the Hub, and agrees with the plugin, in both majors."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import modelexpress_core as mx
from devtools.fake_hub import FakeHub
from devtools.models import generate_sharded
from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.errors import InvalidURIError, UnavailableError
from modelexpress_core.server.cache import ModelCache
from modelexpress_core.server.settings import CacheSettings
from mx_hf._storage import HfStorage
from tests.support.tools import skip_without

#: The library is installed beside the tests' own once for each worker, which takes seconds.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("huggingface_hub")]

#: The oldest version that the package accepts. The newest one is installed with it.
_OLDEST = "1.31.0"

#: What version 1 needs and version 2 does not bring.
_HTTP_OF_1 = ("certifi", "httpcore>=1,<2", "httpx<1")

TOKEN = "hf_aVeryGoodTokenForTheTests"

#: Does to the Hub what users do, and prints what came of it.
_SCRIPT = """
import hashlib, json, sys
from pathlib import Path
import huggingface_hub
from huggingface_hub import HfApi, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download

def failure(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except errors.HfHubHTTPError as exc:
        return type(exc).__name__

api = HfApi()
tree = api.list_repo_tree("org/model", recursive=True)
files = [each for each in tree if hasattr(each, "blob_id")]
directory = snapshot_download("org/model")
print(json.dumps({
    "version": huggingface_hub.__version__,
    "commit": api.model_info("org/model").sha,
    "files": {each.path: [each.size, each.lfs.sha256 if each.lfs else each.blob_id] for each in files},
    "info": [each.path for each in api.get_paths_info("org/model", ["large.bin", "nothing"])],
    "snapshot": directory,
    "contents": {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(directory).rglob("*") if path.is_file()
    },
    # before a copy of the private one is in the cache
    "failures": [
        failure(hf_hub_download, "org/private", "config.json", token=False),
        failure(hf_hub_download, "org/gated", "config.json"),
        failure(get_hf_file_metadata, hf_hub_url("org/disabled", "config.json")),
        failure(hf_hub_download, "org/model", "nothing"),
        failure(hf_hub_download, "org/model", "config.json", revision="v9"),
        failure(api.model_info, "org/nothing"),
    ],
    "renamed": Path(hf_hub_download("org/old", "config.json")).read_text(),
    "of the revision": Path(hf_hub_download("org/model", "only", revision="refs/pr/1")).read_text(),
    "private": Path(hf_hub_download("org/private", "config.json", token=sys.argv[1])).read_text(),
}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_sharded(tmp_path_factory.mktemp("model") / "sharded", shards=2, layers=1, hidden=64)


@pytest.fixture(scope="module", params=["oldest", "installed"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A version of the library, and the directory that goes before all others on the path to use it."""
    if request.param == "installed":
        return importlib.metadata.version("huggingface_hub"), ""
    target = tmp_path_factory.mktemp("huggingface_hub")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(target))
    done = subprocess.run(
        [*pip, "--no-deps", f"huggingface_hub=={_OLDEST}", *_HTTP_OF_1],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    if done.returncode:
        skip_without(f"huggingface_hub {_OLDEST}: pip has to reach an index of packages")
    return _OLDEST, str(target)


@pytest.fixture
def used(
    hub: FakeHub, library: tuple[str, str], checkpoint: Path, tmp_path: Path
) -> Callable[[], tuple[Mapping[str, Any], Mapping[str, str]]]:
    """Fills the stand-in, lets the library use it; returns what it printed, and its variables."""

    def used() -> tuple[Mapping[str, Any], Mapping[str, str]]:
        hub.page_entries = 2
        hub.upload(checkpoint, "org/model")
        hub.put("org/model", "sub/folder/deep.txt", b"deep")
        hub.put("org/model", "large.bin", bytes(5000))
        hub.put("org/model", "only", b"in the pull request", branch="refs/pr/1")
        for name in ("private", "gated", "disabled", "new"):
            hub.put(f"org/{name}", "config.json", b"{}")
        hub.renamed["org/old"] = "org/new"
        hub.repositories["org/private"].private = True
        hub.repositories["org/private"].readers.add(TOKEN)
        hub.repositories["org/gated"].gated = True
        hub.repositories["org/disabled"].disabled = True
        environ = {**os.environ, **hub.environ(), "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, TOKEN],
            env={**environ, "PYTHONPATH": library[1]},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert 0 == done.returncode, done.stderr
        printed: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return printed, environ

    return used


def contents_of(storage: HfStorage, infos: list[ObjectInfo]) -> dict[str, str]:
    """The SHA-256 of each file, as the plugin reads it."""
    found = {}
    for info in infos:
        buffer = bytearray(info.size)
        storage.read_into(info.path, 0, memoryview(buffer), version=info.version)
        found[info.path.removeprefix("model/")] = hashlib.sha256(buffer).hexdigest()
    return found


def test_the_library_and_the_plugin_agree(
    used: Callable[[], tuple[Mapping[str, Any], Mapping[str, str]]],
    library: tuple[str, str],
    on_hub: Callable[..., HfStorage],
) -> None:
    """Commit, names, sizes, ids of contents, and the contents; private, gated, renamed and missing ones."""
    printed, _ = used()
    storage = on_hub()

    infos = list(storage.list("model"))

    assert library[0] == printed["version"]
    assert {printed["commit"]} == {str(info.version).partition("/")[0] for info in infos}
    assert printed["files"] == {
        info.path.removeprefix("model/"): [info.size, str(info.version).rpartition("/")[2]] for info in infos
    }
    assert printed["contents"] == contents_of(storage, infos)
    assert ["large.bin"] == printed["info"]
    assert ("{}", "{}", "in the pull request") == (
        printed["renamed"],
        printed["private"],
        printed["of the revision"],
    )
    assert [
        "RepositoryNotFoundError",
        "GatedRepoError",
        "DisabledRepoError",
        "RemoteEntryNotFoundError",
        "RevisionNotFoundError",
        "RepositoryNotFoundError",
    ] == printed["failures"]


def test_offline_the_copy_of_the_library_is_loaded(
    used: Callable[[], tuple[Mapping[str, Any], Mapping[str, str]]], hub: FakeHub, checkpoint: Path
) -> None:
    """The directory that the library wrote, of either layout; no request is sent, and what is not there fails."""
    printed, environ = used()
    offline = {**environ, "HF_HUB_OFFLINE": "1"}
    expected = mx.load_state_dict(str(checkpoint))
    hub.requests.clear()

    for uri in (
        "hf://org/model",
        f"hf://org/model?revision={printed['commit']}",
        f"hf://org/model@{printed['commit']}",
    ):
        loaded = mx.load_state_dict(uri, environ=offline)
        assert expected.keys() == loaded.keys()
        assert all(torch.equal(expected[name], loaded[name]) for name in expected)
    one = mx.load_state_dict("hf://org/model/model-00001-of-00002.safetensors", environ=offline)
    assert set() < one.keys() < expected.keys()
    for uri in ("hf://org/model?revision=v9", "hf://org/other", "hf://org"):
        with pytest.raises((UnavailableError, InvalidURIError)):
            mx.load_state_dict(uri, environ=offline)
    assert [] == hub.requests


#: Finds models in a cache, or downloads them into it; prints their directories and contents.
_SNAPSHOTS = """
import hashlib, json, sys
from pathlib import Path
from huggingface_hub import scan_cache_dir, snapshot_download
found = {}
for name in sys.argv[2:]:
    directory = Path(snapshot_download(name, local_files_only=sys.argv[1] == "offline"))
    found[name] = [
        directory.name,
        {
            path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in directory.rglob("*") if path.is_file()
        },
    ]
found["warnings"] = [str(each) for each in scan_cache_dir().warnings]
print(json.dumps(found))
"""


def test_the_cache_and_the_library_find_what_the_other_wrote(
    hub: FakeHub, library: tuple[str, str], tmp_path: Path
) -> None:
    """In one directory: neither downloads what the other has. A scan warns of our own directory alone."""
    digests: dict[str, dict[str, str]] = {}
    for name in ("org/ours", "org/theirs"):
        files = {"config.json": b"{}", "sub/large.bin": name.encode() * 1000, "weights.safetensors": os.urandom(50_000)}
        for path, content in files.items():
            hub.put(name, path, content)
        digests[name] = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    environ = {**os.environ, **hub.environ(), "HF_HUB_CACHE": str(tmp_path), "PYTHONPATH": library[1]}

    def library_finds(how: str, *names: str) -> Mapping[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", _SNAPSHOTS, how, *names],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert 0 == done.returncode, done.stderr
        printed: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return printed

    theirs = library_finds("online", "org/theirs")
    settings = CacheSettings(min_free_bytes=0)
    with ModelCache(tmp_path, settings=settings, environ=hub.environ()) as cache:
        for name, downloaded in {"org/ours": True, "org/theirs": False}.items():
            hub.requests.clear()
            snapshot = cache.begin(name)
            assert snapshot.wait(60)
            assert [] == list(cache.validate(snapshot))
            assert downloaded == any(each.path.endswith(".safetensors") for each in hub.requests)
    found = library_finds("offline", "org/ours", "org/theirs")

    assert theirs["org/theirs"] == found["org/theirs"]
    assert digests == {name: found[name][1] for name in digests}
    assert snapshot.version == found["org/theirs"][0]
    [warning] = found["warnings"]
    assert warning.endswith(str(tmp_path / ".mx"))
