"""Which settings end the start before vLLM starts an engine, checked without vLLM."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from modelexpress_core.errors import (
    InvalidURIError,
    ModelExpressError,
    PluginLoadError,
    SettingsError,
    UnknownSchemeError,
)
from mx_vllm._checks import check_settings, warn_of_other_format


@pytest.mark.parametrize(
    ("uri", "error", "expected"),
    [
        ("zz://bucket/model", UnknownSchemeError, "zz"),
        ("nixl://worker/model", UnknownSchemeError, "nixl"),
        ("s3:/bucket/model", InvalidURIError, "write s3://bucket/model"),
        ("3s://bucket/model", InvalidURIError, "neither a URI nor a file"),
        ("s3://bucket/model\n", InvalidURIError, "control character"),
        ("s3://", InvalidURIError, "bucket"),
        ("s3://key:hunter2@bucket/model", InvalidURIError, "AWS_ACCESS_KEY_ID"),
    ],
)
def test_an_address_that_cannot_be_used(uri: str, error: type[ModelExpressError], expected: str) -> None:
    """Scheme and syntax are checked; the message has no secret. MX_FALLBACK=1 accepts the address."""
    with pytest.raises(error) as caught:
        check_settings({"MX_MODEL_URI": uri})
    check_settings({"MX_MODEL_URI": uri, "MX_FALLBACK": "1"})

    assert expected in str(caught.value)
    assert "Next step: " in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_disabled_plugin(tmp_path: Path) -> None:
    """The message says why the plugin of the scheme is not used."""
    with pytest.raises((PluginLoadError, UnknownSchemeError), match="MX_DISABLED_PLUGINS"):
        check_settings({"MX_MODEL_URI": "s3://bucket/model", "MX_DISABLED_PLUGINS": "mx-s3"})


@pytest.mark.parametrize("fallback", ["0", "1", ""])
def test_values_that_cannot_be_used(fallback: str) -> None:
    """All are named at once. MX_FALLBACK=1 does not accept them."""
    environ = {"MX_CONCURRENCY": "many", "MX_STALL_SECONDS": "soon", "MX_FALLBACK": fallback}

    with pytest.raises(SettingsError) as caught:
        check_settings(environ)

    assert "MX_CONCURRENCY='many'" in str(caught.value)
    assert "MX_STALL_SECONDS='soon'" in str(caught.value)


def test_a_wrong_value_of_the_fallback() -> None:
    """A word that is neither yes nor no."""
    with pytest.raises(SettingsError, match="MX_FALLBACK='maybe'"):
        check_settings({"MX_FALLBACK": "maybe"})


def test_values_of_the_storage_are_checked_if_it_is_used() -> None:
    """A wrong value of S3 ends the start from S3 alone."""
    wrong = {"MX_S3_CONNECT_TIMEOUT_SECONDS": "soon", "MX_FALLBACK": "1"}

    with pytest.raises(SettingsError, match="MX_S3_CONNECT_TIMEOUT_SECONDS='soon'"):
        check_settings({**wrong, "MX_MODEL_URI": "s3://bucket/model"})
    check_settings({**wrong, "MX_MODEL_URI": "/models/llama"})


def test_nothing_is_connected() -> None:
    """The first process may not reach the storage that the workers reach."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        check_settings(
            {
                "MX_MODEL_URI": "s3://bucket/model",
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{listening.getsockname()[1]}",
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
            }
        )

        with pytest.raises(BlockingIOError):
            listening.accept()
    check_settings({"MX_MODEL_URI": "/only/on/the/workers"})


@pytest.mark.parametrize(("environ", "warned"), [({"MX_MODEL_URI": "s3://b/m"}, True), ({"MX_MODEL_URI": ""}, False)])
def test_another_load_format_does_not_read_the_address(
    environ: dict[str, str], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights would be others than those of MX_MODEL_URI, without a word."""
    warn_of_other_format("auto", environ)

    assert warned == ("'auto' does not read it" in caplog.text)
    assert warned == ("add --load-format mx" in caplog.text)
