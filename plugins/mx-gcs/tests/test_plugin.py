"""What the plugin registers and reads: records, URIs, settings, imports, documentation."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from modelexpress_core.contracts.storage import Endpoint
from modelexpress_core.errors import InvalidURIError, SettingsError
from modelexpress_core.plugins import STORAGE, PluginManager
from modelexpress_core.settings import describe, from_env, variables
from modelexpress_core.uri import ModelURI
from mx_gcs._storage import open_gcs
from mx_gcs.settings import GcsSettings


def test_is_found_and_handles_gs() -> None:
    """The installed plugin's record stands in the table, with its settings."""
    registered = PluginManager.discover({"MX_STRICT_PLUGINS": "1"}).table(STORAGE).lookup("gs")

    assert "mx-gcs" == registered.plugin.name
    assert GcsSettings is registered.provider.settings
    capabilities = registered.provider.capabilities
    assert (32, 512 << 10) == (capabilities.concurrency, capabilities.request_cost_bytes)
    assert capabilities.patience
    assert capabilities.diagnosis
    assert not capabilities.stat_digests  # listings have them


_PROGRAM = """
import sys, time
import modelexpress_core.providers, modelexpress_core.settings
begun = time.process_time()
import mx_gcs.plugin
mx_gcs.plugin.mx_register_storages()
print(time.process_time() - begun)
plugin = set(sys.modules)
from modelexpress_core.uri import ModelURI
from mx_gcs._storage import open_gcs
open_gcs(ModelURI.parse("gs://bucket"), {"MX_GCS_ANONYMOUS": "1"})
print(*plugin)
print(*sys.modules)
"""


def test_importing_the_plugin_imports_no_sdk() -> None:
    """Finding the plugin costs less than 50 ms; google-auth is imported where there are credentials."""
    result = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False)

    assert 0 == result.returncode, result.stderr
    seconds, plugin, storage = result.stdout.splitlines()
    heavy = {"cryptography", "google.auth", "requests", "torch", "urllib3"}
    assert 0.05 > float(seconds)
    assert set() == heavy & set(plugin.split())
    assert set() == heavy & set(storage.split())


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("gs:///model", "no bucket"),
        ("gs://user:s3cret@bucket/model", "credentials in the GCS URI"),
        ("gs://bucket/model?token=s3cret&userProject=p", "token, userProject"),
        ("gs://Bucket/model", "no bucket can have the name"),
        ("gs://a/model", "no bucket can have the name"),
        ("gs://host:4443/bucket/model", "MX_GCS_ENDPOINT"),
    ],
)
def test_uris_that_mean_nothing_are_refused(uri: str, says: str) -> None:
    """Each slip is named, with what to write instead, and without what may be a credential."""
    with pytest.raises(InvalidURIError, match=says) as caught:
        open_gcs(ModelURI.parse(uri), {})

    assert caught.value.hint
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("bucket", ["a_bucket-1", "example.com", "a.b" * 60, "123"])
def test_names_that_buckets_have(bucket: str) -> None:
    """As Google's documentation allows them."""
    open_gcs(ModelURI.parse(f"gs://{bucket}/model"), {}).close()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Endpoint("storage.googleapis.com", 443, tls=True)),
        ({"MX_GCS_CA_BUNDLE": "/ca.pem"}, Endpoint("storage.googleapis.com", 443, tls=True, ca_bundle="/ca.pem")),
        ({"REQUESTS_CA_BUNDLE": "/ca.pem"}, Endpoint("storage.googleapis.com", 443, tls=True, ca_bundle="/ca.pem")),
        ({"GOOGLE_CLOUD_UNIVERSE_DOMAIN": "example.goog"}, Endpoint("storage.example.goog", 443, tls=True)),
        ({"MX_GCS_ENDPOINT": "https://storage-x.p.googleapis.com/"}, Endpoint("storage-x.p.googleapis.com", 443, True)),
        ({"MX_GCS_ENDPOINT": "http://127.0.0.1:4443"}, Endpoint("127.0.0.1", 4443, tls=False)),
        ({"STORAGE_EMULATOR_HOST": "emulator:4443"}, Endpoint("emulator", 4443, tls=False)),
        ({"STORAGE_EMULATOR_HOST": "https://emulator"}, Endpoint("emulator", 443, tls=True)),
        (
            {"STORAGE_EMULATOR_HOST": "emulator:4443", "MX_GCS_ENDPOINT": "https://storage.example.com"},
            Endpoint("storage.example.com", 443, tls=True),
        ),
        (
            {"HTTPS_PROXY": "http://me:s3cret@proxy:3128"},
            Endpoint("storage.googleapis.com", 443, tls=True, proxy="http://proxy:3128"),
        ),
    ],
)
def test_the_endpoint_is_where_requests_go(environ: dict[str, str], expected: Endpoint) -> None:
    """Host, port, authorities and proxy, worked out without a connection and without credentials."""
    with contextlib.closing(open_gcs(ModelURI.parse("gs://bucket"), environ)) as storage:
        assert expected == storage.endpoint()


