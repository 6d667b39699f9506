"""What the plugin registers and reads: records, URIs, settings, imports, documentation."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelexpress_core.contracts.storage import Endpoint
from modelexpress_core.errors import InvalidURIError, SettingsError, UnavailableError
from modelexpress_core.plugins import STORAGE, PluginManager
from modelexpress_core.settings import describe, from_env, variables
from modelexpress_core.uri import ModelURI
from mx_s3._storage import open_s3
from mx_s3.settings import S3Settings

KEYS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "a-secret"}


def test_is_found_and_handles_s3() -> None:
    """The installed plugin's record stands in the table, with its settings."""
    registered = PluginManager.discover({"MX_STRICT_PLUGINS": "1"}).table(STORAGE).lookup("s3")

    assert "mx-s3" == registered.plugin.name
    assert S3Settings is registered.provider.settings
    capabilities = registered.provider.capabilities
    assert (32, 512 << 10) == (capabilities.concurrency, capabilities.request_cost_bytes)
    assert capabilities.patience
    assert capabilities.diagnosis
    assert capabilities.stat_digests


def test_importing_the_plugin_imports_no_sdk() -> None:
    """Finding the plugin costs neither boto3 nor torch."""
    program = "import sys, mx_s3.plugin as p; p.mx_register_storages(); print(*sys.modules)"

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert 0 == result.returncode, result.stderr
    assert set() == {"boto3", "botocore", "urllib3", "torch"} & set(result.stdout.split())


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("s3:///model", "no bucket"),
        ("s3://key:secret@bucket/model", "credentials in the S3 URI"),
        ("s3://bucket/model?endpoint=http://host&token=abc", "endpoint, token"),
        ("s3://bucket/model?region=not/a/region", "no region"),
        ("s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/name", "alias"),
        ("s3://host:9000/bucket/model", "AWS_ENDPOINT_URL"),
    ],
)
def test_uris_that_mean_nothing_are_refused(uri: str, says: str) -> None:
    """Each slip is named, with what to write instead, and without what may be a credential."""
    with pytest.raises(InvalidURIError, match=says) as caught:
        open_s3(ModelURI.parse(uri), KEYS)

    assert caught.value.hint
    assert "secret" not in str(caught.value).replace("AWS_SECRET_ACCESS_KEY", "").lower()
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "environ", "region"),
    [
        ("s3://bucket", {}, "us-east-1"),
        ("s3://bucket", {"AWS_DEFAULT_REGION": "eu-west-1"}, "eu-west-1"),
        ("s3://bucket", {"AWS_DEFAULT_REGION": "eu-west-1", "AWS_REGION": "eu-west-2"}, "eu-west-2"),
        ("s3://bucket?region=eu-west-3", {"AWS_REGION": "eu-west-2"}, "eu-west-3"),
    ],
)
def test_where_the_region_comes_from(uri: str, environ: dict[str, str], region: str) -> None:
    """The URI goes before AWS_REGION, that before AWS_DEFAULT_REGION; us-east-1 where none is known."""
    with contextlib.closing(open_s3(ModelURI.parse(uri), {**KEYS, **environ})) as storage:
        assert region == storage._client.meta.region_name


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "https://bucket.s3.amazonaws.com/key"),
        ({"AWS_REGION": "eu-west-3"}, "https://bucket.s3.eu-west-3.amazonaws.com/key"),
        ({"MX_S3_ADDRESSING_STYLE": "path"}, "https://s3.amazonaws.com/bucket/key"),
        ({"AWS_ENDPOINT_URL": "http://minio:9000"}, "http://minio:9000/bucket/key"),
        ({"AWS_ENDPOINT_URL": "http://a", "AWS_ENDPOINT_URL_S3": "http://b"}, "http://b/bucket/key"),
        ({"AWS_ENDPOINT_URL": "http://minio:9000", "MX_S3_ADDRESSING_STYLE": "auto"}, "http://minio:9000/bucket/key"),
        (
            {"AWS_ENDPOINT_URL": "http://minio:9000", "MX_S3_ADDRESSING_STYLE": "virtual"},
            "http://bucket.minio:9000/key",
        ),
    ],
)
def test_where_requests_go(environ: dict[str, str], expected: str) -> None:
    """Virtual hosts for AWS and paths for other endpoints, unless the setting says otherwise."""
    urls = []

    def stop(request: Any, **_: object) -> None:
        urls.append(request.url)
        raise ConnectionAbortedError

    with contextlib.closing(open_s3(ModelURI.parse("s3://bucket"), {**KEYS, **environ})) as storage:
        storage._client.meta.events.register_first("before-send.s3", stop)
        with pytest.raises(UnavailableError):
            storage.stat("key")

    assert [expected] == urls


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Endpoint("bucket.s3.amazonaws.com", 443, tls=True)),
        (
            {"AWS_REGION": "eu-west-3", "AWS_CA_BUNDLE": "/ca.pem"},
            Endpoint("bucket.s3.eu-west-3.amazonaws.com", 443, tls=True, ca_bundle="/ca.pem"),
        ),
        ({"MX_S3_ANONYMOUS": "1"}, Endpoint("bucket.s3.amazonaws.com", 443, tls=True)),
        ({"AWS_ENDPOINT_URL": "http://minio:9000", "AWS_CA_BUNDLE": "/ca.pem"}, Endpoint("minio", 9000, tls=False)),
        (
            {"AWS_ENDPOINT_URL": "https://minio", "MX_S3_ADDRESSING_STYLE": "virtual"},
            Endpoint("bucket.minio", 443, tls=True),
        ),
    ],
)
def test_the_endpoint_is_where_requests_go(environ: dict[str, str], expected: Endpoint) -> None:
    """Host, port and authorities, worked out without a connection and without credentials."""
    with contextlib.closing(open_s3(ModelURI.parse("s3://bucket"), environ)) as storage:
        assert expected == storage.endpoint()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HTTPS_PROXY": "http://me:s3cret@proxy:3128"}, "http://proxy:3128"),
        ({"HTTPS_PROXY": "proxy:3128"}, "http://proxy:3128"),
        ({"HTTP_PROXY": "http://proxy:3128"}, None),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "amazonaws.com"}, None),
    ],
)
def test_the_endpoint_names_the_proxy(
    variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy that botocore takes for this endpoint, without what it is asked with."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with contextlib.closing(open_s3(ModelURI.parse("s3://bucket"), KEYS)) as storage:
        assert expected == storage.endpoint().proxy


def test_every_bad_variable_is_named_at_once() -> None:
    """One run suffices to correct them all."""
    environ = {
        "AWS_ENDPOINT_URL": "minio:9000",
        "AWS_REGION": "eu west",
        "MX_S3_ADDRESSING_STYLE": "host",
        "MX_S3_READ_TIMEOUT_SECONDS": "0",
    }

    with pytest.raises(SettingsError) as caught:
        from_env(S3Settings, environ)

    assert all(name in str(caught.value) for name in environ)


def test_secrets_are_not_shown() -> None:
    """Neither repr nor `mx settings` shows a key or a token."""
    environ = {"AWS_ACCESS_KEY_ID": "s3cret-1", "AWS_SECRET_ACCESS_KEY": "s3cret-2", "AWS_SESSION_TOKEN": "s3cret-3"}

    shown = f"{from_env(S3Settings, environ)!r} {describe(S3Settings, environ, owner='mx-s3')!r}"

    assert "s3cret" not in shown


@pytest.mark.parametrize(
    "name",
    ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL_STS", "AWS_EC2_METADATA_SERVICE_ENDPOINT"],
)
def test_passwords_in_urls_are_refused_unseen(name: str) -> None:
    """The variable is named, its value is not."""
    with pytest.raises(SettingsError, match=f"^{name} must not") as caught:
        from_env(S3Settings, {name: "https://me:s3cret@host"})

    assert "s3cret" not in str(caught.value)


def test_every_variable_is_documented() -> None:
    """The README names each one."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()

    assert [] == [name for name in variables(S3Settings) if f"`{name}`" not in readme]
