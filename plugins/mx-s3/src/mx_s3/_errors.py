"""What S3's answers and botocore's exceptions mean for a load; completes core's tables for HTTP."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from typing import Any

import attrs
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError, create_parser
from urllib3.exceptions import HTTPError

from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.storage.http import Failures, Meaning, Refusal, SettingNames, meaning_of_answer
from modelexpress_core.storage.http.failures import ExceptionRow, connection_error, first_row
from modelexpress_core.storage.http.service_errors import (
    CREDENTIAL_SERVICE_BUSY,
    SET_CLOCK,
    TRY_LATER,
    ServiceMeanings,
    no_credential_service,
    quoted,
    shown_origin,
    status_line,
)
from mx_s3._programs import CredentialProgramError

__all__ = [
    "FAILURES",
    "NAMES",
    "PROVIDER",
    "RENEWED",
    "BucketListError",
    "CredentialsError",
    "S3Failures",
    "translated",
    "wants_other_credentials",
]

PROVIDER = "mx-s3"

#: In an answer that refuses credentials: whether it refuses new ones, or there were no others than the old.
RENEWED = "x-mx-renewed"

#: What reading from S3 may raise.
FAILURES = (boto.BotoCoreError, boto.ClientError, ResponseParserError, OSError)

NAMES = SettingNames(
    endpoint="AWS_ENDPOINT_URL",
    ca_bundle="AWS_CA_BUNDLE",
    read_timeout="MX_S3_READ_TIMEOUT_SECONDS",
)


class BucketListError(boto.BotoCoreError):
    """Asked for the objects of a bucket, the server listed its buckets: it takes the bucket's host name for its own."""

    fmt = "the answer lists buckets"


class CredentialsError(boto.BotoCoreError):
    """Credentials could not be had: ``error`` is why, ``metadata`` where the instance metadata service was asked."""

    fmt = "the credentials could not be had"


_CHECK_POLICY = "check the policies of the user, the role and the bucket for s3:GetObject and s3:ListBucket"
_CHECK_KEYS = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_PROFILE"

_S3 = ServiceMeanings.of("S3")
_DENIED = Meaning(
    AccessDeniedError,
    "these credentials may not read it, or it does not exist and they may not list the bucket",
    _CHECK_POLICY,
)
_MAY_NOT_LIST = Meaning(
    AccessDeniedError,
    "these credentials may not list the bucket",
    "allow them s3:ListBucket on the bucket itself (not on bucket/*); a URI of one file needs s3:GetObject only",
)
_NOT_PUBLIC = Meaning(
    AccessDeniedError,
    "requests are not signed (MX_S3_ANONYMOUS), and the bucket is not public",
    "unset MX_S3_ANONYMOUS, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
)
_EXPIRED = Meaning(AccessDeniedError, "the temporary credentials ran out", "get new ones and start the load again")
_BAD_TOKEN = Meaning(
    AccessDeniedError,
    "the session token is not the one of this access key",
    "set AWS_SESSION_TOKEN together with the keys that it came with, or unset it",
)
_RENEWED = Meaning(
    AccessDeniedError,
    "new credentials were fetched in the middle of the load, and S3 refuses those too",
    "check the clock of this machine, and what the role or the user may do",
)
_SAME = (
    "get new credentials into the place where these were found, which still gives the same, and start the load again"
)
_REGION = Meaning(
    BackendError,
    "the bucket is in another region",
    "set AWS_REGION to the bucket's region, or add ?region= to the URI",
)

_MALFORMED = Meaning(
    BackendError,
    "the bucket is in another region, or the access key has a wrong form",
    "set AWS_REGION to the bucket's region, and check AWS_ACCESS_KEY_ID",
)
_BAD_REQUEST = Meaning(
    BackendError,
    "a session token that ran out, or a bucket in another region (an answer without a body does not say)",
    "check AWS_SESSION_TOKEN and AWS_REGION",
)
_MAYBE_REGION = (_REGION, _MALFORMED, _BAD_REQUEST)

