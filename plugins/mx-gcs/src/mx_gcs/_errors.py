"""What GCS's answers and failures to get a token mean for a load; completes core's tables for HTTP."""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Mapping

from attrs import frozen

from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    NotFoundError,
    UnsupportedError,
)
from modelexpress_core.storage.http import Failures, Meaning, Refusal, SettingNames, meaning_of_answer
from modelexpress_core.storage.http.failures import EncodedAnswerError, ExceptionRow, first_row, with_causes
from modelexpress_core.storage.http.service_errors import (
    CREDENTIAL_SERVICE_BUSY,
    SET_CLOCK,
    ServiceMeanings,
    no_credential_service,
    quoted,
    status_line,
)
from mx_gcs._tokens import TokenAnswerError, UnsafeTokenUrlError

__all__ = [
    "NAMES",
    "PROVIDER",
    "CredentialsError",
    "CredentialsFileError",
    "GcsFailures",
    "MetadataAnswerError",
    "NoCredentialsError",
    "StaleTokenError",
    "UniverseError",
]

PROVIDER = "mx-gcs"

NAMES = SettingNames(
    endpoint="MX_GCS_ENDPOINT (or STORAGE_EMULATOR_HOST)",
    ca_bundle="MX_GCS_CA_BUNDLE",
    read_timeout="MX_GCS_READ_TIMEOUT_SECONDS",
)


# -- what the modules of this package raise ----------------------------------------------------------------------------


class CredentialsError(Exception):
    """No access token could be had.

    Args:
        error: Why.
        place: Whose credentials failed, and where they were found; empty if none were.
    """

    def __init__(self, error: Exception, place: str = "") -> None:
        super().__init__("no access token could be had")
        self.error = error
        self.place = place


class CredentialsFileError(ValueError):
    """A file with credentials cannot be used.

    Args:
        path: The file.
        fault: What is wrong with it, without its content.
    """

    def __init__(self, path: str, fault: str) -> None:
        super().__init__(f"{path}: {fault}")


class MetadataAnswerError(ValueError):
    """What answered is not a metadata server, or its answer holds no token."""

    def __init__(self) -> None:
        super().__init__("the answer is not that of a metadata server")


class NoCredentialsError(LookupError):
    """No place has credentials.

    Args:
        metadata_host: The metadata server that was asked; empty if it was not.
        expected: This machine should have one.
    """

    def __init__(self, metadata_host: str, *, expected: bool) -> None:
        super().__init__("no credentials were found")
        self.metadata_host = metadata_host
        self.expected = expected


class StaleTokenError(ValueError):
    """A token that was fetched had already run out."""

    def __init__(self) -> None:
        super().__init__("the token had already run out")


class UniverseError(ValueError):
    """The credentials are of another cloud than the endpoint.

    Args:
        found: The domain of the credentials.
        expected: The domain that is set.
    """

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"the credentials are of {found[:80]}, and requests go to {expected}")


# -- answers of GCS ----------------------------------------------------------------------------------------------------

_CHECK_ROLE = (
    "grant the role Storage Object Viewer (roles/storage.objectViewer) on the bucket: it has storage.objects.get and "
    "storage.objects.list"
)
_LOGIN = "run gcloud auth application-default login, and start the load again"

