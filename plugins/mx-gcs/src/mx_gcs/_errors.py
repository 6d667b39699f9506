"""What GCS's answers and failures to get a token mean for a load; completes core's tables for HTTP."""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

from attrs import frozen

from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    NotFoundError,
    SourceChangedError,
    ThrottledError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.storage.http import Failures, Meaning, Refusal, SettingNames, meaning_of_answer
from modelexpress_core.storage.http.failures import EncodedAnswerError
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
    "shown",
]

PROVIDER = "mx-gcs"

NAMES = SettingNames(
    endpoint="MX_GCS_ENDPOINT",
    ca_bundle="MX_GCS_CA_BUNDLE",
    read_timeout="MX_GCS_READ_TIMEOUT_SECONDS (or MX_STALL_SECONDS)",
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
_WAIT = "try again later, or lower MX_CONCURRENCY"
_LOGIN = "run gcloud auth application-default login, and start the load again"

_BUSY = Meaning(UnavailableError, "GCS has a passing fault", _WAIT)
_SLOW_DOWN = Meaning(ThrottledError, "GCS is asked more than it serves at a time", _WAIT)
_CHANGED = Meaning(
    SourceChangedError,
    "something replaced the object since the load began",
    "start the load again when nothing writes to the model",
)
_CUT = Meaning(
    SourceChangedError,
    "the object is shorter than when the load began, or than its header says",
    "check that the upload was complete, and start the load again",
)
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

#: Reason in the answer, or HTTP status where there is none that is known here -> what it means.
_ANSWERS: Mapping[str | int, Meaning] = {
    "accountDisabled": _BILLING,
    "authError": _INVALID_TOKEN,
    "backendError": _BUSY,
    "conditionNotMet": _CHANGED,
    "customerEncryptionKeyIsIncorrect": _CUSTOMER_KEY,
    "internalError": _BUSY,
    "quotaExceeded": _SLOW_DOWN,
    "rateLimitExceeded": _SLOW_DOWN,
    "requestedRangeNotSatisfiable": _CUT,
    "resourceIsEncryptedWithCustomerEncryptionKey": _CUSTOMER_KEY,
    "userProjectAccessDenied": _USER_PROJECT,
    "userProjectInvalid": _USER_PROJECT,
    "userProjectMissing": _REQUESTER_PAYS,
    "userRateLimitExceeded": _SLOW_DOWN,
    "vpcServiceControls": _PERIMETER,
    401: _INVALID_TOKEN,
    402: _BILLING,
    403: _DENIED,
    404: _NO_OBJECT,
    408: _BUSY,
    412: _CHANGED,
    416: _CUT,
    429: _SLOW_DOWN,
    500: _BUSY,
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


_CLOCK = "set the clock (chronyc tracking, timedatectl)"

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
        Meaning(AccessDeniedError, "the clock of this machine is wrong by more than some minutes", _CLOCK),
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
_TOKEN_BUSY = Meaning(
    AccessDeniedError, "it has a passing fault, or is asked too much", "try again later", retryable=True
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
_NO_TOKEN: tuple[tuple[tuple[type[BaseException], ...], str, Meaning], ...] = (
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
        Meaning(AccessDeniedError, "the clock of this machine is wrong, or what gives tokens is stuck", _CLOCK),
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
    (
        (socket.gaierror, ssl.SSLError),
        "no connection to the service that gives access tokens",
        Meaning(AccessDeniedError, "its name does not resolve, or its certificate is not trusted", _CHECK_SERVICE),
    ),
    (
        (OSError,),
        "no connection to the service that gives access tokens",
        Meaning(AccessDeniedError, "it cannot be reached from here, or not now", _CHECK_SERVICE, retryable=True),
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

    def of_answer(self, refusal: Refusal, path: str, operation: str) -> BackendError:
        """The error for an answer, whose body has GCS's own reason and words."""
        reason, words = _said(refusal.content)
        meaning = meaning_of_answer(refusal.status, reason, _ANSWERS)
        if refusal.status in {400, 403, 404, 412}:
            found = next((meaning for pattern, meaning in _WORDS if pattern.search(words)), None)
            meaning = found or meaning
        if refusal.status == 404 and not path:
            meaning = _NO_BUCKET
        if meaning is _DENIED and operation.startswith("list"):
            meaning = _MAY_NOT_LIST
        if refusal.status == 401 and not _has_token(refusal):
            meaning = _ANONYMOUS
        parts = [f"HTTP {refusal.status}", reason]
        told = f"GCS answered {', '.join(part for part in parts if part)}"
        if words and refusal.status != 401:  # what is said of a token may repeat it
            told += f": {_quoted(words)}"
        return meaning.described(
            told,
            uri=str(self._uri.with_path(path)),
            operation=operation,
            provider=PROVIDER,
            retry_after=refusal.headers.get("retry-after"),
        )

    def unanswered(self, exc: Exception, path: str, operation: str, silence_seconds: float | None) -> BackendError:
        """The error for a connection that failed, or a token that could not be had."""
        if isinstance(exc, CredentialsError):
            return _without_token(exc, str(self._uri.with_path(path)), operation)
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


def _quoted(text: str) -> str:
    """One line of what a server says, without anything that looks like a token."""
    text = re.sub(r"\bya29\.\S+|[A-Za-z0-9+/=_-]{40,}", "***", " ".join(text.split()))
    return text if len(text) <= 300 else f"{text[:297]}..."


def _without_token(exc: CredentialsError, uri: str, operation: str) -> BackendError:
    """The error for a request that has no token. What services say may hold parts of credentials: it is not quoted."""
    error = exc.error
    about = f" ({exc.place})" if exc.place else ""

    def described(meaning: Meaning, reason: str, retry_after: str | None = None) -> BackendError:
        return meaning.described(
            f"{reason}{about}", uri=uri, operation=operation, provider=PROVIDER, retry_after=retry_after
        )

    chain = tuple(_with_causes(error))
    answer = next((link for link in chain if isinstance(link, TokenAnswerError)), None)
    if answer is not None:
        said = ", ".join(part for part in (f"HTTP {answer.status}", answer.code) if part)
        reason = f"no access token could be fetched: {answer.host} answered {said}"
        return described(_meaning_of_token_answer(answer), reason, answer.headers.get("retry-after"))
    missing = next((link for link in chain if isinstance(link, NoCredentialsError)), None)
    if missing is not None:
        reason = "no credentials were found"
        if not missing.metadata_host:
            return described(_NO_CREDENTIALS, reason)
        reason += f"; the metadata server was asked at {missing.metadata_host} [{_name(chain)}]"
        return described(_METADATA_SILENT if missing.expected else _NO_METADATA, reason)
    for types, seen, meaning in _NO_TOKEN:
        found = next((link for link in chain if isinstance(link, types)), None)
        if found is not None:
            told = seen.format(file=getattr(found, "filename", None) or "unknown", error=found)
            return described(meaning, f"{told} [{_name(chain)}]")
    return described(_NO_TOKEN_OTHERWISE, f"no access token could be fetched [{type(error).__name__}]")


def _meaning_of_token_answer(answer: TokenAnswerError) -> Meaning:
    if answer.status >= 500 or answer.status in {408, 429}:
        return _TOKEN_BUSY
    known = next((each.meaning for each in _TOKEN_ANSWERS if each.fits(answer)), None)
    if known is None and answer.status == 404:
        return _NO_ACCOUNT
    return known or _TOKEN_UNKNOWN


def _with_causes(exc: BaseException) -> list[BaseException]:
    """``exc`` and its causes."""
    links: list[BaseException] = []
    link: BaseException | None = exc
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__
    return links


def _name(chain: tuple[BaseException, ...]) -> str:
    """The innermost name of a failure, which says most."""
    return type(chain[-1]).__name__


def shown(endpoint: str) -> str:
    """Scheme, host and port of a URL, for messages."""
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc}"
