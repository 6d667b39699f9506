"""``mx models``: on a directory, and on the cache of a server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from devtools.models import generate_sharded
from tests.support.serving import Serving

_COMMIT = "0123456789abcdef0123456789abcdef01234567"

Mx = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint."""
    directory = generate_sharded(tmp_path_factory.mktemp("source") / "model", shards=2, layers=1, hidden=64)
    (directory / "config.json").write_text("{}")
    return directory


class Cache:
    """Calls ``mx models`` with the options that name a cache."""

    def __init__(self, mx: Mx, *options: str, environ: Mapping[str, str] | None = None) -> None:
        self._mx = mx
        self._options = options
        self._environ = environ

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._mx("models", *arguments, *self._options, environ=self._environ)

    def json(self, *arguments: str) -> Any:
        done = self(*arguments, "--json")
        assert 0 == done.returncode, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(params=["directory", "server"])
def cache(request: pytest.FixtureRequest, mx: Mx, start: Callable[..., Serving], tmp_path: Path) -> Cache:
    """A cache, reached in either way."""
    directory = str(tmp_path / "cache")
    if request.param == "directory":
        return Cache(mx, "--cache-dir", directory)
    variables = {"MX_CACHE_SOURCES": "hf,file", "MX_CACHE_DELETE": "1", "MX_CACHE_MIN_FREE_BYTES": "1"}
    server = start("--cache-dir", directory, MX_SERVER_BULK_PORT="0", **variables)
    return Cache(mx, environ={"MODEL_EXPRESS_URL": server.url})


def test_a_model_comes_is_compared_and_goes(cache: Cache, model: Path) -> None:
    """All commands, in the order in which an operator uses them."""
    uri = f"file://{model}"
    empty = cache("list")
    found = cache.json("download", uri)
    [listed] = cache.json("list")
    table = cache("list").stdout
    stats = cache.json("stats")
    compared = cache.json("validate", uri)
    removed = cache.json("remove", uri, "--version", found["version"][:8])

    assert "no models" in empty.stdout
    assert (f"file{model}", 4, True, True) == (found["model"], found["files"], found["weights"], found["complete"])
    assert (found["version"], found["bytes"]) == (listed["version"], listed["present_bytes"])
    assert found["version"][:12] in table
    assert "complete" in table
    assert (1, found["bytes"]) == (stats["models"], stats["size_bytes"])
    assert [] == compared["damaged"]
    assert (1, found["bytes"]) == (removed["removed"], removed["freed_bytes"])
    assert [] == cache.json("list")


def test_wrong_input_is_explained(cache: Cache, model: Path, tmp_path: Path) -> None:
    """A model that is not there, a name that is none, and a storage that has nothing."""
    cache.json("download", f"file://{model}", "--no-weights")

    texts = {
        command: cache(*command.split()).stderr
        for command in (
            "remove org/name",
            f"validate file://{model} --version nothing",
            f"download file://{tmp_path}/nothing",
            "download name",
            "download hf://org/name?revision=x",
        )
    }

    assert "org/name is not in the cache" in texts["remove org/name"]
    assert "its versions are" in texts[f"validate file://{model} --version nothing"]
    assert "nothing is there" in texts[f"download file://{tmp_path}/nothing"]
    assert "names no model" in texts["download name"]
    assert "--revision" in texts["download hf://org/name?revision=x"]


def test_a_damaged_file_is_found_and_a_model_is_imported(mx: Mx, model: Path, tmp_path: Path) -> None:
    """Exit code 1 and the name of the file; once it was imported again, all is well."""
    cache = Cache(mx, "--cache-dir", str(tmp_path / "cache"))
    imported = cache.json("import", str(model), "org/name", "--revision", _COMMIT)
    file = tmp_path / "cache" / "models--org--name" / "snapshots" / _COMMIT / "config.json"
    content = file.read_bytes()
    file.write_bytes(b"[]")

    damaged = cache("validate", "org/name")
    again = cache("import", str(model), "org/name", "--revision", _COMMIT)

    assert (_COMMIT, "hf://org/name") == (imported["version"], imported["source"])
    assert 1 == damaged.returncode
    assert "config.json" in damaged.stdout
    assert 0 == again.returncode, again.stderr
    assert content == file.read_bytes()
    assert 0 == cache("validate", "org/name").returncode


def test_it_has_to_be_known_which_cache_is_meant(mx: Mx, tmp_path: Path, start: Callable[..., Serving]) -> None:
    """Neither a server nor a directory; both; a server that has none; a directory that a server uses."""
    nowhere = mx("models", "list")
    both = mx("models", "list", "--url", "localhost:1", "--cache-dir", str(tmp_path))
    without = start()
    no_cache = mx("models", "list", "--url", without.url)
    start("--cache-dir", str(tmp_path / "cache"), MX_SERVER_BULK_PORT="0")
    used = mx("models", "list", "--cache-dir", str(tmp_path / "cache"))

    assert (1, True) == (nowhere.returncode, "--url URL or --cache-dir DIR" in nowhere.stderr)
    assert (2, True) == (both.returncode, "exclude each other" in both.stderr)
    assert (1, True) == (no_cache.returncode, "--cache-dir" in no_cache.stderr)
    assert (1, True) == (used.returncode, "another server uses the cache" in used.stderr)