#: Error code of S3, or HTTP status where it sent no code that is known here (a HEAD has no body) -> what it means.
_ANSWERS: Mapping[str | int, Meaning] = {
    "NoSuchBucket": Meaning(
        NotFoundError,
        "the bucket's name is misspelt, or it belongs to another endpoint",
        "check it with aws s3 ls, and AWS_ENDPOINT_URL where one is set",
    ),
    "NoSuchKey": Meaning(NotFoundError, "the key is misspelt or was deleted", "check it with aws s3 ls"),
    "KeyTooLongError": Meaning(NotFoundError, "a key has at most 1024 bytes", "correct the URI"),
    "InvalidBucketName": Meaning(NotFoundError, "no bucket can have this name", "correct the URI"),
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "AccountProblem": _DENIED,
    "InvalidAccessKeyId": Meaning(
        AccessDeniedError,
        "the access key was deleted, belongs to another endpoint, or is a temporary one (ASIA...) whose "
        "AWS_SESSION_TOKEN is missing",
        _CHECK_KEYS,
    ),
    "SignatureDoesNotMatch": Meaning(
        AccessDeniedError,
        "the secret does not belong to the access key, or a proxy changes the requests",
        _CHECK_KEYS,
    ),
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidToken": _BAD_TOKEN,
    "InvalidClientTokenId": _BAD_TOKEN,
    "RequestTimeTooSkewed": Meaning(
        AccessDeniedError,
        "the clock of this machine is wrong by more than 15 minutes",
        SET_CLOCK,
    ),
    "InvalidObjectState": Meaning(
        UnsupportedError,
        "the object is archived (Glacier)",
        "restore it, or copy it into a storage class that can be read at once",
    ),
    "NotImplemented": Meaning(UnsupportedError, "the server lacks this part of the S3 protocol", "use another server"),
    "PreconditionFailed": _S3.changed,
    "InvalidRange": _S3.truncated,
    "PermanentRedirect": _REGION,
    "TemporaryRedirect": _REGION,
    "AuthorizationHeaderMalformed": _MALFORMED,
    "IllegalLocationConstraintException": _REGION,
    "SlowDown": _S3.throttled,
    "ServiceUnavailable": _S3.throttled,
    "InternalError": _S3.busy,
    "OperationAborted": _S3.busy,
    "Throttling": _S3.throttled,
    "ThrottlingException": _S3.throttled,
    "TooManyRequests": _S3.throttled,
    "RequestLimitExceeded": _S3.throttled,
    "RequestTimeout": Meaning(UnavailableError, "the request reached S3 too slowly", TRY_LATER),
    **_S3.by_status,
    301: _REGION,
    307: _REGION,
    400: _BAD_REQUEST,
    401: _DENIED,
    403: _DENIED,
    404: Meaning(
        NotFoundError,
        "the bucket or the key is misspelt, or was deleted",
        "check it with aws s3 ls, and AWS_ENDPOINT_URL where one is set",
    ),
    408: _S3.busy,
    501: Meaning(UnsupportedError, "the server lacks this part of the S3 protocol", "use another server"),
    503: _S3.throttled,
}

