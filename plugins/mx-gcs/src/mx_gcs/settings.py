"""The settings of the GCS plugin: the usual variables of Google's tools, and a few ``MX_GCS_`` variables."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from attrs import frozen

from modelexpress_core.contracts.storage import Endpoint
from modelexpress_core.errors import SettingsError
from modelexpress_core.settings import boolean, env
from modelexpress_core.settings.http import (
    anonymous,
    ca_bundle,
    connect_timeout,
    http_url,
    read_timeout,
    refuse_credentials_in_urls,
)

__all__ = ["GcsSettings"]

_HOST_AND_PORT = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")

#: RFC 1035 section 2.3.1, with at least one dot.
_DOMAIN = re.compile(r"[a-z0-9-]+(?:\.[a-z0-9-]+)+")

#: Names and numbers of projects; those of an organisation have its domain and a colon before the name.
_PROJECT = re.compile(r"(?:[a-z0-9.-]+:)?[a-z0-9-]{1,63}")

_SERVICE_ACCOUNT = re.compile(r"[A-Za-z0-9._-]+@[A-Za-z0-9.-]+")


_url = http_url("https://storage-example.p.googleapis.com", "http://127.0.0.1:4443")


def _emulator(text: str) -> str:
    text = text.strip()
    return _url(text if "://" in text else f"http://{text}")


def _matching(pattern: re.Pattern[str], reason: str, text: str) -> str:
    text = text.strip()
    if not pattern.fullmatch(text):
        raise ValueError(reason)
    return text


def _metadata_host(text: str) -> str:
    return _matching(_HOST_AND_PORT, "expected a host, or host:port", text)


def _universe_domain(text: str) -> str:
    return _matching(_DOMAIN, "expected a domain such as googleapis.com", text.lower())


def _project(text: str) -> str:
    return _matching(_PROJECT, "expected the id or the number of a project", text)


def _service_accounts(text: str) -> tuple[str, ...]:
    emails = tuple(part.strip() for part in text.split(","))
    reason = "expected the email address of a service account, after those of delegates: delegate@..., target@..."
    return tuple(_matching(_SERVICE_ACCOUNT, reason, email) for email in emails)


@frozen
class GcsSettings:
    """How GCS is reached, and with which credentials.

    Credentials are those that Google calls Application Default Credentials: the file in
    GOOGLE_APPLICATION_CREDENTIALS, the login of gcloud, the metadata server of the machine or the pod.
    """

    credentials_file: str | None = env(
        "GOOGLE_APPLICATION_CREDENTIALS",
        default=None,
        help="File with the credentials: a service account's key, an external account (workload identity federation), "
        "a user's login or an impersonated service account.",
    )
    config_directory: str | None = env(
        "CLOUDSDK_CONFIG",
        default=None,
        help="Directory of gcloud, which holds the login of gcloud auth application-default login; unset: "
        "~/.config/gcloud.",
    )
    impersonated: tuple[str, ...] = env(
        "MX_GCS_IMPERSONATE_SERVICE_ACCOUNT",
        default=(),
        converter=_service_accounts,
        help="Email address of a service account to act as; addresses before it, separated by commas, are delegates.",
    )
    metadata_host: str | None = env(
        "GCE_METADATA_HOST",
        default=None,
        converter=_metadata_host,
        help="Host, or host:port, of the metadata server; unset: metadata.google.internal.",
    )
    metadata_disabled: bool = env(
        "NO_GCE_CHECK",
        default=False,
        converter=boolean,
        help="Do not request credentials from the metadata server.",
    )
    user_project: str | None = env(
        "MX_GCS_USER_PROJECT",
        "GOOGLE_CLOUD_QUOTA_PROJECT",
        default=None,
        converter=_project,
        help="Project that pays for requests, as buckets with Requester Pays need it.",
    )
    universe_domain: str = env(
        "GOOGLE_CLOUD_UNIVERSE_DOMAIN",
        default="googleapis.com",
        converter=_universe_domain,
        help="Domain of the cloud, if it is not Google's public one.",
    )
    endpoint: str | None = env(
        "MX_GCS_ENDPOINT",
        default=None,
        converter=_url,
        help="URL of the server (Private Service Connect, a proxy of your own); unset: https://storage.googleapis.com.",
    )
    emulator: str | None = env(
        "STORAGE_EMULATOR_HOST",
        default=None,
        converter=_emulator,
        help="URL, or host:port, of an emulator. Requests carry no credentials.",
    )
    ca_bundle: str | None = ca_bundle("MX_GCS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", unset="those of this system")
    anonymous: bool = anonymous("MX_GCS", "without credentials", "buckets")
    connect_timeout_seconds: float = connect_timeout("MX_GCS")
    read_timeout_seconds: float = read_timeout("MX_GCS")

    def __attrs_post_init__(self) -> None:
        """Refuse URLs with credentials, without showing them, and plain HTTP for access tokens."""
        urls = {"MX_GCS_ENDPOINT": self.endpoint, "STORAGE_EMULATOR_HOST": self.emulator}
        refuse_credentials_in_urls(urls, hint="GOOGLE_APPLICATION_CREDENTIALS names the credentials")
        parts = urlsplit(self.base_url)
        if (
            parts.scheme == "http"
            and not self.without_credentials
            and not Endpoint(parts.hostname or "", 0).is_loopback
        ):
            message = "MX_GCS_ENDPOINT is an http:// URL of another machine: access tokens would be sent unencrypted"
            raise SettingsError(
                message, hint="use https://, or MX_GCS_ANONYMOUS=1, or STORAGE_EMULATOR_HOST for an emulator"
            )

    @property
    def base_url(self) -> str:
        """Where the API is, without a slash at the end."""
        return self.endpoint or self.emulator or f"https://storage.{self.universe_domain}"

    @property
    def without_credentials(self) -> bool:
        """Whether requests carry no credentials: MX_GCS_ANONYMOUS, or an emulator."""
        return self.anonymous or (self.endpoint is None and self.emulator is not None)
