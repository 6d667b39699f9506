"""The settings of the Azure plugin: the usual variables of Azure's tools, and a few ``MX_AZURE_`` variables."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import urlsplit

from attrs import frozen

from modelexpress_core.errors import SettingsError
from modelexpress_core.settings import env
from modelexpress_core.settings.http import (
    anonymous,
    ca_bundle,
    connect_timeout,
    http_url,
    is_http_url,
    read_timeout,
    refuse_credentials_in_urls,
)

__all__ = ["ACCOUNT", "AZURE_HOST", "CONTAINER", "AzureSettings", "is_endpoint", "is_sas_token"]

#: https://learn.microsoft.com/azure/storage/common/storage-account-overview#storage-account-name
ACCOUNT = re.compile(r"[a-z0-9]{3,24}")

#: https://learn.microsoft.com/rest/api/storageservices/naming-and-referencing-containers--blobs--and-metadata
CONTAINER = re.compile(r"(?=.{3,63}$)[a-z0-9]+(?:-[a-z0-9]+)*|\$root|\$web|\$logs")

#: The host of an account in a cloud of Azure: of its Blob service, or of Data Lake Storage, which holds the same data.
AZURE_HOST = re.compile(
    r"(?P<account>[a-z0-9]{3,24})(?P<secondary>-secondary)?\.(?P<zone>(?:z[0-9]{1,2}|privatelink)\.)?(?:blob|dfs)\."
    r"(?P<suffix>core\.windows\.net|core\.chinacloudapi\.cn|core\.usgovcloudapi\.net|storage\.azure\.net)"
)


def _account(text: str) -> str:
    if not ACCOUNT.fullmatch(text.strip()):
        reason = "expected the name of a storage account: 3 to 24 lower-case letters and digits"
        raise ValueError(reason)
    return text.strip()


def _key(text: str) -> str:
    try:
        usable = bool(base64.b64decode(text.strip(), validate=True))
    except binascii.Error:
        usable = False
    if not usable:
        reason = "expected an account key in Base64, as the portal and `az storage account keys list` show it"
        raise ValueError(reason)
    return text.strip()


def is_sas_token(token: str) -> bool:
    """Whether ``token`` looks like a SAS token, and can be sent as a query."""
    return "://" not in token.partition("=")[0] and "sig=" in token and bool(re.fullmatch(r"[!\"$-~]+", token))


def is_endpoint(url: str) -> bool:
    """Whether ``url`` can be that of a Blob service: http or https, and a path of plain characters."""
    return is_http_url(url) and "@" not in url and bool(re.fullmatch(r"[A-Za-z0-9/._~-]*", urlsplit(url).path))


def _sas_token(text: str) -> str:
    token = text.strip().removeprefix("?")
    if not is_sas_token(token):
        reason = "expected a SAS token such as sv=...&sp=rl&sig=..., percent-encoded and without the URL"
        raise ValueError(reason)
    return token


def _authority(text: str) -> str:
    host = text.strip().removeprefix("https://").rstrip("/")
    if not re.fullmatch(r"[A-Za-z0-9._-]+(?::[0-9]{1,5})?", host):
        reason = "expected a host such as login.microsoftonline.com, which is reached by https"
        raise ValueError(reason)
    return f"https://{host}"


@frozen
class AzureSettings:
    """How Azure Blob Storage is reached, and with which credentials.

    The first of these that is set counts: a connection string, an account key, a SAS token, a service principal, a
    federated token. Without any, azure-identity looks for a managed identity, and for the logins of developer tools.
    """

    account_name: str | None = env(
        "AZURE_STORAGE_ACCOUNT_NAME",
        default=None,
        converter=_account,
        help="Storage account of URIs that name none.",
    )
    other_account_name: str | None = env(
        "AZURE_ACCOUNT_NAME",
        default=None,
        converter=_account,
        help="The same under another name; must agree with AZURE_STORAGE_ACCOUNT_NAME.",
    )
    account_key: str | None = env(
        "AZURE_STORAGE_ACCOUNT_KEY",
        default=None,
        converter=_key,
        secret=True,
        help="Key of the account.",
    )
    other_account_key: str | None = env(
        "AZURE_ACCOUNT_KEY",
        default=None,
        converter=_key,
        secret=True,
        help="The same under another name; must agree with AZURE_STORAGE_ACCOUNT_KEY.",
    )
    connection_string: str | None = env(
        "AZURE_STORAGE_CONNECTION_STRING",
        default=None,
        secret=True,
        help="Account, endpoint and credentials in one text, as the portal shows it.",
    )
    sas_token: str | None = env(
        "AZURE_STORAGE_SAS_TOKEN",
        default=None,
        converter=_sas_token,
        secret=True,
        help="Shared access signature; needs the permissions r and l.",
    )
    endpoint: str | None = env(
        "AZURE_STORAGE_ENDPOINT",
        default=None,
        converter=http_url(
            "https://account.blob.core.windows.net", "http://127.0.0.1:10000/account", accepts=is_endpoint
        ),
        help="URL of the Blob service, for other clouds, private links and emulators; with the account in its path "
        "where the server wants it there.",
    )
    anonymous: bool = anonymous("MX_AZURE", "without credentials", "containers")
    tenant_id: str | None = env(
        "AZURE_TENANT_ID",
        default=None,
        help="Tenant of the service principal or workload identity.",
    )
    client_id: str | None = env(
        "AZURE_CLIENT_ID",
        default=None,
        help="Application of the service principal or workload identity, or the user-assigned managed identity.",
    )
    client_secret: str | None = env(
        "AZURE_CLIENT_SECRET",
        default=None,
        secret=True,
        help="Secret of the service principal.",
    )
    client_certificate: str | None = env(
        "AZURE_CLIENT_CERTIFICATE_PATH",
        default=None,
        help="File with the certificate and the private key of the service principal, if it has no secret.",
    )
    certificate_password: str | None = env(
        "AZURE_CLIENT_CERTIFICATE_PASSWORD",
        default=None,
        secret=True,
        help="Password of that file.",
    )
    federated_token_file: str | None = env(
        "AZURE_FEDERATED_TOKEN_FILE",
        default=None,
        help="File with the token of a workload identity (AKS mounts it).",
    )
    authority: str | None = env(
        "AZURE_AUTHORITY_HOST",
        default=None,
        converter=_authority,
        help="Host of Microsoft Entra ID; unset: login.microsoftonline.com.",
    )
    ca_bundle: str | None = ca_bundle("MX_AZURE_CA_BUNDLE", "REQUESTS_CA_BUNDLE", unset="those of certifi")
    connect_timeout_seconds: float = connect_timeout("MX_AZURE")
    read_timeout_seconds: float = read_timeout("MX_AZURE")

    @property
    def account(self) -> str | None:
        """The account that the variables name."""
        return self.account_name or self.other_account_name

    @property
    def key(self) -> str | None:
        """The key that the variables hold."""
        return self.account_key or self.other_account_key

    def __attrs_post_init__(self) -> None:
        """Refuse variables that disagree, and URLs with credentials, without showing secrets."""
        if self.account_name and self.other_account_name and self.account_name != self.other_account_name:
            message = (
                f"AZURE_STORAGE_ACCOUNT_NAME is {self.account_name} and AZURE_ACCOUNT_NAME is {self.other_account_name}"
            )
            raise SettingsError(message, hint="unset one of them, or set both to the same account")
        if self.account_key and self.other_account_key and self.account_key != self.other_account_key:
            message = "AZURE_STORAGE_ACCOUNT_KEY and AZURE_ACCOUNT_KEY hold different keys"
            raise SettingsError(message, hint="unset one of them")
        refuse_credentials_in_urls(
            {"AZURE_STORAGE_ENDPOINT": self.endpoint}, hint="a SAS token goes into AZURE_STORAGE_SAS_TOKEN"
        )
