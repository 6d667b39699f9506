"""Which account, endpoint and container a URI means, and what proves that they may be read."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from urllib.parse import urlsplit

from attrs import field, frozen

from modelexpress_core.errors import InvalidURIError, SettingsError
from modelexpress_core.storage.http import Origin, check_uri
from modelexpress_core.uri import ModelURI
from mx_azure.settings import ACCOUNT, AZURE_HOST, CONTAINER, AzureSettings, is_endpoint, is_sas_token

__all__ = ["Location", "locate"]

_CONNECTION_STRING = "AZURE_STORAGE_CONNECTION_STRING"
_ENDPOINT = "AZURE_STORAGE_ENDPOINT"
_QUALIFIED = "https://account.blob.core.windows.net/container/path"
_WRITE = f"write az://container/path, or {_QUALIFIED}"
_NAME_HINT = f"the account goes into AZURE_STORAGE_ACCOUNT_NAME, a SAS token into AZURE_STORAGE_SAS_TOKEN; {_WRITE}"
_CREDENTIALS_HINT = (
    "remove them, and set AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or AZURE_STORAGE_CONNECTION_STRING"
)

#: The account of every Azurite, and its key, which Microsoft publishes:
#: https://learn.microsoft.com/azure/storage/common/storage-connect-azurite
_DEVELOPMENT = {
    "AccountName": "devstoreaccount1",
    "AccountKey": "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
    "BlobEndpoint": "http://127.0.0.1:10000/devstoreaccount1",
}


@frozen
class Location:
    """Where the objects of a URI are, and the key or token for them.

    Attributes:
        account: Name of the account; empty where nothing tells it.
        origin: The server.
        base: Path before the container: empty, or ``/account`` where the server wants the account there.
        container: The container of all paths; None where the first part of each path names it.
        key: Key of the account.
        sas: SAS token, without a question mark.
        variable: The variable that holds the key or the SAS token.
    """

    account: str
    origin: Origin
    base: str = ""
    container: str | None = None
    key: bytes | None = field(default=None, repr=False)
    sas: str | None = field(default=None, repr=False)
    variable: str = ""

    def split(self, path: str) -> tuple[str, str]:
        """Container and name of the object at ``path``."""
        if self.container is not None:
            return self.container, path
        container, _, name = path.partition("/")
        return container, name


@frozen
class _Source:
    """A place that names an account: the URI, or variables.

    Attributes:
        name: What messages call it.
        account: The account; empty where it does not say.
        url: URL of the Blob service; empty where it does not say.
    """

    name: str
    account: str = ""
    url: str = ""


def locate(uri: ModelURI, settings: AzureSettings) -> Location:
    """Where the objects of ``uri`` are.

    Raises:
        InvalidURIError: It names no container, or an unknown host, or holds credentials or parameters.
        SettingsError: The variables name no account, or several, or contradict the URI.
    """
    string = _parsed(settings.connection_string)
    credential = _Credential.of(settings, string)
    variables = _of_variables(settings, string)
    named = _of_uri(uri, variables)
    if named.account and variables.account and named.account != variables.account:
        # Entra ID gives tokens to an identity, not for an account: the URI may name any.
        if credential.variable or variables.url:
            message = f"{variables.name} is for the account {variables.account}, and {uri} is in {named.account}"
            raise SettingsError(message, hint="set the variables of that account, or unset them")
        variables = _Source("")
    account = named.account or variables.account
    url = variables.url or named.url
    if not url:
        if not account:
            message = f"nothing names the storage account of {uri}"
            hint = f"set AZURE_STORAGE_ACCOUNT_NAME, or write {_QUALIFIED}"
            raise SettingsError(message, hint=hint)
        url = f"https://{account}.blob.core.windows.net"
    parts = urlsplit(url)
    container = _container(uri)
    if credential.key is not None and not account:
        message = f"the account of {Origin.of_url(url)} is unknown, which an account key is for"
        raise SettingsError(message, hint="set AZURE_STORAGE_ACCOUNT_NAME")
    return Location(
        account,
        Origin.of_url(url),
        parts.path.rstrip("/"),
        container,
        credential.key,
        credential.sas,
        credential.variable,
    )


def _container(uri: ModelURI) -> str | None:
    """The container of all paths of the storage; None where each path begins with one."""
    if not _names_host(uri):
        return uri.authority
    if uri.userinfo:
        return uri.userinfo
    container = uri.path.partition("/")[0]
    if not CONTAINER.fullmatch(container):
        raise InvalidURIError(f"no container can have the name in {uri}", hint=_WRITE)
    return None


def _names_host(uri: ModelURI) -> bool:
    """Whether the authority is a host: names of containers have no dots, and no ports."""
    return bool(uri.userinfo) or "." in uri.authority or ":" in uri.authority


def _of_uri(uri: ModelURI, variables: _Source) -> _Source:
    """The account that ``uri`` names, if it does."""
    with_host = _names_host(uri) and (not uri.userinfo or CONTAINER.fullmatch(uri.userinfo) is not None)
    check_uri(
        ModelURI(uri.scheme, "container", uri.path, uri.query) if with_host else uri,
        service="Azure",
        place="container",
        pattern=CONTAINER,
        parameters=(),
        credentials_hint=_CREDENTIALS_HINT,
        name_hint=_NAME_HINT,
    )
    if not with_host:
        return _Source("the URI")
    host = AZURE_HOST.fullmatch(uri.authority.lower())
    if host is not None:
        name = f"{host['account']}{host['secondary'] or ''}.{host['zone'] or ''}blob.{host['suffix']}"
        return _Source("the URI", host["account"], f"https://{name}")
    if variables.url and uri.authority.lower() == urlsplit(variables.url).netloc.lower():
        return _Source("the URI")
    # Credentials go only to hosts of Azure, and to those that the user set: a URI may come from others.
    message = f"the host in {uri} is not known as one of Azure Blob Storage"
    raise InvalidURIError(message, hint=f"set {_ENDPOINT} to the URL of this server, or {_WRITE}")


def _of_variables(settings: AzureSettings, string: Mapping[str, str]) -> _Source:
    """The account and the endpoint that the variables name."""
    sources = [
        _Source(
            "AZURE_STORAGE_ACCOUNT_NAME" if settings.account_name else "AZURE_ACCOUNT_NAME", settings.account or ""
        ),
        _Source(_ENDPOINT, _account_of(settings.endpoint), settings.endpoint or ""),
        _of_connection_string(string),
    ]
    naming = [source for source in sources if source.account]
    for source in naming[1:]:
        if source.account != naming[0].account:
            message = (
                f"{naming[0].name} names the account {naming[0].account} and {source.name} the account {source.account}"
            )
            raise SettingsError(message, hint="unset one of them, or set both to the same account")
    url = next((source.url for source in sources if source.url), "")
    return _Source(naming[0].name, naming[0].account, url) if naming else _Source(_ENDPOINT, "", url)


def _account_of(url: str | None) -> str:
    """The account that a URL of a Blob service names, in its host or as its path; empty where it does not say."""
    parts = urlsplit(url or "")
    host = AZURE_HOST.fullmatch((parts.hostname or "").lower())
    if host is not None:
        return host["account"]
    path = parts.path.strip("/")
    return path if ACCOUNT.fullmatch(path) else ""


@frozen
class _Credential:
    """The key or the token that the variables hold; both None where Entra ID is asked, or requests are anonymous."""

    variable: str = ""
    key: bytes | None = field(default=None, repr=False)
    sas: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, settings: AzureSettings, string: Mapping[str, str]) -> _Credential:
        if settings.anonymous:
            return cls()
        if string.get("AccountKey"):
            return cls(_CONNECTION_STRING, key=base64.b64decode(string["AccountKey"]))
        if string.get("SharedAccessSignature"):
            return cls(_CONNECTION_STRING, sas=string["SharedAccessSignature"].removeprefix("?"))
        if settings.key is not None:
            variable = "AZURE_STORAGE_ACCOUNT_KEY" if settings.account_key else "AZURE_ACCOUNT_KEY"
            return cls(variable, key=base64.b64decode(settings.key))
        if settings.sas_token is not None:
            return cls("AZURE_STORAGE_SAS_TOKEN", sas=settings.sas_token)
        return cls()


def _parsed(text: str | None) -> Mapping[str, str]:
    """The parts of a connection string.

    Raises:
        SettingsError: It is none. The message does not show it.
    """
    if text is None:
        return {}
    pairs = [part.partition("=") for part in text.strip().split(";") if part.strip()]
    parts = {name.strip(): value.strip() for name, equals, value in pairs if equals}
    if len(parts) < len(pairs):
        raise _bad_connection_string("has a part without an equals sign, or a part twice")
    if parts.get("UseDevelopmentStorage", "").lower() == "true":
        parts = {**_DEVELOPMENT, **parts}
    try:
        base64.b64decode(parts.get("AccountKey", ""), validate=True)
    except binascii.Error:
        raise _bad_connection_string("has an AccountKey that is not Base64") from None
    return parts


def _of_connection_string(parts: Mapping[str, str]) -> _Source:
    if not parts:
        return _Source(_CONNECTION_STRING)
    account = parts.get("AccountName", "")
    url = parts.get("BlobEndpoint", "").rstrip("/")
    if account and not ACCOUNT.fullmatch(account):
        raise _bad_connection_string("has an AccountName that no account can have")
    if not account and not url:
        raise _bad_connection_string("names neither an account nor a BlobEndpoint")
    if not url:
        suffix = parts.get("EndpointSuffix", "core.windows.net")
        url = f"{parts.get('DefaultEndpointsProtocol', 'https')}://{account}.blob.{suffix}"
    if not is_endpoint(url):
        raise _bad_connection_string("has a BlobEndpoint or EndpointSuffix that makes no URL")
    token = parts.get("SharedAccessSignature", "").removeprefix("?")
    if not (parts.get("AccountKey") or token):
        raise _bad_connection_string("has neither an AccountKey nor a SharedAccessSignature")
    if token and not is_sas_token(token):
        raise _bad_connection_string("has a SharedAccessSignature that is no SAS token")
    return _Source(_CONNECTION_STRING, account or _account_of(url), url)


def _bad_connection_string(what: str) -> SettingsError:
    hint = "copy it again from the account's page of access keys in the portal"
    return SettingsError(f"{_CONNECTION_STRING} {what}", hint=hint)