_GCS = ServiceMeanings.of("GCS")
_DENIED = Meaning(
    AccessDeniedError,
    "these credentials may not read it, or it does not exist and they may not list the bucket",
    _CHECK_ROLE,
)
_MAY_NOT_LIST = Meaning(AccessDeniedError, "these credentials may not list the bucket", _CHECK_ROLE)
_ANONYMOUS = Meaning(
    AccessDeniedError,
    "requests carry no credentials (MX_GCS_ANONYMOUS, or an emulator), and the bucket is not public",
    "unset MX_GCS_ANONYMOUS, and set GOOGLE_APPLICATION_CREDENTIALS or run gcloud auth application-default login",
)
_INVALID_TOKEN = Meaning(
    AccessDeniedError,
    "the access token ran out or was revoked, and a newly fetched one is refused too, or is the same",
    "check that the service account is enabled, and the clock of this machine; then start the load again",
)
_NO_BUCKET = Meaning(
    NotFoundError,
    "the bucket's name is misspelt, or it was deleted",
    "check it with gcloud storage ls, and MX_GCS_ENDPOINT where one is set",
)
_NO_OBJECT = Meaning(
    NotFoundError, "the name is misspelt, or the object was deleted", "check it with gcloud storage ls"
)
_REQUESTER_PAYS = Meaning(
    AccessDeniedError,
    "the bucket has Requester Pays: the project of the reader pays",
    "set MX_GCS_USER_PROJECT to a project that these credentials may bill (serviceusage.services.use)",
)
_USER_PROJECT = Meaning(
    AccessDeniedError,
    "these credentials may not bill the project in MX_GCS_USER_PROJECT, or it does not exist",
    "grant them the role Service Usage Consumer on it, or correct MX_GCS_USER_PROJECT or GOOGLE_CLOUD_QUOTA_PROJECT",
)
_PERIMETER = Meaning(
    AccessDeniedError,
    "a perimeter of VPC Service Controls does not let this network or identity in",
    "ask who keeps the perimeter for an ingress rule; the answer's id finds the request in the audit log",
)
_CUSTOMER_KEY = Meaning(
    UnsupportedError,
    "the object is encrypted with a key of its uploader (CSEK), which only the uploader has",
    "upload it again with a key of Google or of Cloud KMS",
)
_KMS = Meaning(
    AccessDeniedError,
    "the key in Cloud KMS is disabled or destroyed, or the storage service may not use it",
    "check the key's state, and that the service agent of Cloud Storage has roles/cloudkms.cryptoKeyEncrypterDecrypter",
)
_FEW_SCOPES = Meaning(
    AccessDeniedError,
    "the access scopes of this machine (or of the user's login) do not allow it",
    "give the machine or the node pool the scope cloud-platform, or use the key of a service account",
)
_BILLING = Meaning(
    AccessDeniedError,
    "the project of the bucket has no billing account, or its account is closed or disabled",
    "check the billing of the project",
)

#: Pattern of Google's access tokens, which the words of a server may repeat.
_OAUTH_PATTERN = r"\bya29\.\S+"

#: Reason in the answer, or HTTP status where there is none that is known here -> what it means.
_ANSWERS: Mapping[str | int, Meaning] = {
    "accountDisabled": _BILLING,
    "authError": _INVALID_TOKEN,
    "backendError": _GCS.busy,
    "conditionNotMet": _GCS.changed,
    "customerEncryptionKeyIsIncorrect": _CUSTOMER_KEY,
    "internalError": _GCS.busy,
    "quotaExceeded": _GCS.throttled,
    "rateLimitExceeded": _GCS.throttled,
    "requestedRangeNotSatisfiable": _GCS.truncated,
    "resourceIsEncryptedWithCustomerEncryptionKey": _CUSTOMER_KEY,
    "userProjectAccessDenied": _USER_PROJECT,
    "userProjectInvalid": _USER_PROJECT,
    "userProjectMissing": _REQUESTER_PAYS,
    "userRateLimitExceeded": _GCS.throttled,
    "vpcServiceControls": _PERIMETER,
    **_GCS.by_status,
    401: _INVALID_TOKEN,
    402: _BILLING,
    403: _DENIED,
    404: _NO_OBJECT,
    408: _GCS.busy,
    501: Meaning(UnsupportedError, "the server lacks this part of the API", "use another server"),
}

#: What the answer's words say, where its reason says less; the first that is found counts.
_WORDS: tuple[tuple[re.Pattern[str], Meaning], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), meaning)
    for pattern, meaning in (
        (r"requester pays|no user project", _REQUESTER_PAYS),
        (r"serviceusage\.services\.use|user project", _USER_PROJECT),
        (r"vpcServiceControls|VPC Service Controls|SECURITY_POLICY_VIOLATED", _PERIMETER),
        (r"customer.(?:supplied )?encryption key|encryption key.*customer", _CUSTOMER_KEY),
        (r"cloudkms|Cloud KMS", _KMS),
        (r"insufficient authentication scopes|scope\(s\) are not authorized", _FEW_SCOPES),
        (r"billing account", _BILLING),
        (r"bucket does not exist", _NO_BUCKET),
    )
)


