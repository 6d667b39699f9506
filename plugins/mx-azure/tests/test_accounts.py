"""Which account, endpoint and container each URI means, and what is said where variables contradict it."""

from __future__ import annotations

import base64
import subprocess
import sys

import pytest

from modelexpress_core.errors import InvalidURIError, ModelExpressError, SettingsError
from modelexpress_core.plugins import STORAGE, PluginManager
from modelexpress_core.settings import describe, from_env
from modelexpress_core.uri import ModelURI
from mx_azure._accounts import locate
from mx_azure.plugin import mx_rewrite_uri
from mx_azure.settings import AzureSettings

KEY = base64.b64encode(b"the s3cret key").decode()
NAME = {"AZURE_STORAGE_ACCOUNT_NAME": "models1"}
STRING = f"DefaultEndpointsProtocol=https;AccountName=models1;AccountKey={KEY};EndpointSuffix=core.windows.net"


def where(uri: str, **environ: str) -> tuple[str, str | None]:
    """URL before the container, and the container."""
    location = locate(ModelURI.parse(uri), from_env(AzureSettings, environ))
    return f"{location.origin}{location.base}", location.container


@pytest.mark.parametrize(
    ("uri", "environ", "expected"),
    [
        ("az://c0ntainer/a/b", NAME, ("https://models1.blob.core.windows.net", "c0ntainer")),
        (
            "azure://c0ntainer",
            {"AZURE_ACCOUNT_NAME": "models1"},
            ("https://models1.blob.core.windows.net", "c0ntainer"),
        ),
        (
            "az://c0ntainer",
            {**NAME, "AZURE_ACCOUNT_NAME": "models1"},
            ("https://models1.blob.core.windows.net", "c0ntainer"),
        ),
        ("az://$root/a", NAME, ("https://models1.blob.core.windows.net", "$root")),
        ("az://abc@models2.blob.core.windows.net/a", {}, ("https://models2.blob.core.windows.net", "abc")),
        ("az://abc@MODELS2.blob.core.windows.net/a", {}, ("https://models2.blob.core.windows.net", "abc")),
        ("az://abc@models2.blob.core.windows.net/a", NAME, ("https://models2.blob.core.windows.net", "abc")),
        ("abfss://abc@models2.dfs.core.windows.net/a", {}, ("https://models2.blob.core.windows.net", "abc")),
        ("abfs://abc@models2.dfs.core.windows.net/a", {}, ("https://models2.blob.core.windows.net", "abc")),
        ("az://models2.blob.core.windows.net/abc/a", {}, ("https://models2.blob.core.windows.net", None)),
        ("az://abc@m12.blob.core.chinacloudapi.cn/a", {}, ("https://m12.blob.core.chinacloudapi.cn", "abc")),
        ("az://abc@m12.blob.core.usgovcloudapi.net", {}, ("https://m12.blob.core.usgovcloudapi.net", "abc")),
        ("az://abc@m12.z7.blob.storage.azure.net", {}, ("https://m12.z7.blob.storage.azure.net", "abc")),
        ("az://abc@m12-secondary.blob.core.windows.net", {}, ("https://m12-secondary.blob.core.windows.net", "abc")),
        (
            "az://abc",
            {"AZURE_STORAGE_ENDPOINT": "http://127.0.0.1:10000/devstoreaccount1"},
            ("http://127.0.0.1:10000/devstoreaccount1", "abc"),
        ),
        (
            "az://abc@models1.blob.core.windows.net",
            {"AZURE_STORAGE_ENDPOINT": "https://models1.privatelink.blob.core.windows.net/"},
            ("https://models1.privatelink.blob.core.windows.net", "abc"),
        ),
        (
            "az://abc@storage.example.com/a",
            {**NAME, "AZURE_STORAGE_ENDPOINT": "https://storage.example.com"},
            ("https://storage.example.com", "abc"),
        ),
        ("az://abc", {"AZURE_STORAGE_CONNECTION_STRING": STRING}, ("https://models1.blob.core.windows.net", "abc")),
        (
            "az://abc",
            {"AZURE_STORAGE_CONNECTION_STRING": f"{STRING};BlobEndpoint=https://models.example.com/"},
            ("https://models.example.com", "abc"),
        ),
        (
            "az://abc",
            {"AZURE_STORAGE_CONNECTION_STRING": "UseDevelopmentStorage=true"},
            ("http://127.0.0.1:10000/devstoreaccount1", "abc"),
        ),
    ],
)
def test_where_requests_go(uri: str, environ: dict[str, str], expected: tuple[str, str | None]) -> None:
    """The URI, the endpoint, the connection string and the names of the account, in every form."""
    assert expected == where(uri, **environ)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("az:///model", "no container"),
        ("az://UPPER/model", "no container can have the name"),
        ("az://ab/model", "no container can have the name"),
        ("az://models1.blob.core.windows.net", "no container can have the name"),
        ("az://user:passw0rd@container/model", "credentials in the Azure URI"),
        ("az://user:passw0rd@models1.blob.core.windows.net/model", "credentials in the Azure URI"),
        ("az://container/model?sv=1&sig=passw0rd", "unknown parameters"),
        ("https://models1.blob.core.windows.net/container/model?sv=1&sig=passw0rd", "unknown parameters"),
        ("az://container@evil.example.com/model", "not known as one of Azure"),
        ("az://container@models1.blob.core.windows.net.evil.example.com/model", "not known as one of Azure"),
        ("az://container@models1.blob.core.windows.net:8443/model", "not known as one of Azure"),
        ("az://evil.example.com/container/model", "not known as one of Azure"),
        ("az://127.0.0.1:10000/container/model", "not known as one of Azure"),
    ],
)
def test_uris_that_are_refused(uri: str, says: str) -> None:
    """Each slip is named, with what to write; credentials are neither used nor shown, and go to no strange host."""
    parsed = ModelURI.parse(uri)
    parsed = mx_rewrite_uri(parsed) or parsed

    with pytest.raises(InvalidURIError, match=says) as caught:
        locate(parsed, from_env(AzureSettings, {**NAME, "AZURE_STORAGE_ACCOUNT_KEY": KEY}))

    assert caught.value.hint
    assert "passw0rd" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "environ", "names"),
    [
        ("az://abc", {}, ["AZURE_STORAGE_ACCOUNT_NAME", "az://abc"]),
        ("az://abc", {**NAME, "AZURE_ACCOUNT_NAME": "other"}, ["AZURE_STORAGE_ACCOUNT_NAME", "AZURE_ACCOUNT_NAME"]),
        (
            "az://abc",
            {**NAME, "AZURE_STORAGE_ACCOUNT_KEY": KEY, "AZURE_ACCOUNT_KEY": "b3RoZXI="},
            ["AZURE_STORAGE_ACCOUNT_KEY", "AZURE_ACCOUNT_KEY"],
        ),
        (
            "az://abc",
            {"AZURE_ACCOUNT_NAME": "other", "AZURE_STORAGE_CONNECTION_STRING": STRING},
            ["AZURE_ACCOUNT_NAME", "AZURE_STORAGE_CONNECTION_STRING", "other", "models1"],
        ),
        (
            "az://abc",
            {**NAME, "AZURE_STORAGE_ENDPOINT": "https://other.blob.core.windows.net"},
            ["AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "other", "models1"],
        ),
        (
            "az://abc@other.blob.core.windows.net",
            {**NAME, "AZURE_STORAGE_ACCOUNT_KEY": KEY},
            ["AZURE_STORAGE_ACCOUNT_NAME", "models1", "other"],
        ),
        (
            "az://abc@other.blob.core.windows.net",
            {**NAME, "AZURE_STORAGE_SAS_TOKEN": "sv=1&sig=a"},
            ["AZURE_STORAGE_ACCOUNT_NAME", "models1", "other"],
        ),
        (
            "az://abc@other.blob.core.windows.net",
            {"AZURE_STORAGE_ENDPOINT": "http://127.0.0.1:1/models1"},
            ["AZURE_STORAGE_ENDPOINT", "models1", "other"],
        ),
        (
            "az://abc",
            {"AZURE_STORAGE_ENDPOINT": "https://models.example.com", "AZURE_STORAGE_ACCOUNT_KEY": KEY},
            ["AZURE_STORAGE_ACCOUNT_NAME", "https://models.example.com"],
        ),
        ("az://abc", {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=models1"}, ["AZURE_STORAGE_CONNECTION_STRING"]),
        ("az://abc", {"AZURE_STORAGE_CONNECTION_STRING": f"AccountKey={KEY}"}, ["AZURE_STORAGE_CONNECTION_STRING"]),
        ("az://abc", {"AZURE_STORAGE_CONNECTION_STRING": "s3cret"}, ["AZURE_STORAGE_CONNECTION_STRING"]),
        (
            "az://abc",
            {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=models1;AccountKey=s3cret!"},
            ["AZURE_STORAGE_CONNECTION_STRING"],
        ),
        (
            "az://abc",
            {"AZURE_STORAGE_CONNECTION_STRING": f"BlobEndpoint=models;AccountKey={KEY}"},
            ["AZURE_STORAGE_CONNECTION_STRING"],
        ),
        (
            "az://abc",
            {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=models1;SharedAccessSignature=s3cret"},
            ["AZURE_STORAGE_CONNECTION_STRING"],
        ),
    ],
)
def test_variables_that_are_refused(uri: str, environ: dict[str, str], names: list[str]) -> None:
    """The error names what contradicts what, and shows no secret."""
    with pytest.raises(SettingsError) as caught:
        where(uri, **environ)

    assert [] == [name for name in names if name not in str(caught.value)]
    assert caught.value.hint
    for secret in (KEY, "b3RoZXI=", "s3cret", "sig=a"):
        assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"AZURE_STORAGE_ACCOUNT_NAME": "Not_A_Name"},
        {"AZURE_STORAGE_ACCOUNT_KEY": "s3cret!"},
        {"AZURE_STORAGE_SAS_TOKEN": "https://models1.blob.core.windows.net/?sig=s3cret"},
        {"AZURE_STORAGE_SAS_TOKEN": "s3cret"},
        {"AZURE_STORAGE_SAS_TOKEN": "sv=1&sig=s3cret\r\nX: y"},
        {"AZURE_STORAGE_SAS_TOKEN": "sv=1&sig=s3cret#fragment"},
        {"AZURE_STORAGE_ENDPOINT": "models.example.com"},
        {"AZURE_STORAGE_ENDPOINT": "https://models.example.com/a b"},
        {"AZURE_STORAGE_ENDPOINT": "https://models.example.com/#x"},
        {"AZURE_STORAGE_ENDPOINT": "https://user:s3cret@models.example.com"},
        {"AZURE_STORAGE_ENDPOINT": "https://models.example.com?sig=s3cret"},
        {"AZURE_AUTHORITY_HOST": "http://login.example.com"},
        {"MX_AZURE_READ_TIMEOUT_SECONDS": "0"},
    ],
)
def test_values_that_cannot_be_used(bad: dict[str, str]) -> None:
    """The variable is named; what may be a secret is not shown."""
    with pytest.raises(SettingsError, match=next(iter(bad))) as caught:
        from_env(AzureSettings, bad)

    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "kind"),
    [
        ({"AZURE_STORAGE_CONNECTION_STRING": STRING, "AZURE_STORAGE_SAS_TOKEN": "sig=a"}, "key"),
        ({"AZURE_STORAGE_ACCOUNT_KEY": KEY, "AZURE_STORAGE_SAS_TOKEN": "sig=a"}, "key"),
        ({"AZURE_ACCOUNT_KEY": KEY}, "key"),
        ({"AZURE_STORAGE_SAS_TOKEN": "?sig=a"}, "sas"),
        ({}, "neither"),
        ({"AZURE_STORAGE_ACCOUNT_KEY": KEY, "MX_AZURE_ANONYMOUS": "1"}, "neither"),
    ],
)
def test_which_credential_counts(environ: dict[str, str], kind: str) -> None:
    """A connection string, then a key, then a SAS token; none of them for anonymous requests."""
    location = locate(ModelURI.parse("az://abc"), from_env(AzureSettings, {**NAME, **environ}))

    assert kind == ("key" if location.key else "sas" if location.sas else "neither")
    assert "sig=a" not in repr(location)
    assert "s3cret" not in repr(location)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("https://models1.blob.core.windows.net/abc/a/b", "az://models1.blob.core.windows.net/abc/a/b"),
        ("az://abc@models1.blob.core.windows.net/a/b", "az://models1.blob.core.windows.net/abc/a/b"),
        ("abfss://abc@models1.dfs.core.windows.net/a", "abfss://models1.dfs.core.windows.net/abc/a"),
        ("https://example.com/abc/a", None),
        ("https://user:password@models1.blob.core.windows.net/abc/a", None),
        ("az://abc/a", None),
        ("az://user:password@models1.blob.core.windows.net/a", None),
        ("s3://abc@models1.blob.core.windows.net/a", None),
    ],
)
def test_how_uris_are_rewritten(uri: str, expected: str | None) -> None:
    """So that messages show the container. https stays free: only hosts of Azure are rewritten."""
    rewritten = mx_rewrite_uri(ModelURI.parse(uri))

    assert expected == (None if rewritten is None else str(rewritten))


