"""Loads from a real server of Azure's Blob service: each form of its URIs, and what the doctor finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devtools.azurite import Azurite
from modelexpress_core import load_state_dict
from modelexpress_core.doctor import diagnose
from modelexpress_core.errors import ModelExpressError


@pytest.fixture(scope="module")
def stored(azurite: Azurite, sharded: Path) -> str:
    """The URI of the generated checkpoint."""
    return azurite.upload(sharded, "models", "sharded")


@pytest.fixture
def environ(azurite: Azurite) -> dict[str, str]:
    return azurite.environ()


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