# -- failures to get a token -------------------------------------------------------------------------------------------


@frozen
class _TokenAnswer:
    """What an answer of a token service means.

    Attributes:
        code: Pattern of the code; an empty one fits any.
        words: Pattern of the words.
        meaning: What it means.
    """

    code: str
    words: str
    meaning: Meaning

    def fits(self, answer: TokenAnswerError) -> bool:
        """Whether the answer is of this kind."""
        return bool(re.fullmatch(self.code or ".*", answer.code) and re.search(self.words, answer.words, re.IGNORECASE))


_TOKEN_ANSWERS: tuple[_TokenAnswer, ...] = (
    _TokenAnswer(
        "invalid_grant",
        "signature",
        Meaning(
            AccessDeniedError,
            "the key of the service account was deleted or disabled, or the file was altered",
            "make a new key, and set GOOGLE_APPLICATION_CREDENTIALS to it",
        ),
    ),
    _TokenAnswer(
        "invalid_grant",
        "short-lived|timeframe|issued in the future|iat|not yet valid",
        Meaning(AccessDeniedError, "the clock of this machine is wrong by more than some minutes", SET_CLOCK),
    ),
    _TokenAnswer(
        "invalid_grant",
        "account not found",
        Meaning(AccessDeniedError, "the service account was deleted", "use the key of another service account"),
    ),
    _TokenAnswer(
        "invalid_grant",
        "rapt",
        Meaning(AccessDeniedError, "the organisation wants the user to log in again from time to time", _LOGIN),
    ),
    _TokenAnswer(
        "invalid_grant",
        "expired or revoked|revoked",
        Meaning(AccessDeniedError, "the login of the user ran out or was revoked", _LOGIN),
    ),
    _TokenAnswer(
        "invalid_grant",
        "id token|subject token|audience|issuer|expired|attribute condition",
        Meaning(
            AccessDeniedError,
            "the workload identity pool does not accept the token of this workload: it ran out, or has another issuer "
            "or audience than the provider expects",
            "check that something renews the token's file, and issuer, audiences and attribute condition of the "
            "provider",
        ),
    ),
    _TokenAnswer(
        "invalid_target",
        "",
        Meaning(
            AccessDeniedError,
            "the workload identity pool or its provider does not exist, or is disabled",
            "check the audience in the file of the external account",
        ),
    ),
    _TokenAnswer(
        "unauthorized_client|access_denied",
        "attribute condition|rejected",
        Meaning(
            AccessDeniedError,
            "the attribute condition of the workload identity pool's provider does not let this workload in",
            "check the attribute condition, and the claims of the workload's token",
        ),
    ),
    _TokenAnswer(
        "invalid_client|unauthorized_client",
        "",
        Meaning(AccessDeniedError, "the client of the login was deleted, or its secret changed", _LOGIN),
    ),
    _TokenAnswer(
        "PERMISSION_DENIED",
        "SERVICE_DISABLED|has not been used|is disabled",
        Meaning(
            AccessDeniedError,
            "the IAM Service Account Credentials API is not enabled in the project",
            "run gcloud services enable iamcredentials.googleapis.com",
        ),
    ),
    _TokenAnswer(
        "PERMISSION_DENIED",
        "ACCESS_TOKEN_SCOPE|insufficient authentication scopes",
        _FEW_SCOPES,
    ),
    _TokenAnswer(
        "(?:PERMISSION_DENIED)?",
        "getAccessToken",
        Meaning(
            AccessDeniedError,
            "these credentials may not act as that service account",
            "grant them the role Service Account Token Creator on it (for a pod of GKE: Workload Identity User)",
        ),
    ),
    _TokenAnswer(
        "NOT_FOUND",
        "",
        Meaning(
            AccessDeniedError,
            "the service account to act as does not exist",
            "check MX_GCS_IMPERSONATE_SERVICE_ACCOUNT, or the service account in the file",
        ),
    ),
)
_NO_ACCOUNT = Meaning(
    AccessDeniedError,
    "this machine has no service account",
    "attach one to the machine, or set GOOGLE_APPLICATION_CREDENTIALS",
)
_TOKEN_UNKNOWN = Meaning(
    AccessDeniedError,
    "what the credentials say is not accepted",
    "run gcloud auth application-default print-access-token on this machine",
)

