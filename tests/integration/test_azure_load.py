"""Loads from a real server of Azure's Blob service: every tensor, by API, by command and by copy."""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from devtools.azurite import Azurite
from devtools.tcp_proxy import Fault, Policy, TcpProxy
from modelexpress_core import load_into, load_state_dict
from modelexpress_core.doctor import diagnose
from modelexpress_core.errors import ModelExpressError, SourceChangedError


@pytest.fixture(scope="module")
def stored(azurite: Azurite, sharded: Path) -> str:
    """The URI of the generated checkpoint."""
    return azurite.upload(sharded, "models", "sharded")


@pytest.fixture
def environ(azurite: Azurite) -> dict[str, str]:
    return azurite.environ()


def test_a_real_checkpoint_is_equal_to_what_safetensors_reads(
    azurite: Azurite, minilm: Path, environ: dict[str, str], expected: Any, assert_equal: Any
) -> None:
    """Every tensor of all-MiniLM-L6-v2 arrives bit by bit."""
    uri = azurite.upload(minilm, "models", "minilm")

    state = load_state_dict(uri, environ=environ)

    assert_equal(expected(minilm), state)


@pytest.mark.parametrize(
    "start",
    [
        "azure://models",
        "az://models@mxaccount.blob.core.windows.net",
        "abfss://models@mxaccount.dfs.core.windows.net",
        "https://mxaccount.blob.core.windows.net/models",
    ],
)
def test_every_form_of_the_uri_loads_the_same(
    start: str, stored: str, sharded: Path, environ: dict[str, str], expected: Any, assert_equal: Any
) -> None:
    """The account is in variables or in the URI, the container before an at sign or in the path."""
    assert stored.startswith("az://models/")

    state = load_state_dict(stored.replace("az://models", start), environ=environ)

    assert_equal(expected(sharded), state)


def test_one_shard_can_be_named(stored: str, sharded: Path, environ: dict[str, str], expected: Any) -> None:
    """A URI may name one file."""
    one = load_state_dict(f"{stored}/model-00002-of-00003.safetensors", environ=environ)

    assert 0 < len(one) < len(expected(sharded))


def test_published_digests_are_compared(stored: str, sharded: Path, environ: dict[str, str], expected: Any) -> None:
    """The SDK stores an MD5 of blobs that it uploads in one piece."""
    model = {name: torch.empty_like(tensor) for name, tensor in expected(sharded).items()}

    report = load_into(model, stored, environ=environ)

    assert 3 == report.verified["digests"]


def test_the_command_loads_it(mx: Callable[..., Any], stored: str, environ: dict[str, str]) -> None:
    """`mx load` reads every byte, and names the plugin."""
    done = mx("load", "--json", stored, environ=environ)

    assert 0 == done.returncode, done.stderr
    assert "mx-azure" == json.loads(done.stdout)["storage"]["plugin"]


