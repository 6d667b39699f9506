"""The settings of the S3 plugin: the usual variables of AWS tools, and a few ``MX_S3_`` variables."""

from __future__ import annotations

import re
from typing import Literal

from attrs import frozen

from modelexpress_core.settings import boolean, env
from modelexpress_core.settings.http import (
    anonymous,
    ca_bundle,
    connect_timeout,
    http_url,
    read_timeout,
    refuse_credentials_in_urls,
)

__all__ = ["REGION_PATTERN", "S3Settings"]

#: Names of regions that are valid in a host name.
REGION_PATTERN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def _region(text: str) -> str:
    if not REGION_PATTERN.fullmatch(text.strip()):
        reason = "expected the name of a region such as eu-central-1"
        raise ValueError(reason)
    return text.strip()


_url = http_url("https://s3.example.com", "http://127.0.0.1:9000")


def _addressing_style(text: str) -> str:
    style = text.strip().lower()
    if style not in {"path", "virtual", "auto"}:
        reason = "expected path, virtual or auto"
        raise ValueError(reason)
    return style


@frozen
class S3Settings:
    """How S3 is reached, and with which credentials.

    For settings that are unset, botocore uses the usual places of AWS tools: the shared configuration files, the
    environment of a container, the instance metadata service.
    """

    access_key_id: str | None = env(
        "AWS_ACCESS_KEY_ID",
        default=None,
        secret=True,
        help="Access key; needs AWS_SECRET_ACCESS_KEY too.",
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
        help="Profile in the shared configuration files; used if no access key is set.",
    )
    credentials_file: str | None = env(
        "AWS_SHARED_CREDENTIALS_FILE",
        default=None,
        help="File with credentials by profile; unset: ~/.aws/credentials.",
    )
    config_file: str | None = env(
        "AWS_CONFIG_FILE",
        default=None,
        help="File with other settings by profile; unset: ~/.aws/config.",
    )
    web_identity_token_file: str | None = env(
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        default=None,
        help="File with the token for assuming AWS_ROLE_ARN (EKS: IRSA); used if no access key is set.",
    )
    role_arn: str | None = env(
        "AWS_ROLE_ARN",
        default=None,
        help="Role to assume with AWS_WEB_IDENTITY_TOKEN_FILE.",
    )
    role_session_name: str | None = env(
        "AWS_ROLE_SESSION_NAME",
        default=None,
        help="Name of the session of AWS_ROLE_ARN in logs; unset: a name with the time.",
    )
    container_credentials_full_uri: str | None = env(
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        default=None,
        help="URL from which a container gets its credentials (EKS Pod Identity).",
    )
    container_credentials_relative_uri: str | None = env(
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        default=None,
        help="Path on 169.254.170.2 from which a container gets its credentials (ECS).",
    )
    container_authorization_token_file: str | None = env(
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        default=None,
        help="File with the token for the URL of the container's credentials.",
    )
    container_authorization_token: str | None = env(
        "AWS_CONTAINER_AUTHORIZATION_TOKEN",
        default=None,
        secret=True,
        help="Token for the URL of the container's credentials, if there is no file.",
    )
    metadata_endpoint: str | None = env(
        "AWS_EC2_METADATA_SERVICE_ENDPOINT",
        default=None,
        converter=_url,
        help="URL of the instance metadata service; unset: http://169.254.169.254/.",
    )
    metadata_disabled: bool | None = env(
        "AWS_EC2_METADATA_DISABLED",
        default=None,
        converter=boolean,
        help="Do not request credentials from the instance metadata service.",
    )
    region: str | None = env(
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        default=None,
        converter=_region,
        help="Region of the bucket; unset: the profile's, or us-east-1. ?region= in a URI overrides it.",
    )
    endpoint: str | None = env(
        "AWS_ENDPOINT_URL",
        default=None,
        converter=_url,
        help="URL of a server other than AWS that speaks the S3 protocol.",
    )
    s3_endpoint: str | None = env(
        "AWS_ENDPOINT_URL_S3",
        default=None,
        converter=_url,
        help="The same for S3 only; overrides AWS_ENDPOINT_URL.",
    )
    sts_endpoint: str | None = env(
        "AWS_ENDPOINT_URL_STS",
        default=None,
        converter=_url,
        help="The same for the Security Token Service, which issues credentials of roles.",
    )
    ca_bundle: str | None = ca_bundle("AWS_CA_BUNDLE")
    anonymous: bool = anonymous("MX_S3", "unsigned", "buckets")
    addressing_style: Literal["path", "virtual", "auto"] | None = env(
        "MX_S3_ADDRESSING_STYLE",
        default=None,
        converter=_addressing_style,
        help="Position of the bucket in URLs: path, virtual (in the host name) or auto; unset: the profile's, or auto, "
        "which is path if an endpoint is set.",
    )
    connect_timeout_seconds: float = connect_timeout("MX_S3")
    read_timeout_seconds: float = read_timeout("MX_S3")

    def __attrs_post_init__(self) -> None:
        """Refuse URLs with credentials, without showing them."""
        urls = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.s3_endpoint,
            "AWS_ENDPOINT_URL_STS": self.sts_endpoint,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.metadata_endpoint,
        }
        refuse_credentials_in_urls(urls, hint="put keys into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
