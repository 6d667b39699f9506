"""The variables that the S3 plugin reads: those that every AWS tool knows, and a few of its own."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from attrs import frozen

from modelexpress_core.errors import SettingsError
from modelexpress_core.settings import boolean, env, seconds

__all__ = ["REGION_PATTERN", "S3Settings"]

#: What can stand in a host name in place of a region.
REGION_PATTERN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def _region(text: str) -> str:
    if not REGION_PATTERN.fullmatch(text.strip()):
        reason = "expected the name of a region such as eu-central-1"
        raise ValueError(reason)
    return text.strip()


def _endpoint(text: str) -> str:
    text = text.strip()
    if "@" in text:  # may hold a password, which a ValueError would show; see S3Settings
        return text
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"http", "https"} and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        reason = "expected a URL such as https://s3.example.com or http://127.0.0.1:9000"
        raise ValueError(reason)
    return text


def _addressing_style(text: str) -> str:
    style = text.strip().lower()
    if style not in {"path", "virtual", "auto"}:
        reason = "expected path, virtual or auto"
        raise ValueError(reason)
    return style


@frozen
class S3Settings:
    """How S3 is reached, and as whom.

    What is not set here, botocore looks for where every AWS tool does: in the shared configuration files, in the
    environment of a container, at the instance metadata service.
    """

    access_key_id: str | None = env(
        "AWS_ACCESS_KEY_ID",
        default=None,
        secret=True,
        help="Access key; goes with AWS_SECRET_ACCESS_KEY.",
    )
    secret_access_key: str | None = env(
        "AWS_SECRET_ACCESS_KEY",
        default=None,
        secret=True,
        help="Secret of the access key.",
    )
    session_token: str | None = env(
        "AWS_SESSION_TOKEN",
        default=None,
        secret=True,
        help="Session token of temporary credentials.",
    )
    profile: str | None = env(
        "AWS_PROFILE",
        "AWS_DEFAULT_PROFILE",
        default=None,
        help="Profile in the shared configuration files; used where no access key is set.",
    )
    credentials_file: str | None = env(
        "AWS_SHARED_CREDENTIALS_FILE",
        default=None,
        help="The file with credentials by profile; unset: ~/.aws/credentials.",
    )
    config_file: str | None = env(
        "AWS_CONFIG_FILE",
        default=None,
        help="The file with other settings by profile; unset: ~/.aws/config.",
    )
    web_identity_token_file: str | None = env(
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        default=None,
        help="The file with the token that AWS_ROLE_ARN is assumed with (EKS: IRSA); used where no access key is set.",
    )
    role_arn: str | None = env(
        "AWS_ROLE_ARN",
        default=None,
        help="The role that is assumed with AWS_WEB_IDENTITY_TOKEN_FILE.",
    )
    role_session_name: str | None = env(
        "AWS_ROLE_SESSION_NAME",
        default=None,
        help="What the session of AWS_ROLE_ARN is called in logs; unset: a name with the time.",
    )
    container_credentials_full_uri: str | None = env(
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        default=None,
        help="URL that gives a container its credentials (EKS Pod Identity).",
    )
    container_credentials_relative_uri: str | None = env(
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        default=None,
        help="The same as a path on 169.254.170.2 (ECS).",
    )
    container_authorization_token_file: str | None = env(
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        default=None,
        help="The file with the token that this URL asks for.",
    )
    container_authorization_token: str | None = env(
        "AWS_CONTAINER_AUTHORIZATION_TOKEN",
        default=None,
        secret=True,
        help="That token itself, where there is no file.",
    )
    metadata_endpoint: str | None = env(
        "AWS_EC2_METADATA_SERVICE_ENDPOINT",
        default=None,
        converter=_endpoint,
        help="URL of the instance metadata service; unset: http://169.254.169.254/.",
    )
    metadata_disabled: bool | None = env(
        "AWS_EC2_METADATA_DISABLED",
        default=None,
        converter=boolean,
        help="Do not ask the instance metadata service for credentials.",
    )
    region: str | None = env(
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        default=None,
        converter=_region,
        help="Region of the bucket; unset: the profile's, or us-east-1. ?region= in a URI goes first.",
    )
    endpoint: str | None = env(
        "AWS_ENDPOINT_URL",
        default=None,
        converter=_endpoint,
        help="URL of a server other than AWS that speaks the S3 protocol.",
    )
    s3_endpoint: str | None = env(
        "AWS_ENDPOINT_URL_S3",
        default=None,
        converter=_endpoint,
        help="The same for S3 alone; goes before AWS_ENDPOINT_URL.",
    )
    sts_endpoint: str | None = env(
        "AWS_ENDPOINT_URL_STS",
        default=None,
        converter=_endpoint,
        help="The same for the Security Token Service, which gives the credentials of roles.",
    )
    ca_bundle: str | None = env(
        "AWS_CA_BUNDLE",
        default=None,
        help="File with the certificate authorities that are trusted.",
    )
    anonymous: bool = env(
        "MX_S3_ANONYMOUS",
        default=False,
        converter=boolean,
        help="Send requests unsigned, for public buckets.",
    )
    addressing_style: Literal["path", "virtual", "auto"] | None = env(
        "MX_S3_ADDRESSING_STYLE",
        default=None,
        converter=_addressing_style,
        help="Where the bucket stands: path, virtual (in the host name) or auto; unset: the profile's, or auto, "
        "which is path where an endpoint is set.",
    )
    connect_timeout_seconds: float = env(
        "MX_S3_CONNECT_TIMEOUT_SECONDS",
        default=10.0,
        converter=seconds,
        help="How long to wait for a connection.",
    )
    read_timeout_seconds: float = env(
        "MX_S3_READ_TIMEOUT_SECONDS",
        default=30.0,
        converter=seconds,
        help="How long to wait for the next bytes.",
    )

    def __attrs_post_init__(self) -> None:
        """Refuse what must not be shown, without showing it."""
        urls = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.s3_endpoint,
            "AWS_ENDPOINT_URL_STS": self.sts_endpoint,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.metadata_endpoint,
        }
        names = [name for name, url in urls.items() if url is not None and "@" in url]
        if names:
            message = (
                f"{' and '.join(names)} must not hold a user name or a password, which nothing there has a use for"
            )
            raise SettingsError(message, hint="take it out; keys go into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
