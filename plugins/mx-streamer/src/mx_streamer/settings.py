"""The settings that the plugin compares with those of the regular plugin; the engine reads many more itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from attrs import evolve, frozen

from modelexpress_core.contracts.storage import Endpoint
from modelexpress_core.errors import SettingsError
from modelexpress_core.settings import boolean, env, from_env

__all__ = [
    "AzureEngineSettings",
    "GcsEngineSettings",
    "StreamerSettings",
    "check_azure",
    "check_environment",
    "check_gcs",
    "engine_endpoint",
]

_OWN_PREFIX = "RUNAI_STREAMER_"
_ADDRESSING = "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"
_GCS_SERVER = "CLOUD_STORAGE_EMULATOR_ENDPOINT"
_GCS_HOST = "storage.googleapis.com"
_AZURE_ACCOUNT = "AZURE_STORAGE_ACCOUNT_NAME"
_AZURE_SUFFIX = "AZURE_STORAGE_ENDPOINT_SUFFIX"
_OTHERWISE = "or take mx-streamer out of MX_PREFER"

#: Settings of the regular plugins that choose credentials, or a path on the server, and that the engine does not read.
_UNKNOWN_OF_GCS = ("MX_GCS_ANONYMOUS", "MX_GCS_IMPERSONATE_SERVICE_ACCOUNT", "MX_GCS_USER_PROJECT")
_UNKNOWN_OF_AZURE = (
    "AZURE_ACCOUNT_KEY",
    "AZURE_CLIENT_CERTIFICATE_PASSWORD",
    "AZURE_STORAGE_CONNECTION_STRING",
    "MX_AZURE_ANONYMOUS",
)


@frozen
class StreamerSettings:
    """How the engine reaches S3."""

    virtual_addressing: bool = env(
        _ADDRESSING,
        default=True,
        converter=boolean,
        help="Whether the engine puts the bucket into the host name of S3; if not, into the path.",
    )


@frozen
class GcsEngineSettings:
    """How the engine reaches GCS."""

    server: str | None = env(
        _GCS_SERVER,
        default=None,
        help="URL of the server that the engine asks, without credentials; unset: https://storage.googleapis.com, with "
        "Application Default Credentials.",
    )


@frozen
class AzureEngineSettings:
    """How the engine reaches Azure Blob Storage."""

    suffix: str = env(
        _AZURE_SUFFIX,
        default="blob.core.windows.net",
        help="What follows the name of the account in the host that the engine asks.",
    )


def check_environment(settings: Mapping[str, str], *prefixes: str, environ: Mapping[str, str] = os.environ) -> None:
    """Return if ``settings`` agree with the environment of the process, which alone the engine reads.

    Variables with one of ``prefixes`` must be the same, or unset in both. Those of the engine itself may be left out.

    Raises:
        SettingsError: They differ. The message names the variables, and no value.
    """
    names = {name for name in settings if name.startswith((_OWN_PREFIX, *prefixes))}
    names |= {name for name in environ if name.startswith(prefixes)}
    differ = sorted(name for name in names if settings.get(name) != environ.get(name))
    if differ:
        message = (
            f"the engine of mx-streamer reads {', '.join(differ)} from the environment of the process, which differs "
            "from the settings of this load"
        )
        raise SettingsError(
            message, hint="set the variables in the environment of the process, or take mx-streamer out of MX_PREFER"
        )


def engine_endpoint(endpoint: Endpoint, bucket: str, settings: StreamerSettings) -> str:
    """The URL of the server for the engine, from the one that requests of the regular plugin go to.

    Raises:
        SettingsError: The engine would put the bucket elsewhere in the URL, and so reach another server.
    """
    in_host = endpoint.host.startswith(f"{bucket}.")
    if in_host != settings.virtual_addressing:
        where, value = ("host name", 1) if in_host else ("path", 0)
        message = f"requests to {endpoint.host} have the bucket in the {where}, and {_ADDRESSING} says otherwise"
        raise SettingsError(message, hint=f"set {_ADDRESSING}={value} in the environment of the process")
    return _server(evolve(endpoint, host=endpoint.host.removeprefix(f"{bucket}.")) if in_host else endpoint)


def check_gcs(endpoint: Endpoint, settings: Mapping[str, str], *, environ: Mapping[str, str] = os.environ) -> None:
    """Return if the engine asks the server at ``endpoint``, with the credentials of the regular plugin or with none.

    Raises:
        SettingsError: It would ask another server, or with other credentials.
    """
    _refuse_paths(settings, "MX_GCS_ENDPOINT", "STORAGE_EMULATOR_HOST", _GCS_SERVER)
    server = from_env(GcsEngineSettings, environ).server
    asked = _server_of(server or f"https://{_GCS_HOST}", _GCS_SERVER)
    if asked != _server(endpoint):
        message = f"the engine of mx-streamer would ask {asked} for objects of {_server(endpoint)}"
        hint = f"set {_GCS_SERVER}={_server(endpoint)} in the environment of the process, for a server that needs no "
        raise SettingsError(message, hint=f"{hint}credentials, {_OTHERWISE}")
    if server is None:
        _refuse_unknown(settings, _UNKNOWN_OF_GCS)


def check_azure(endpoint: Endpoint, settings: Mapping[str, str], *, environ: Mapping[str, str] = os.environ) -> None:
    """Return if the engine asks the server at ``endpoint`` with the credentials of the regular plugin.

    Raises:
        SettingsError: It would ask another server, or with other credentials.
    """
    _refuse_paths(settings, "AZURE_STORAGE_ENDPOINT")
    account = environ.get(_AZURE_ACCOUNT, "")
    suffix = from_env(AzureEngineSettings, environ).suffix
    asked = _server_of(f"https://{account}.{suffix}", _AZURE_SUFFIX)
    if asked != _server(endpoint):
        message = f"the engine of mx-streamer would ask {asked} for blobs of {_server(endpoint)}"
        hint = f"set {_AZURE_ACCOUNT} and {_AZURE_SUFFIX} in the environment of the process to the two parts of that "
        raise SettingsError(message, hint=f"{hint}host, which the engine reaches by https only, {_OTHERWISE}")
    _refuse_unknown(settings, _UNKNOWN_OF_AZURE)
    if settings.get("AZURE_STORAGE_ACCOUNT_KEY") and settings.get("AZURE_STORAGE_SAS_TOKEN"):
        message = "the engine of mx-streamer would use AZURE_STORAGE_SAS_TOKEN in place of AZURE_STORAGE_ACCOUNT_KEY"
        raise SettingsError(message, hint="unset one of them")


def _refuse_unknown(settings: Mapping[str, str], names: Sequence[str]) -> None:
    """Refuse settings that the engine does not read: it would ask with other credentials."""
    found = [name for name in names if settings.get(name)]
    if found:
        message = f"the engine of mx-streamer does not read {' and '.join(found)}, and would use other credentials"
        raise SettingsError(message, hint=f"unset {'them' if len(found) > 1 else 'it'}, {_OTHERWISE}")


def _refuse_paths(settings: Mapping[str, str], *names: str) -> None:
    """Refuse URLs of servers with a path, which the engine does not read, or reads in another way."""
    for name in names:
        if "/" in settings.get(name, "").strip().rstrip("/").rpartition("://")[2]:
            message = f"{name} has a path, and the engine of mx-streamer asks for objects without it"
            raise SettingsError(message, hint=f"name a server without a path, {_OTHERWISE}")


def _server_of(url: str, name: str) -> str:
    """Scheme, host and port of ``url``, the value of ``name``; nothing else of it, as it may hold a password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not host or parts.scheme not in {"http", "https"}:
        raise SettingsError(f"{name} makes no URL of a server", hint="set it to a URL such as http://127.0.0.1:4443")
    tls = parts.scheme == "https"
    return _server(Endpoint(host, port or (443 if tls else 80), tls=tls))


def _server(endpoint: Endpoint) -> str:
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    return f"{'https' if endpoint.tls else 'http'}://{host.lower()}:{endpoint.port}"
