"""What answers of the Blob service and failures of Entra ID mean for a load; completes core's tables for HTTP."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from urllib.parse import parse_qsl

import attrs
from attrs import field, frozen

from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    NotFoundError,
    ThrottledError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.storage.http import Failures, Meaning, Refusal, SettingNames, meaning_of_answer
from modelexpress_core.storage.http.service_errors import (
    CREDENTIAL_SERVICE_BUSY,
    SET_CLOCK,
    TRY_LATER,
    ServiceMeanings,
    status_line,
)
from modelexpress_core.uri import ModelURI

__all__ = ["NAMES", "PROVIDER", "Attempt", "AzureFailures", "RefusedAgainError", "TokenError", "error_code"]

PROVIDER = "mx-azure"

NAMES = SettingNames(
    endpoint="AZURE_STORAGE_ENDPOINT",
    ca_bundle="MX_AZURE_CA_BUNDLE",
    read_timeout="MX_AZURE_READ_TIMEOUT_SECONDS",
)

_ROLE = (
    "assign the role Storage Blob Data Reader on the account or the container (the roles Owner and Contributor do not "
    "include it), and wait up to ten minutes"
)

_SERVICE = attrs.evolve(
    ServiceMeanings.of("the service", "blob"),
    throttled=Meaning(ThrottledError, "the account gets more requests than it serves at a time", TRY_LATER),
)
_NO_BLOB = Meaning(NotFoundError, "the name is misspelt, or the blob was deleted", "check it with az storage blob list")
_NO_CONTAINER = Meaning(
    NotFoundError,
    "the container's name is misspelt, or it is in another account",
    "check it with az storage container list, and the account's name",
)
_NOT_FOUND = Meaning(
    NotFoundError,
    "the container or the blob is misspelt, was deleted, or is in another account",
    "check both with az storage blob list, and the account's name",
)
_ARCHIVED = Meaning(
    UnsupportedError, "the blob is in the archive tier", "change its tier to hot, cool or cold, and wait until it is"
)
_NETWORK_RULES = Meaning(
    AccessDeniedError,
    "the firewall of the account does not allow this network",
    "check Networking of the account in the portal: this machine needs a private endpoint or an allowed network",
)
_OWN_KEY = Meaning(
    UnsupportedError, "the blob is encrypted with a key of the customer's, which reads have to send", "copy the blob"
)
_ANONYMOUS = Meaning(
    AccessDeniedError,
    "the container is not public, and the request had no credentials",
    "unset MX_AZURE_ANONYMOUS, and set credentials",
)
_BAD_REQUEST = Meaning(
    BackendError,
    "the URI or the endpoint has a form that the service does not accept",
    "check the URI and AZURE_STORAGE_ENDPOINT; emulators want the account in its path: http://127.0.0.1:10000/account",
)

#: Error code of the service, or HTTP status where it sent no code that is known here -> what it means.
#: https://learn.microsoft.com/rest/api/storageservices/blob-service-error-codes
_ANSWERS: Mapping[str | int, Meaning] = {
    "BlobNotFound": _NO_BLOB,
    "ContainerNotFound": _NO_CONTAINER,
    "ContainerBeingDeleted": Meaning(NotFoundError, "the container is being deleted", "check the URI"),
    "ContainerDisabled": Meaning(NotFoundError, "the container was disabled", "check the URI"),
    "ResourceNotFound": _NOT_FOUND,
    "InvalidResourceName": Meaning(NotFoundError, "no container or blob can have this name", "correct the URI"),
    "AccountIsDisabled": Meaning(AccessDeniedError, "the account is disabled", "enable it, or check the subscription"),
    "AuthorizationSourceIPMismatch": Meaning(
        AccessDeniedError, "the SAS token is for other addresses", "get a token for the address of this machine"
    ),
    "AuthorizationProtocolMismatch": Meaning(
        AccessDeniedError, "the SAS token is for https only, or the account requires https", "use an https endpoint"
    ),
    "AuthorizationServiceMismatch": Meaning(
        AccessDeniedError, "the SAS token is for another service", "get a token for blobs (ss=b)"
    ),
    "AuthorizationResourceTypeMismatch": Meaning(
        AccessDeniedError,
        "the SAS token is not for this kind of resource",
        "get a token for containers and objects (srt=co), or for the container (sr=c)",
    ),
    "KeyBasedAuthenticationNotPermitted": Meaning(
        AccessDeniedError,
        "the account does not allow account keys, nor the SAS tokens that they sign",
        "unset the key, and use a managed identity, a workload identity or a service principal",
    ),
    "PublicAccessNotPermitted": _ANONYMOUS,
    "NoAuthenticationInformation": _ANONYMOUS,
    "BlobArchived": _ARCHIVED,
    "BlobBeingRehydrated": Meaning(
        UnsupportedError, "the blob is on its way out of the archive tier", "wait until its tier is hot, cool or cold"
    ),
    "BlobUsesCustomerSpecifiedEncryption": _OWN_KEY,
    "ConditionNotMet": _SERVICE.changed,
    "InvalidRange": _SERVICE.truncated,
    "ServerBusy": _SERVICE.throttled,
    "OperationTimedOut": _SERVICE.busy,
    "InternalError": _SERVICE.busy,
    "AccountBeingCreated": Meaning(UnavailableError, "the account is being created", "try again in a minute"),
    "InvalidUri": _BAD_REQUEST,
    "InvalidHeaderValue": _BAD_REQUEST,
    "InvalidQueryParameterValue": _BAD_REQUEST,
    "OutOfRangeInput": _BAD_REQUEST,
    **_SERVICE.by_status,
    400: _BAD_REQUEST,
    404: _NOT_FOUND,
    409: Meaning(UnsupportedError, "the blob is in a state in which it cannot be read", "check its tier and its lease"),
    503: _SERVICE.throttled,
}

#: Kind of credential -> what it means that the service refuses it.
_REFUSED: Mapping[str, Meaning] = {
    "key": Meaning(
        AccessDeniedError,
        "the key is not one of this account, was rotated, or a proxy changes the requests",
        "check {variable} and the account's name",
    ),
    "sas": Meaning(
        AccessDeniedError,
        "the SAS token is not of this account, was cut, or the key that signed it was rotated",
        "get a new token into {variable}",
    ),
    "token": Meaning(
        AccessDeniedError,
        "the token is of another tenant than the account, or ran out",
        "check AZURE_TENANT_ID, and the clock of this machine",
    ),
    "anonymous": _ANONYMOUS,
}

#: Kind of credential -> what it means that it does not allow the operation.
_NOT_ALLOWED: Mapping[str, Meaning] = {
    "key": Meaning(AccessDeniedError, "the account's key does not allow it", "check the account"),
    "sas": Meaning(
        AccessDeniedError,
        "the SAS token lacks a permission: reading needs r, listing needs l",
        "get a token with sp=rl into {variable}",
    ),
    "token": Meaning(
        AccessDeniedError, "the identity has no role that lets it read data: Storage Blob Data Reader is missing", _ROLE
    ),
    "anonymous": Meaning(
        AccessDeniedError, "the container allows to read its blobs, and not to list them", "name one file in the URI"
    ),
}

#: Kind of credential -> what AuthorizationFailure means: the firewall, or what the credential does not allow.
_FAILED: Mapping[str, Meaning] = {
    "key": Meaning(
        AccessDeniedError,
        "the firewall of the account does not allow this network, or the key is not one of this account",
        "check Networking of the account in the portal, {variable}, and the account's name",
    ),
    "sas": Meaning(
        AccessDeniedError,
        "the SAS token is for another container or operation, or the firewall of the account does not allow this "
        "network",
        "get a token for this container with sp=rl into {variable}, and check Networking of the account in the portal",
    ),
    "token": _NETWORK_RULES,
    "anonymous": attrs.evolve(
        _ANONYMOUS, cause="the container is not public, or the firewall of the account does not allow this network"
    ),
}

#: Code -> what it means, by the kind of credential.
_BY_KIND: Mapping[str, Mapping[str, Meaning]] = {
    "AuthenticationFailed": _REFUSED,
    "InvalidAuthenticationInfo": _REFUSED,
    "AuthorizationFailure": _FAILED,
    "AuthorizationPermissionMismatch": _NOT_ALLOWED,
    "InsufficientAccountPermissions": _NOT_ALLOWED,
}

_MAYBE_PRIVATE = attrs.evolve(
    _NOT_FOUND, cause="there is no such container or blob, or the container is not public", hint=_ANONYMOUS.hint
)
_SAS_EXPIRED = Meaning(
    AccessDeniedError,
    "the SAS token ran out, or is not valid yet",
    "get a new token into {variable}, and check the clock of this machine",
)
_SKEWED = Meaning(AccessDeniedError, "the clock of this machine is wrong by more than 15 minutes", SET_CLOCK)
_TOKEN_EXPIRED = Meaning(
    AccessDeniedError,
    "the token ran out, and no newer one could be had",
    "check the clock of this machine, and log in again if a developer tool gives the token",
)
_AUDIENCE = Meaning(
    AccessDeniedError,
    "the token is for another service or cloud",
    "check AZURE_AUTHORITY_HOST and the endpoint's cloud",
)
_TENANT = Meaning(
    AccessDeniedError,
    "the identity is of another tenant than the account",
    "set AZURE_TENANT_ID to the account's tenant, or use an identity of it",
)
_RENEWED = Meaning(
    AccessDeniedError,
    "a new token was fetched in the middle of the load, and the service refuses that too",
    "check the clock of this machine, AZURE_TENANT_ID, and whether the identity was disabled",
)

#: Words in the detail of a refusal, kind of credential -> what it means. The detail itself is never shown: it
#: repeats the signature.
_DETAILS: Sequence[tuple[re.Pattern[str], str, Meaning]] = (
    (re.compile(r"not valid in the specified time frame|expired", re.IGNORECASE), "sas", _SAS_EXPIRED),
    (re.compile(r"date header too old|request date", re.IGNORECASE), "key", _SKEWED),
    (re.compile(r"audience", re.IGNORECASE), "token", _AUDIENCE),
    (re.compile(r"issuer", re.IGNORECASE), "token", _TENANT),
    (re.compile(r"lifetime|expired", re.IGNORECASE), "token", _TOKEN_EXPIRED),
)


def _element(content: bytes, name: bytes) -> str:
    """The text of the first element of that name in the body of an error, which is small and flat XML."""
    found = re.search(b"<%s>([^<]*)</%s>" % (name, name), content[:65536])
    return found[1].decode("utf-8", "replace").strip() if found else ""


def _time(text: str | None) -> datetime | None:
    """A time in a SAS token, which may be a date alone."""
    try:
        found = datetime.fromisoformat((text or "").replace("Z", "+00:00"))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


def error_code(refusal: Refusal) -> str:
    """The service's own code of a refusal; empty where it sent none."""
    code = refusal.headers.get("x-ms-error-code") or _element(refusal.content, b"Code")
    return code if re.fullmatch(r"[A-Za-z]{1,80}", code) else ""