@pytest.mark.parametrize(
    ("environ", "allowed"),
    [
        ({"MX_GCS_ENDPOINT": "http://storage.example.com"}, False),
        ({"MX_GCS_ENDPOINT": "http://10.0.0.1:4443"}, False),
        ({"MX_GCS_ENDPOINT": "http://127.0.0.1.example.com"}, False),
        ({"MX_GCS_ENDPOINT": "http://169.254.169.254"}, False),
        ({"MX_GCS_ENDPOINT": "https://storage.example.com"}, True),
        ({"MX_GCS_ENDPOINT": "http://localhost:4443"}, True),
        ({"MX_GCS_ENDPOINT": "http://127.0.0.1:4443"}, True),
        ({"MX_GCS_ENDPOINT": "http://[::1]:4443"}, True),
        ({"MX_GCS_ENDPOINT": "http://storage.example.com", "MX_GCS_ANONYMOUS": "1"}, True),
        ({"STORAGE_EMULATOR_HOST": "http://storage.example.com"}, True),
    ],
)
def test_access_tokens_are_not_sent_unencrypted(environ: dict[str, str], allowed: bool) -> None:
    """Plain HTTP to another machine is for requests without credentials."""
    if allowed:
        from_env(GcsSettings, environ)
        return
    with pytest.raises(SettingsError, match="unencrypted") as caught:
        from_env(GcsSettings, environ)
    assert "https://" in str(caught.value.hint)


def test_every_bad_variable_is_named_at_once() -> None:
    """One run suffices to correct them all."""
    environ = {
        "MX_GCS_ENDPOINT": "storage.example.com",
        "STORAGE_EMULATOR_HOST": "http://",
        "MX_GCS_IMPERSONATE_SERVICE_ACCOUNT": "reader",
        "GCE_METADATA_HOST": "http://metadata/path",
        "MX_GCS_USER_PROJECT": "My Project",
        "GOOGLE_CLOUD_UNIVERSE_DOMAIN": "https://example.goog",
        "MX_GCS_READ_TIMEOUT_SECONDS": "0",
    }

    with pytest.raises(SettingsError) as caught:
        from_env(GcsSettings, environ)

    assert [] == [name for name in environ if name not in str(caught.value)]


@pytest.mark.parametrize("name", ["MX_GCS_ENDPOINT", "STORAGE_EMULATOR_HOST"])
def test_passwords_in_urls_are_refused_unseen(name: str) -> None:
    """The variable is named, its value is not."""
    with pytest.raises(SettingsError, match=f"^{name} must not") as caught:
        from_env(GcsSettings, {name: "https://me:s3cret@host"})

    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("name", ["MX_GCS_ENDPOINT", "STORAGE_EMULATOR_HOST", "GCE_METADATA_HOST"])
def test_settings_show_no_password(name: str) -> None:
    """Neither `mx settings` nor `repr` shows one."""
    environ = {name: "https://me:s3cret@host"}

    assert "s3cret" not in repr(describe(GcsSettings, environ, owner="mx-gcs"))


def test_every_variable_is_documented() -> None:
    """The README names each one."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()

    assert [] == [name for name in variables(GcsSettings) if f"`{name}`" not in readme]