def test_https_is_left_to_others() -> None:
    """The plugin does not claim the scheme."""
    manager = PluginManager.discover({"MX_PLUGINS": "mx-azure", "MX_STRICT_PLUGINS": "1"})

    with pytest.raises(ModelExpressError):
        manager.table(STORAGE).lookup("https")
    assert "mx-azure" == manager.table(STORAGE).lookup("az").plugin.name


def test_a_key_needs_no_sdk() -> None:
    """Opening a storage with a key or a SAS token imports neither azure-core nor azure-identity."""
    program = """
import sys
from modelexpress_core.uri import ModelURI
from mx_azure._storage import open_azure
for credential in ({"AZURE_STORAGE_ACCOUNT_KEY": "a2V5"}, {"AZURE_STORAGE_SAS_TOKEN": "sig=a"}):
    open_azure(ModelURI.parse("az://models"), {"AZURE_STORAGE_ACCOUNT_NAME": "models1", **credential}).credentials()
print(*sys.modules)
"""

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert 0 == done.returncode, done.stderr
    assert set() == {"azure", "msal", "requests", "cryptography", "torch"} & set(done.stdout.split())


def test_secrets_are_not_shown() -> None:
    """Neither repr nor `mx settings` shows a key, a token or a password."""
    environ = {
        **NAME,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        "AZURE_STORAGE_CONNECTION_STRING": STRING,
        "AZURE_STORAGE_SAS_TOKEN": "sv=1&sig=s3cret",
        "AZURE_CLIENT_SECRET": "s3cret",
        "AZURE_CLIENT_CERTIFICATE_PASSWORD": "s3cret",
    }

    shown = f"{from_env(AzureSettings, environ)!r} {describe(AzureSettings, environ, owner='mx-azure')!r}"

    assert "s3cret" not in shown
    assert KEY not in shown