_NO_CREDENTIALS = Meaning(
    AccessDeniedError,
    "neither GOOGLE_APPLICATION_CREDENTIALS nor a login of gcloud gives any, and NO_GCE_CHECK keeps from asking the "
    "metadata server",
    "set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login; for a public bucket "
    "MX_GCS_ANONYMOUS=1",
)
_NO_METADATA = Meaning(
    AccessDeniedError,
    "neither GOOGLE_APPLICATION_CREDENTIALS nor a login of gcloud gives any, and no metadata server answers here",
    _NO_CREDENTIALS.hint,
)
_METADATA_SILENT = Meaning(
    AccessDeniedError,
    "the metadata server of this machine or pod does not answer, or not yet",
    "try again; check GCE_METADATA_HOST where it is set, and that the network policy lets pods reach it",
    retryable=True,
)

_CHECK_SERVICE = "check the URLs in the file of the credentials, firewalls, and HTTPS_PROXY and NO_PROXY"

#: Exceptions on the way to a token -> what was seen, and what it means. The first line that fits counts.
_NO_TOKEN: tuple[ExceptionRow, ...] = (
    (
        (FileNotFoundError,),
        "the file with the credentials is not there: {file}",
        Meaning(
            AccessDeniedError,
            "GOOGLE_APPLICATION_CREDENTIALS, or the credential_source in its file, is misspelt or not mounted here",
            "check the path, and the volumes of the pod",
        ),
    ),
    (
        (PermissionError, IsADirectoryError),
        "the file with the credentials cannot be read: {file}",
        Meaning(
            AccessDeniedError,
            "it is readable for another user only, or a directory",
            "check the path and its permissions",
        ),
    ),
    (
        (CredentialsFileError,),
        "the file with the credentials cannot be used: {error}",
        Meaning(
            AccessDeniedError,
            "it was cut or altered, or is a file of another kind",
            "download it again, or make a new key",
        ),
    ),
    (
        (UniverseError,),
        "{error}",
        Meaning(
            AccessDeniedError,
            "the credentials and GOOGLE_CLOUD_UNIVERSE_DOMAIN belong to different clouds",
            "set GOOGLE_CLOUD_UNIVERSE_DOMAIN to the universe_domain in the file",
        ),
    ),
    (
        (UnsafeTokenUrlError,),
        "{error}",
        Meaning(
            AccessDeniedError,
            "a URL in the file of the credentials begins with http:// and names another machine",
            "use a file with https:// URLs",
        ),
    ),
    (
        (StaleTokenError,),
        "the access token that was fetched had already run out",
        Meaning(AccessDeniedError, "the clock of this machine is wrong, or what gives tokens is stuck", SET_CLOCK),
    ),
    (
        (MetadataAnswerError,),
        "what answers as the metadata server is none",
        Meaning(
            AccessDeniedError,
            "GCE_METADATA_HOST names another server, or something intercepts the requests",
            "check GCE_METADATA_HOST, or set NO_GCE_CHECK=true",
        ),
    ),
    (
        (EncodedAnswerError,),
        "the answer with the access token is encoded",
        Meaning(AccessDeniedError, "a proxy changes answers", _CHECK_SERVICE),
    ),
    *no_credential_service(
        "access tokens", _CHECK_SERVICE, unusable=(socket.gaierror, ssl.SSLError), unreachable=(OSError,)
    ),
)
_NO_TOKEN_OTHERWISE = Meaning(
    AccessDeniedError,
    "the credentials, or the answer of the service that gives access tokens, have a form that cannot be used",
    "run gcloud auth application-default print-access-token on this machine",
)


# -- one storage -------------------------------------------------------------------------------------------------------