# -- tokens ------------------------------------------------------------------------------------------------------------


@frozen
class Attempt:
    """One request for a token.

    Attributes:
        host: Host and port that was asked.
        status: Of the answer; 0 where there was none.
        codes: Error codes in the answer: names of OAuth, and numbers of Entra ID (AADSTS).
        retry_after: The header of that name.
        failure: What happened in place of an answer.
    """

    host: str
    status: int = 0
    codes: tuple[str, ...] = ()
    retry_after: str | None = None
    failure: BaseException | None = field(default=None, repr=False)


class TokenError(Exception):
    """No token could be had.

    Args:
        way: How it was tried, for people.
        error: What azure-identity raised; may hold secrets, so it is not shown.
        attempts: The requests that were made.
        searched: No variable names the identity: it was looked for on this machine.
    """

    def __init__(self, way: str, error: BaseException, attempts: Sequence[Attempt], *, searched: bool = False) -> None:
        super().__init__(way)
        self.way = way
        self.searched = searched
        self.error = error
        self.attempts = tuple(attempts)


class RefusedAgainError(Exception):
    """A request was refused for its token, and then for a newer one.

    Args:
        refusal: The last answer.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__("a newer token was refused too")
        self.refusal = refusal


_CHECK_PRINCIPAL = "check AZURE_TENANT_ID, AZURE_CLIENT_ID and the secret or certificate"
_FEDERATION = Meaning(
    AccessDeniedError,
    "the application has no federated credential for the issuer, subject or audience of the token in "
    "AZURE_FEDERATED_TOKEN_FILE",
    "check the federated credentials of the application: issuer of the cluster, and namespace and name of the service "
    "account",
)

#: Number of an error of Entra ID -> what it means:
#: https://learn.microsoft.com/entra/identity-platform/reference-error-codes
_ENTRA: Mapping[str, Meaning] = {
    "7000215": Meaning(AccessDeniedError, "the secret is not one of the application", "check AZURE_CLIENT_SECRET"),
    "7000222": Meaning(AccessDeniedError, "the secret ran out", "make a new secret, and set AZURE_CLIENT_SECRET"),
    "700016": Meaning(AccessDeniedError, "the tenant has no such application", _CHECK_PRINCIPAL),
    "90002": Meaning(AccessDeniedError, "there is no such tenant", "check AZURE_TENANT_ID and AZURE_AUTHORITY_HOST"),
    "900023": Meaning(AccessDeniedError, "no tenant can have this name", "check AZURE_TENANT_ID"),
    "700027": Meaning(AccessDeniedError, "the certificate is not one of the application", _CHECK_PRINCIPAL),
    "70021": _FEDERATION,
    "700211": _FEDERATION,
    "700212": _FEDERATION,
    "700213": _FEDERATION,
    "700024": Meaning(
        AccessDeniedError,
        "the token in AZURE_FEDERATED_TOKEN_FILE ran out",
        "check that it is a projected volume, which Kubernetes renews",
    ),
    "7000112": Meaning(AccessDeniedError, "the application is disabled", "enable it, or use another identity"),
}

_THROTTLED = Meaning(ThrottledError, "it gets more requests than it serves at a time", "try again later")
_NO_TOKEN = Meaning(
    AccessDeniedError,
    "its answer has no token: something else answers in its place",
    "check AZURE_AUTHORITY_HOST, and HTTPS_PROXY and NO_PROXY",
)
_TOKEN_REFUSED = Meaning(AccessDeniedError, "it does not accept what it was asked with", _CHECK_PRINCIPAL)
_TOKEN_UNREACHABLE = Meaning(
    AccessDeniedError,
    "it cannot be reached from here, or not now",
    "check AZURE_AUTHORITY_HOST, firewalls, and HTTPS_PROXY and NO_PROXY",
    retryable=True,
)
_NO_IDENTITY = Meaning(
    AccessDeniedError,
    "this machine has no managed identity, or not the one that AZURE_CLIENT_ID names",
    "assign an identity to the machine, and set AZURE_CLIENT_ID if it has several; or set another credential, such as "
    "AZURE_STORAGE_ACCOUNT_KEY",
)
_NOTHING = Meaning(
    AccessDeniedError,
    "no variable holds a credential, this machine has no managed identity, and no developer tool is logged in",
    "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, assign a managed identity, or run az login; for a "
    "public container MX_AZURE_ANONYMOUS=1",
)
_FILE = Meaning(
    AccessDeniedError,
    "the file is not mounted here, or is readable for another user only",
    "check AZURE_FEDERATED_TOKEN_FILE and AZURE_CLIENT_CERTIFICATE_PATH",
)
_INCOMPLETE = Meaning(
    AccessDeniedError,
    "a variable is missing, or has a value that azure-identity does not accept",
    "check AZURE_TENANT_ID, AZURE_CLIENT_ID, and AZURE_CLIENT_SECRET, AZURE_CLIENT_CERTIFICATE_PATH or "
    "AZURE_FEDERATED_TOKEN_FILE",
)


def _of_tokens(exc: TokenError) -> tuple[str, Meaning, str | None]:
    """What happened, what it means, and the Retry-After header."""
    start = f"no token from {exc.way}"
    chain = [exc.error, exc.error.__cause__, exc.error.__context__]
    file = next((link for link in chain if isinstance(link, OSError) and link.filename), None)
    if file is not None:
        return f"{start}: {file.filename} cannot be read [{type(file).__name__}]", _FILE, None
    last = exc.attempts[-1] if exc.attempts else None
    if last is not None and last.status:
        reason = f"{start}: {last.host} answered {status_line(last.status, *last.codes)}"
        return reason, _of_attempt(last, searched=exc.searched), last.retry_after
    if exc.searched:
        asked = f" (nothing answers at {last.host})" if last is not None else ""
        return f"no credentials were found{asked}", _NOTHING, None
    if last is not None:
        return f"{start}: no connection to {last.host} [{type(last.failure).__name__}]", _TOKEN_UNREACHABLE, None
    return f"{start} [{type(exc.error).__name__}]", _INCOMPLETE, None


def _of_attempt(attempt: Attempt, *, searched: bool) -> Meaning:
    """What an answer without a token means."""
    for code in attempt.codes:
        if code.removeprefix("AADSTS") in _ENTRA:
            return _ENTRA[code.removeprefix("AADSTS")]
    if attempt.status == 429:
        return _THROTTLED
    if attempt.status >= 500:
        return CREDENTIAL_SERVICE_BUSY
    if attempt.status < 400:
        return _NO_TOKEN
    return _NO_IDENTITY if searched else _TOKEN_REFUSED


# -- one storage -------------------------------------------------------------------------------------------------------


class AzureFailures(Failures):
    """Explains what goes wrong with one container.

    Args:
        uri: As for Failures.
        endpoint: As for Failures.
        closed: As for Failures.
        kind: What requests carry: ``"key"``, ``"sas"``, ``"token"`` or ``"anonymous"``.
        variable: The variable that holds the key or the SAS token.
        sas: The SAS token.
        now: Seconds since the epoch.
    """

    caught = (OSError, TokenError, RefusedAgainError)

    def __init__(
        self,
        uri: ModelURI,
        *,
        endpoint: Callable[[], str],
        closed: Callable[[], bool],
        kind: str,
        variable: str,
        sas: str | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(PROVIDER, uri, endpoint=endpoint, names=NAMES, closed=closed)
        self._sas = dict(parse_qsl(sas or ""))
        self._now = now
        self._kind = kind
        self._variable = variable

    def of_answer(self, refusal: Refusal, path: str, operation: str) -> BackendError:
        """The error for an answer, by the service's own code, and by what the request carried."""
        return self._answered(self._meaning(refusal, error_code(refusal)), refusal, path, operation)

    def _answered(self, meaning: Meaning, refusal: Refusal, path: str, operation: str) -> BackendError:
        code, status = error_code(refusal), refusal.status
        request_id = re.fullmatch(r"[0-9A-Fa-f-]{1,64}", refusal.headers.get("x-ms-request-id", ""))
        said = status_line(status, code, f"request {request_id[0]}" if request_id else "")
        hint = (meaning.hint or "").replace("{variable}", self._variable)
        retry_after = refusal.headers.get("retry-after")
        return self.described(
            meaning, f"the service answered {said}", path, operation, hint=hint, retry_after=retry_after
        )

    def _meaning(self, refusal: Refusal, code: str) -> Meaning:
        by_kind = _BY_KIND.get(code) or (_REFUSED if not code and refusal.status in {401, 403} else None)
        if by_kind is None:
            anonymous = code == "ResourceNotFound" and self._kind == "anonymous"
            return _MAYBE_PRIVATE if anonymous else meaning_of_answer(refusal.status, code, _ANSWERS)
        if self._sas and by_kind is not _NOT_ALLOWED and not self._sas_is_valid_now():
            return _SAS_EXPIRED
        detail = _element(refusal.content, b"AuthenticationErrorDetail")
        found = (meaning for words, kind, meaning in _DETAILS if self._kind == kind and words.search(detail))
        return next(found, by_kind[self._kind])

    def _sas_is_valid_now(self) -> bool:
        """Whether the SAS token says so; it may also leave its times to a policy of the container."""
        now = datetime.fromtimestamp(self._now(), timezone.utc)
        begins, ends = _time(self._sas.get("st")), _time(self._sas.get("se"))
        return (begins is None or begins <= now) and (ends is None or now < ends)

    def unanswered(self, exc: Exception, path: str, operation: str, silence_seconds: float | None) -> BackendError:
        """The error for an exception of a connection, or on the way to a token."""
        if isinstance(exc, TokenError):
            reason, meaning, retry_after = _of_tokens(exc)
            return self.described(meaning, reason, path, operation, retry_after=retry_after)
        if isinstance(exc, RefusedAgainError):
            meaning = self._meaning(exc.refusal, error_code(exc.refusal))
            unclear = meaning in {_REFUSED["token"], _TOKEN_EXPIRED}
            return self._answered(_RENEWED if unclear else meaning, exc.refusal, path, operation)
        error = super().unanswered(exc, path, operation, silence_seconds)
        if isinstance(exc, socket.gaierror) and exc.errno == socket.EAI_NONAME:
            error.cause = "there is no such storage account, or this machine has no DNS for its private endpoint"
            error.hint = "check the account's name in the URI or AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ENDPOINT"
        return error