def test_the_command_copies_it(
    mx: Callable[..., Any], stored: str, sharded: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    """`mx pull` writes the same files."""
    done = mx("pull", stored, str(tmp_path / "copy"), environ=environ)

    assert 0 == done.returncode, done.stderr
    for path in sharded.iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes(), path.name


@contextlib.contextmanager
def through(azurite: Azurite, environ: dict[str, str], policy: Policy) -> Iterator[None]:
    """``environ`` names a proxy before the server."""
    with TcpProxy("127.0.0.1", azurite.port, policy) as proxy:
        environ["AZURE_STORAGE_ENDPOINT"] = f"http://127.0.0.1:{proxy.port}/{azurite.account}"
        yield


@pytest.mark.parametrize("kind", ["reset", "truncate", "unavailable"])
def test_broken_connections_do_not_break_a_load(
    kind: Literal["reset", "truncate", "unavailable"],
    azurite: Azurite,
    stored: str,
    sharded: Path,
    environ: dict[str, str],
    expected: Any,
    assert_equal: Any,
) -> None:
    """Every third answer is cut somewhere, or is a refusal; the load is exact and counts what was sent again."""
    chance = random.Random(7)

    def policy(number: int, _head: bytes) -> Fault | None:
        return Fault(kind, chance.randrange(300, 2_000_000)) if number % 3 == 2 else None

    model = {name: torch.empty_like(tensor) for name, tensor in expected(sharded).items()}
    with through(azurite, environ, policy):
        report = load_into(model, stored, environ=environ)

    assert_equal(expected(sharded), model)
    assert report.retries > 0


def test_damaged_bytes_are_found_and_fetched_again(
    azurite: Azurite, stored: str, sharded: Path, environ: dict[str, str], expected: Any, assert_equal: Any
) -> None:
    """A byte of a large answer that changed on the way, by the MD5 of the blob."""
    damaged = []

    def policy(_number: int, head: bytes) -> Fault | None:
        length = re.search(rb"range: bytes=(\d+)-(\d+)", head, re.IGNORECASE)
        if damaged or length is None or int(length[2]) - int(length[1]) < 1_000_000:
            return None
        damaged.append(head)
        return Fault("flip", 500_000, of_body=True)

    model = {name: torch.empty_like(tensor) for name, tensor in expected(sharded).items()}
    with through(azurite, environ, policy):
        report = load_into(model, stored, environ=environ)

    assert 1 == len(damaged)
    assert_equal(expected(sharded), model)
    assert report.bytes_reread > 0


def test_a_shard_that_is_replaced_during_the_load_fails_it(
    azurite: Azurite, sharded: Path, environ: dict[str, str]
) -> None:
    """Two versions never mix, and the error names the blob."""
    uri = azurite.upload(sharded, "models", "replaced")
    name = "model-00002-of-00003.safetensors"
    replaced = []

    def policy(_number: int, head: bytes) -> Fault | None:
        if not replaced and head.startswith(b"GET") and b"if-match" in head.lower():
            replaced.append(name)
            with azurite.client() as client:
                content = (sharded / name).read_bytes()
                client.get_blob_client("models", f"replaced/{name}").upload_blob(content, overwrite=True)
        return None

    with through(azurite, environ, policy), pytest.raises(SourceChangedError, match=name):
        load_state_dict(uri, environ=environ)

    assert replaced


@pytest.mark.parametrize(
    ("uri", "variables", "step", "says"),
    [
        ("az://models/sharded", {"AZURE_STORAGE_ACCOUNT_KEY": "d3Jvbmc="}, "listing", "AZURE_STORAGE_ACCOUNT_KEY"),
        ("az://no-such-container/sharded", {}, "listing", "az storage container list"),
        ("az://models/sharded", {"AZURE_ACCOUNT_NAME": "other"}, "plugin", "AZURE_ACCOUNT_NAME"),
        ("az://models/sharded", {"AZURE_STORAGE_ENDPOINT": "http://127.0.0.1:1/mxaccount"}, "connection", "endpoint"),
    ],
)
def test_the_doctor_finds_what_a_load_finds(
    stored: str, environ: dict[str, str], uri: str, variables: dict[str, str], step: str, says: str
) -> None:
    """The step that fails, and the same next step."""
    changed = {**environ, **variables}

    steps = list(diagnose(uri, environ=changed))
    with pytest.raises(ModelExpressError) as caught:
        load_state_dict(uri, environ={**changed, "MX_RETRY_ATTEMPTS": "1"})

    failed = next(found for found in steps if found.status == "failed")
    assert step == failed.name
    if step != "connection":
        assert failed.hint == caught.value.hint
        assert says in str(caught.value)


def test_the_doctor_finds_nothing(mx: Callable[..., Any], stored: str, environ: dict[str, str]) -> None:
    """All steps pass, and the credentials are named without a secret."""
    done = mx("doctor", "--json", stored, environ=environ)

    assert 0 == done.returncode, done.stdout + done.stderr
    assert "key of the account mxaccount, from AZURE_STORAGE_ACCOUNT_KEY" in done.stdout
    assert environ["AZURE_STORAGE_ACCOUNT_KEY"] not in done.stdout