#: Codes that speak of the credentials themselves: the server's own words may repeat them.
_ABOUT_CREDENTIALS = frozenset(
    {
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)

#: Codes with which S3 refuses credentials that were right once.
_REFUSED_CREDENTIALS = _ABOUT_CREDENTIALS - {"AuthorizationHeaderMalformed", "SignatureDoesNotMatch"}


def wants_other_credentials(code: str, status: int, *, free: bool) -> bool:
    """Whether S3 might give other credentials what it refused with this answer, which is of the bucket's region.

    Args:
        code: S3's error code; the status where the answer has no body, as to a HEAD.
        status: Of the answer.
        free: Looking for others costs no request, so that doubt suffices.
    """
    if code in _REFUSED_CREDENTIALS or (status == 400 and code == "400"):  # what an expired token gets for a HEAD
        return True
    return free and (code == "SignatureDoesNotMatch" or (status == 403 and code == "403"))


_NO_CREDENTIALS = Meaning(
    AccessDeniedError,
    "neither variables nor a profile give any, and AWS_EC2_METADATA_DISABLED keeps from asking for the machine's role",
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket MX_S3_ANONYMOUS=1",
)
_NO_MACHINE_CREDENTIALS = Meaning(
    AccessDeniedError,
    "neither variables nor a profile give any, and this machine has no role, or its metadata service cannot be reached "
    "(from a container that takes a hop limit of 2)",
    _NO_CREDENTIALS.hint,
)
_LOGIN = Meaning(
    AccessDeniedError,
    "the login of the profile ran out, or this machine has none",
    "run aws sso login, and start the load again",
)
#: Exceptions of places where credentials are looked for -> what was seen, and what it means.
_NO_USE: tuple[ExceptionRow, ...] = (
    ((boto.NoCredentialsError,), "no credentials were found", _NO_CREDENTIALS),
    (
        (boto.PartialCredentialsError,),
        "only a part of the credentials was found",
        Meaning(
            AccessDeniedError,
            "one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is not set",
            "set both, or neither (MX_S3_ANONYMOUS=1 reads public buckets without)",
        ),
    ),
    (
        (boto.SSOError, boto.LoginError, boto.TokenRetrievalError, boto.RefreshWithMFAUnsupportedError)
        if hasattr(boto, "LoginError")
        else (boto.SSOError, boto.TokenRetrievalError, boto.RefreshWithMFAUnsupportedError),
        "the credentials of the profile cannot be had",
        _LOGIN,
    ),
    (
        (boto.CredentialRetrievalError, boto.MetadataRetrievalError),
        "the credentials could not be fetched",
        Meaning(
            AccessDeniedError,
            "what the profile or the role names for it fails",
            "run aws sts get-caller-identity on this machine",
        ),
    ),
    (
        (boto.ProfileNotFound,),
        "the profile is not in the configuration files",
        Meaning(
            AccessDeniedError,
            "AWS_PROFILE is misspelt, or the files are elsewhere",
            "check AWS_PROFILE, AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE",
        ),
    ),
    (
        (boto.InvalidConfigError,),
        "the configuration of the credentials lacks something, or contradicts itself",
        Meaning(
            AccessDeniedError,
            "AWS_WEB_IDENTITY_TOKEN_FILE without AWS_ROLE_ARN, or a profile with a role and no source for it",
            "check AWS_ROLE_ARN, and the profile in AWS_CONFIG_FILE",
        ),
    ),
    (
        (boto.ConfigParseError, boto.ConfigNotFound),
        "the AWS configuration files cannot be read",
        Meaning(AccessDeniedError, "a syntax error in them", "check AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE"),
    ),
)

#: Exceptions before S3 could answer, that are not of a connection -> what was seen, and what it means.
_EXCEPTIONS: tuple[ExceptionRow, ...] = (
    *_NO_USE,
    (
        (boto.ParamValidationError,),
        "S3 allows no such name",
        Meaning(NotFoundError, "the bucket or the key in the URI is misspelt", "correct the URI"),
    ),
    (
        (BucketListError,),
        "the endpoint {endpoint} listed all buckets in place of the objects of this one",
        Meaning(
            NotFoundError,
            "requests have the bucket in the host's name, and the server expects it in the path",
            "set MX_S3_ADDRESSING_STYLE=path, or check AWS_ENDPOINT_URL",
        ),
    ),
    (
        (ResponseParserError,),
        "what the endpoint {endpoint} answered is not of the S3 protocol",
        Meaning(
            UnavailableError,
            "something in front of the server answers, or the answer was cut",
            "check AWS_ENDPOINT_URL, and HTTPS_PROXY and NO_PROXY",
        ),
    ),
    (
        (boto.HTTPClientError,),
        "the request cannot be sent as HTTP",
        Meaning(
            BackendError,
            "a credential, or another setting, holds a line break or a control character",
            "check AWS_SESSION_TOKEN and the AWS configuration files",
        ),
    ),
)


#: Code with which STS (or the service of a single sign-on) refuses credentials -> what it means.
_STS_ANSWERS: Mapping[str, Meaning] = {
    "AccessDenied": Meaning(
        AccessDeniedError,
        "the trust policy of the role does not allow it to this token or user",
        "check the trust policy of AWS_ROLE_ARN (or the profile's role_arn): provider, and conditions on sub and aud",
    ),
    "InvalidIdentityToken": Meaning(
        AccessDeniedError,
        "the account has no OIDC provider for the issuer of the token, or the token is meant for another audience",
        "check the OIDC provider in IAM, and that the audience of the service account's token is sts.amazonaws.com",
    ),
    "IDPRejectedClaim": Meaning(
        AccessDeniedError, "the issuer of the token says it is no longer valid", "get a new token"
    ),
    "IDPCommunicationError": Meaning(
        AccessDeniedError, "STS cannot reach the issuer of the token", "try again later", retryable=True
    ),
    "ExpiredTokenException": Meaning(
        AccessDeniedError,
        "the token in AWS_WEB_IDENTITY_TOKEN_FILE, or what else the role is assumed with, ran out",
        "check that something renews the token's file (in Kubernetes: a projected volume), or log in again",
    ),
    "ValidationError": Meaning(
        AccessDeniedError,
        "the name of the role or of the session has a wrong form",
        "check AWS_ROLE_ARN and AWS_ROLE_SESSION_NAME, or role_arn in the profile",
    ),
    "RegionDisabledException": Meaning(
        AccessDeniedError,
        "the account has STS switched off in this region",
        "switch it on, or set AWS_ENDPOINT_URL_STS to another region's",
    ),
    "InvalidClientTokenId": Meaning(
        AccessDeniedError, "the keys that the role is assumed with are not valid", _CHECK_KEYS
    ),
    "SignatureDoesNotMatch": Meaning(
        AccessDeniedError, "the secret that the role is assumed with is not that of its key", _CHECK_KEYS
    ),
    "UnauthorizedException": _LOGIN,
    "ForbiddenException": Meaning(
        AccessDeniedError, "the single sign-on does not give this user the role of the profile", "check sso_role_name"
    ),
}
_AGENT = Meaning(
    AccessDeniedError,
    "the agent that AWS_CONTAINER_CREDENTIALS_FULL_URI names does not answer",
    "check that the agent runs (for EKS Pod Identity: the add-on on this node)",
    retryable=True,
)
_AGENT_REFUSES = Meaning(
    AccessDeniedError,
    "it does not know this container, or AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE does not hold the token that it gave",
    "check the association of the service account (or the task) with a role, and the file with the token",
)
_STS_UNKNOWN = Meaning(
    AccessDeniedError,
    "what the variables or the profile name for it is not accepted",
    "run aws sts get-caller-identity on this machine",
)
_CHECK_STS = "check AWS_ENDPOINT_URL_STS, AWS_REGION, firewalls, and HTTPS_PROXY and NO_PROXY"

#: Exceptions on the way to credentials, where none in _NO_USE fits. "The service" may be STS or a single sign-on;
#: connections to agents of containers and machines never come here, because botocore keeps them to itself.
_NO_ANSWER: tuple[ExceptionRow, ...] = (
    (
        (CredentialProgramError,),
        "the program of the profile gave no credentials: {error}",
        Meaning(
            AccessDeniedError,
            "credential_process in the profile is misspelt, or its program fails here",
            "run the program as the user of the load: it must print JSON with Version, AccessKeyId and SecretAccessKey",
        ),
    ),
    (
        (FileNotFoundError, PermissionError, IsADirectoryError),
        "a file that the credentials need cannot be read: {file}",
        Meaning(
            AccessDeniedError,
            "the token is not mounted here, or is readable for another user only",
            "check AWS_WEB_IDENTITY_TOKEN_FILE, AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE, and what the profile names",
        ),
    ),
    *no_credential_service(
        "the credentials",
        _CHECK_STS,
        unusable=(socket.gaierror, ssl.SSLError, boto.SSLError, boto.InvalidRegionError),
        unreachable=(boto.ConnectionError, boto.HTTPClientError, HTTPError, HTTPException, OSError),
    ),
    (
        (boto.InvalidIMDSEndpointError,),
        "the URL of the instance metadata service cannot be used",
        Meaning(AccessDeniedError, "it is misspelt", "correct AWS_EC2_METADATA_SERVICE_ENDPOINT"),
    ),
    (
        (RuntimeError,),
        "the credentials that were fetched had already run out",
        Meaning(
            AccessDeniedError,
            "the clock of this machine is wrong, or what gives them is stuck",
            SET_CLOCK,
        ),
    ),
    (
        (ValueError, LookupError, TypeError),
        "what gives the credentials was asked, or answered, in a form that cannot be used",
        Meaning(
            AccessDeniedError,
            "AWS_CONTAINER_CREDENTIALS_FULL_URI may only name https, this machine, or the agents of ECS and EKS; its "
            "token is one line; its answer has AccessKeyId, SecretAccessKey, Token and Expiration",
            "check AWS_CONTAINER_CREDENTIALS_FULL_URI and what listens there",
        ),
    ),
)


#: Pattern of access keys and their ids, which the words of a server may repeat.
_ACCESS_KEY = r"\b[A-Z0-9]{16,}\b"

#: What the content of a proper answer looks like, which errors do not.
_NO_SHAPE: Any = None


class S3Failures(Failures):
    """Explains what goes wrong with one bucket.

    Attributes:
        anonymous: Requests are not signed.
    """

    caught = FAILURES
    anonymous = False

    def of_answer(self, refusal: Refusal, path: str, operation: str) -> BackendError:
        """The error for an answer, whose body has S3's own code and words."""
        answer = {"status_code": refusal.status, "headers": refusal.headers, "body": refusal.content}
        parsed = create_parser("rest-xml").parse(answer, _NO_SHAPE)
        error = _answered(boto.ClientError(parsed, "GetObject"), str(self._uri.with_path(path)), operation)
        return self._of_requester(error)

    def unanswered(self, exc: Exception, path: str, operation: str, silence_seconds: float | None) -> BackendError:
        """The error for an exception of botocore's or of a connection."""
        error = translated(
            exc,
            uri=str(self._uri.with_path(path)),
            operation=operation,
            endpoint=self._endpoint(),
            silence_seconds=silence_seconds,
        )
        return self._of_requester(error)

    def _of_requester(self, error: BackendError) -> BackendError:
        """Replace the cause of a denial where the request had no credentials that could be denied anything."""
        if self.anonymous and error.cause in {_DENIED.cause, _MAY_NOT_LIST.cause}:
            error.cause, error.hint = _NOT_PUBLIC.cause, _NOT_PUBLIC.hint
        return error


def translated(
    exc: Exception, *, uri: str, operation: str, endpoint: str = "", silence_seconds: float | None = None
) -> BackendError:
    """``exc`` as an error of ModelExpress; to be raised from it.

    Args:
        exc: What botocore, a connection or the operating system raised.
        uri: Of the object.
        operation: What was tried.
        endpoint: URL of the server.
        silence_seconds: How long its next bytes were waited for.
    """
    if isinstance(exc, CredentialsError):
        return _without_credentials(exc, uri, operation)
    if isinstance(exc, boto.ClientError):
        return _answered(exc, uri, operation)
    chain = tuple(_chain(exc))
    row = first_row(_EXCEPTIONS, chain)
    if row is not None:
        _, seen, meaning = row
        return _error(meaning, f"{seen.format(endpoint=_shown(endpoint))} [{_name(chain)}]", uri, operation)
    return connection_error(
        exc,
        uri=uri,
        operation=operation,
        provider=PROVIDER,
        endpoint=_shown(endpoint),
        names=NAMES,
        silence_seconds=silence_seconds,
    ) or _error(Meaning(BackendError), f"botocore raised {type(exc).__name__}", uri, operation)


def _without_credentials(exc: CredentialsError, uri: str, operation: str) -> BackendError:
    """The error for a request that could not be signed. What went wrong may hold secrets, so it is not quoted."""
    error: Exception = exc.kwargs["error"]
    if isinstance(error, boto.ClientError):
        code, status, said = _said(error)
        busy = status >= 500 or status == 429 or _ANSWERS.get(code) is _S3.throttled
        meaning = _STS_ANSWERS.get(code) or (CREDENTIAL_SERVICE_BUSY if busy else _STS_UNKNOWN)
        reason = f"the credentials could not be fetched: {error.operation_name} was answered {said}"
        return _error(meaning, reason, uri, operation)
    chain = tuple(_chain(error))
    row = first_row((*_NO_USE, *_NO_ANSWER), chain)
    if row is None:
        return _error(_STS_UNKNOWN, f"the credentials could not be fetched [{type(error).__name__}]", uri, operation)
    found, seen, meaning = row
    shown = found if isinstance(found, CredentialProgramError) else ""  # the text of others may hold secrets
    reason = f"{seen.format(file=getattr(found, 'filename', None) or 'unknown', error=shown)} [{_name(chain)}]"
    details = getattr(found, "kwargs", {})
    if isinstance(found, boto.NoCredentialsError) and exc.kwargs.get("metadata"):
        reason += f"; the instance metadata service was asked at {_shown(exc.kwargs['metadata'])}"
        return _error(_NO_MACHINE_CREDENTIALS, reason, uri, operation)
    if details.get("provider") == "container-role":
        # Only the text has the status. The agent's own words follow it, and may hold anything.
        answer = re.search(r"non 200 response (\d{3})", str(details.get("error_msg", "")))
        reason += f"; the agent of the container answered HTTP {answer[1]}" if answer else ""
        refused = answer is not None and answer[1].startswith("4")
        return _error(_AGENT_REFUSES if refused else _AGENT, reason, uri, operation)
    return _error(meaning, reason, uri, operation)


def _error(meaning: Meaning, reason: str, uri: str, operation: str) -> BackendError:
    return meaning.described(reason, uri=uri, operation=operation, provider=PROVIDER)


def _said(exc: boto.ClientError) -> tuple[str, int, str]:
    """Code and status of an answer (the code is empty where it only repeats the status), and what to say of it."""
    error, metadata = exc.response.get("Error", {}), exc.response.get("ResponseMetadata", {})
    code, status = str(error.get("Code", "")), int(metadata.get("HTTPStatusCode", 0))
    code = "" if code == str(status) else code
    request_id = metadata.get("RequestId")
    return code, status, status_line(status, code, f"request {request_id}" if request_id else "") or "with an error"


def _answered(exc: boto.ClientError, uri: str, operation: str) -> BackendError:
    response: Mapping[str, Any] = exc.response
    error = response.get("Error", {})
    headers: Mapping[str, str] = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    code, status, said = _said(exc)
    meaning = meaning_of_answer(status, code, _ANSWERS)
    if meaning is _DENIED and exc.operation_name.startswith("List"):
        meaning = _MAY_NOT_LIST
    if RENEWED in error:
        meaning = _RENEWED if error[RENEWED] else attrs.evolve(meaning, hint=_SAME)
    reason = f"S3 answered {said}"
    # The server's words help where we know little more; they are never passed on where they may repeat credentials.
    text = str(error.get("Message") or "")
    if text and code and code not in _ABOUT_CREDENTIALS:
        reason += f": {quoted(text, _ACCESS_KEY)}"
    hint = None
    region = headers.get("x-amz-bucket-region") or error.get("Region")
    if meaning in _MAYBE_REGION and region:
        meaning = _REGION
        hint = f"set AWS_REGION={region}, or add ?region={region} to the URI"
        if response["ResponseMetadata"].get("RetryAttempts"):  # signing for that region was tried, at the same endpoint
            hint += ", and set AWS_ENDPOINT_URL to an endpoint of that region, or unset it"
    retry_after = headers.get("retry-after")
    return meaning.described(
        reason, uri=uri, operation=operation, provider=PROVIDER, hint=hint, retry_after=retry_after
    )


def _chain(exc: BaseException) -> Iterator[BaseException]:
    """``exc`` and its causes, also where botocore and urllib3 keep them."""
    pending, seen = [exc], set()
    while pending:
        link = pending.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        # Not the context: in a second try that may be the failure of the first.
        inner = (getattr(link, "kwargs", {}).get("error"), link.__cause__, getattr(link, "reason", None), *link.args)
        pending += [item for item in inner if isinstance(item, BaseException)]


def _name(chain: tuple[BaseException, ...]) -> str:
    """The innermost name of a failure: what the operating system calls it, where it does."""
    for link in reversed(chain):
        if isinstance(link, OSError) and not isinstance(link, (boto.BotoCoreError, HTTPError)):
            return type(link).__name__
    return type(chain[0]).__name__


def _shown(endpoint: str) -> str:
    return shown_origin(endpoint, otherwise="of S3")