class GcsFailures(Failures):
    """Explains what goes wrong with one bucket."""

    caught = (OSError, CredentialsError)

    def of_answer(self, refusal: Refusal, path: str, operation: str, *, listing: bool = False) -> BackendError:
        """The error for an answer, whose body has GCS's own reason and words.

        Args:
            refusal: The answer.
            path: What it is about.
            operation: What was tried, as a verb phrase.
            listing: Whether it answers a listing, whose 404 is about the bucket.
        """
        reason, words = _said(refusal.content)
        meaning = meaning_of_answer(refusal.status, reason, _ANSWERS)
        if refusal.status in {400, 403, 404, 412}:
            found = next((meaning for pattern, meaning in _WORDS if pattern.search(words)), None)
            meaning = found or meaning
        if refusal.status == 404 and listing:
            meaning = _NO_BUCKET
        if meaning is _DENIED and operation.startswith("list"):
            meaning = _MAY_NOT_LIST
        if refusal.status == 401 and not _has_token(refusal):
            meaning = _ANONYMOUS
        told = f"GCS answered {status_line(refusal.status, reason)}"
        if words and refusal.status != 401:  # what is said of a token may repeat it
            told += f": {quoted(words, _OAUTH_PATTERN)}"
        return self.described(meaning, told, path, operation, retry_after=refusal.headers.get("retry-after"))

    def unanswered(self, exc: Exception, path: str, operation: str, silence_seconds: float | None) -> BackendError:
        """The error for a connection that failed, or a token that could not be had."""
        if isinstance(exc, CredentialsError):
            meaning, reason, retry_after = _without_token(exc)
            return self.described(meaning, reason, path, operation, retry_after=retry_after)
        return super().unanswered(exc, path, operation, silence_seconds)


def _has_token(refusal: Refusal) -> bool:
    return any(name.lower() == "authorization" for name, _ in refusal.request.headers)


def _said(content: bytes) -> tuple[str, str]:
    """Reason and words of an answer; of a download, GCS sends the words alone."""
    try:
        error = json.loads(content)["error"]
        details = error.get("errors") or [{}]
        return str(details[0].get("reason") or ""), str(error.get("message") or "")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        text = content[:2000].decode("utf-8", "replace").strip()
        return "", text if text[:1].isalpha() else ""  # neither HTML nor a part of JSON


def _without_token(exc: CredentialsError) -> tuple[Meaning, str, str | None]:
    """What it means that a request has no token, why it has none, and the Retry-After header.

    What services say may hold parts of credentials: it is not quoted.
    """
    about = f" ({exc.place})" if exc.place else ""
    chain = with_causes(exc.error)
    answer = next((link for link in chain if isinstance(link, TokenAnswerError)), None)
    if answer is not None:
        said = status_line(answer.status, answer.code)
        reason = f"no access token could be fetched: {answer.host} answered {said}{about}"
        return _meaning_of_token_answer(answer), reason, answer.headers.get("retry-after")
    innermost = type(chain[-1]).__name__
    missing = next((link for link in chain if isinstance(link, NoCredentialsError)), None)
    if missing is not None:
        reason = "no credentials were found"
        if not missing.metadata_host:
            return _NO_CREDENTIALS, f"{reason}{about}", None
        reason += f"; the metadata server was asked at {missing.metadata_host} [{innermost}]{about}"
        return _METADATA_SILENT if missing.expected else _NO_METADATA, reason, None
    row = first_row(_NO_TOKEN, chain)
    if row is None:
        return _NO_TOKEN_OTHERWISE, f"no access token could be fetched [{type(exc.error).__name__}]{about}", None
    found, seen, meaning = row
    told = seen.format(file=getattr(found, "filename", None) or "unknown", error=found)
    return meaning, f"{told} [{innermost}]{about}", None


def _meaning_of_token_answer(answer: TokenAnswerError) -> Meaning:
    if answer.status >= 500 or answer.status in {408, 429}:
        return CREDENTIAL_SERVICE_BUSY
    known = next((each.meaning for each in _TOKEN_ANSWERS if each.fits(answer)), None)
    if known is None and answer.status == 404:
        return _NO_ACCOUNT
    return known or _TOKEN_UNKNOWN
