"""Names of the Hub get directories from the cache of a real server; vLLM itself does not run here."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from attrs import define, field

from devtools.fake_hub import FakeHub
from modelexpress_core import ModelExpressError
from modelexpress_core.errors import SettingsError
from mx_vllm._directories import make_private
from mx_vllm._hub_models import HubName, directories_from_server, hub_directory, streamed_uri
from mx_vllm._names import content_of_snapshot, name_of
from mx_vllm._vllm import StartArguments
from tests.support.caching import serving_cache

_HEADER = b'{"model.norm.weight":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
_WEIGHTS = len(_HEADER).to_bytes(8, "little") + _HEADER + b"1234"
_SMALL = {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "tokenizer.json": b"{}" * 1000}
_NOWHERE = "http://127.0.0.1:9"


@define
class Start:
    """The arguments of an engine, which names one model."""

    name: HubName
    offline: bool = False
    replaced: dict[str, str] = field(factory=dict)

    def hub_names(self) -> list[HubName]:
        return [self.name]

    def replace(self, name: str, directory: str) -> None:
        self.replaced[name] = directory


Find = Callable[..., Start]


@pytest.fixture(autouse=True)
def _nothing_configured(nothing_configured: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # huggingface_hub has read its variables when it was imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        for path, content in {**_SMALL, "model.safetensors": _WEIGHTS, "original/params.bin": b"7"}.items():
            hub.put("org/tiny", path, content)
        yield hub


@pytest.fixture(scope="module")
def server_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def url(hub: FakeHub, server_directory: Path) -> Iterator[str]:
    """The address of a server that caches what the Hub has."""
    with serving_cache(server_directory, ("hf",), hub.environ()) as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture
def find(url: str) -> Find:
    """A function that prepares the start of an engine, for which the Hub is unreachable."""

    def find(name: str = "org/tiny", revision: str | None = None, **environ: str) -> Start:
        start = Start(HubName(name, revision))
        variables = {
            "MODEL_EXPRESS_URL": url,
            "MODEL_EXPRESS_NO_SHARED_STORAGE": "1",
            "MX_FALLBACK": "0",
            "HF_ENDPOINT": _NOWHERE,
            **environ,
        }
        with directories_from_server(start, variables):
            return start

    return find


def test_all_files_but_weights_are_copied_to_a_private_directory(
    find: Find, hub: FakeHub, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its path names the commit, from which the weights are streamed; a second start copies nothing."""
    caplog.set_level(logging.INFO, "vllm.modelexpress")
    commit = hub.repositories["org/tiny"].branches["main"]
    directory = Path(find().replaced["org/tiny"])
    files = {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and ".mx-pull" not in path.parts
    }
    written = {name: (directory / name).stat().st_mtime_ns for name in files}

    assert _SMALL == files
    assert 0o700 == stat.S_IMODE(directory.parents[2].stat().st_mode)
    assert f"mx://{url.removeprefix('http://')}/hf/org/tiny?revision={commit}" == streamed_uri(
        str(directory), {"MODEL_EXPRESS_URL": url}
    )
    assert ("org/tiny", f"hub:org/tiny@{commit}") == (name_of(str(directory)), content_of_snapshot(str(directory)))
    assert (
        f"of org/tiny (2 files, 2.04 kB, of commit {commit[:12]}) from the cache of the server at {url.removeprefix('http://')}"
        in caplog.text
    )
    assert directory == Path(find(revision=commit).replaced["org/tiny"])
    assert written == {name: (directory / name).stat().st_mtime_ns for name in files}


def test_a_common_disk_gives_the_directory_of_the_server(find: Find, server_directory: Path) -> None:
    """With all files; nothing is copied."""
    shared = {"MODEL_EXPRESS_NO_SHARED_STORAGE": "0", "MODEL_EXPRESS_CACHE_DIRECTORY": str(server_directory)}
    directory = Path(find(**shared).replaced["org/tiny"])

    assert directory.is_relative_to(server_directory)
    assert _WEIGHTS == (directory / "model.safetensors").read_bytes()
    assert not Path(os.environ["XDG_CACHE_HOME"]).exists()
    assert content_of_snapshot(str(directory)).startswith("hub:org/tiny@")
    assert streamed_uri(str(directory)) is None


def test_a_common_disk_that_is_not_mounted_is_streamed(find: Find, tmp_path: Path) -> None:
    """As without one; the log says so."""
    elsewhere = {"MODEL_EXPRESS_NO_SHARED_STORAGE": "0", "MODEL_EXPRESS_CACHE_DIRECTORY": str(tmp_path)}

    directory = find(**elsewhere).replaced["org/tiny"]

    assert streamed_uri(directory, {"MODEL_EXPRESS_URL": "server"}) is not None


@pytest.mark.parametrize(
    ("name", "environ"),
    [
        ("org/tiny", {"MODEL_EXPRESS_URL": ""}),
        ("org/tiny", {"MODEL_EXPRESS_NO_SHARED_STORAGE": "0"}),
        ("org/tiny", {"VLLM_USE_MODELSCOPE": "True"}),
        ("tests/unit", {}),
        ("/models/tiny", {}),
        ("s3://bucket/tiny", {}),
        ("org/tiny:Q4_K_M", {}),
        ("org/../tiny", {}),
        ("org--other/tiny", {}),
        ("gpt2", {}),
    ],
)
def test_what_is_no_name_for_the_server_is_left_alone(
    find: Find, name: str, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server is used, another registry is, or it is a path or a URI."""
    monkeypatch.chdir(Path(__file__).parents[3])

    assert {} == find(name, MODEL_EXPRESS_URL=environ.pop("MODEL_EXPRESS_URL", _NOWHERE), **environ).replaced


def test_a_model_that_was_downloaded_before_is_left_alone(find: Find, tmp_path: Path) -> None:
    """Unless a shard is missing; with MX_MODEL_URI its weights are not needed."""
    commit = "a" * 40
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "1.bin"}}')
    (snapshot / "1.safetensors").touch()

    assert find().replaced
    assert {} == find(MX_MODEL_URI="s3://bucket/model").replaced
    (snapshot / "2.safetensors").touch()
    assert {} == find(MODEL_EXPRESS_URL=_NOWHERE).replaced
    assert str(snapshot) == hub_directory(HubName("org/tiny"))


def test_errors_of_the_server_name_the_model_and_the_next_step(find: Find, hub: FakeHub) -> None:
    """It is unreachable, has no such model, may not read it; or the package that asks it is missing."""
    hub.put("org/gated", "config.json", b"{}")
    hub.repositories["org/gated"].gated = True
    failures = {
        "org/tiny": ({"MODEL_EXPRESS_URL": _NOWHERE}, "127.0.0.1:9"),
        "org/missing": ({}, "org/missing"),
        "org/gated": ({}, "gated"),
        "org/other": ({"MX_DISABLED_PLUGINS": "mx-grpc-stream"}, "mx-grpc-stream"),
    }

    for name, (environ, expected) in failures.items():
        with pytest.raises(ModelExpressError, match="do not come from the server") as raised:
            find(name, **environ)
        message = str(raised.value)
        assert f"configuration and tokenizer of {name} do not" in message
        assert expected in message
        assert "Next step: " in message


def test_if_the_server_fails_vllm_asks_the_hub(find: Find, caplog: pytest.LogCaptureFixture) -> None:
    """If that fails too, the error gives both reasons. An error of vLLM alone stays as it is."""
    assert {} == find(MODEL_EXPRESS_URL=_NOWHERE, MX_FALLBACK="").replaced
    assert "vLLM asks the Hugging Face Hub" in caplog.text

    variables = {"MODEL_EXPRESS_URL": _NOWHERE, "MODEL_EXPRESS_NO_SHARED_STORAGE": "1"}
    start, offline = Start(HubName("org/tiny")), Start(HubName("org/tiny"), offline=True)
    both = pytest.raises(ModelExpressError, match=r"127\.0\.0\.1:9")
    with both as raised, directories_from_server(start, variables):
        raise OSError("the Hub is down")
    assert "vLLM says: the Hub is down" in str(raised.value)
    refused = pytest.raises(ModelExpressError, match="do not come from the server")
    with refused, directories_from_server(offline, variables):
        pass
    with pytest.raises(OSError, match="another"), directories_from_server(Start(HubName("/models/tiny")), variables):
        raise OSError("another")


def test_projections_of_sentence_transformers_are_copied(find: Find, hub: FakeHub) -> None:
    """vLLM reads their weights itself; folders that the list makes up are not asked for."""
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"path": "../2_Dense", "type": "sentence_transformers.models.Dense"},
        {"path": "3_Dense", "type": "sentence_transformers.models.Dense"},
        "no module",
    ]
    projection = _WEIGHTS[:-4] + b"5678"
    for path, content in {
        **_SMALL,
        "model.safetensors": _WEIGHTS,
        "modules.json": json.dumps(modules).encode(),
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": projection,
    }.items():
        hub.put("org/vectors", path, content)

    directory = Path(find("org/vectors").replaced["org/vectors"])

    assert projection == (directory / "2_Dense" / "model.safetensors").read_bytes()
    assert not (directory / "model.safetensors").exists()
    assert not (directory / "3_Dense").exists()


def test_too_many_bytes_are_refused(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any is copied."""
    monkeypatch.setattr("mx_vllm._hub_models._MAX_SMALL_BYTES", 1000)

    with pytest.raises(ModelExpressError, match=r"has 2\.04 kB besides its weights, and at most 1\.00 kB are copied"):
        find()
    assert not Path(os.environ["XDG_CACHE_HOME"]).exists()


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    """They could change what vLLM runs."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "file").touch()

    with pytest.raises(ModelExpressError, match="others may write to"):
        make_private(tmp_path / "open")
    with pytest.raises(ModelExpressError, match="cannot make the directory"):
        make_private(tmp_path / "file" / "below")


def test_without_a_server_nothing_can_be_streamed() -> None:
    """The message says which variable is missing."""
    path = f"/cache/modelexpress/without-weights/models--org--tiny/snapshots/{'a' * 40}"

    with pytest.raises(SettingsError, match="org/tiny are streamed from the server, and no variable names it"):
        streamed_uri(path, {})
    assert streamed_uri(path.replace("without-weights", "other"), {}) is None
    assert streamed_uri(f"s3://bucket{path}", {}) is None


def test_tokenizer_and_draft_model_get_directories_too() -> None:
    """And the name of the model stays the one that clients see."""
    args = SimpleNamespace(
        model="org/tiny",
        revision="v1",
        tokenizer="org/words",
        tokenizer_revision=None,
        speculative_config={"model": "org/draft", "revision": "v2", "num_speculative_tokens": 3},
        served_model_name=None,
        download_dir="/models",
    )
    start = StartArguments(args)

    assert [
        HubName("org/tiny", "v1", "/models"),
        HubName("org/words", None, "/models", weights=False),
        HubName("org/draft", "v2", "/models"),
    ] == start.hub_names()
    for each in start.hub_names():
        start.replace(each.name, f"/cache/{each.name}")
    assert ("/cache/org/tiny", "/cache/org/words", "org/tiny") == (args.model, args.tokenizer, args.served_model_name)
    assert {"model": "/cache/org/draft", "revision": "v2", "num_speculative_tokens": 3} == args.speculative_config
