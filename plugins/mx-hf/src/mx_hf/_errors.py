"""What answers of the Hub, redirects and tokens mean for a load; completes core's tables for HTTP."""

from __future__ import annotations

import re
from collections.abc import Mapping

from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.storage.http import Failures, Meaning, Origin, Refusal, SettingNames, meaning_of_answer
from modelexpress_core.storage.http.service_errors import ServiceMeanings, quoted, status_line

__all__ = [
    "ENTRY_NOT_FOUND",
    "NAMES",
    "PROVIDER",
    "HfFailures",
    "RedirectError",
    "TokenError",
    "error_code",
]

PROVIDER = "mx-hf"

NAMES = SettingNames(endpoint="HF_ENDPOINT", ca_bundle="MX_HF_CA_BUNDLE", read_timeout="MX_HF_READ_TIMEOUT_SECONDS")

#: The code for a file or directory that the revision does not have.
ENTRY_NOT_FOUND = "EntryNotFound"


# -- what the modules of this package raise ----------------------------------------------------------------------------


class TokenError(Exception):
    """A token was found and cannot be used.

    Args:
        reason: Why, without the token.
        place: Where it was found.
    """

    def __init__(self, reason: str, place: str) -> None:
        super().__init__(f"{reason} (token from {place})")


class RedirectError(Exception):
    """A redirect that is not followed. The text says why, and shows no more of its URL than the server."""


# -- answers of the Hub ------------------------------------------------------------------------------------------------

_HUB = ServiceMeanings.of("the Hub", "file")

_LOGIN = "set HF_TOKEN, or run hf auth login"

_INVALID_TOKEN = Meaning(
    AccessDeniedError,
    "the token was revoked or has run out, or is of another Hub",
    "make a new token on the settings page of the Hub, and set HF_TOKEN",
)
_NO_REPOSITORY = Meaning(
    NotFoundError,
    "the name is misspelt, or the repository is private and this token may not read it",
    "check the URI and HF_ENDPOINT, and that the token may read the repository",
)
_NO_REPOSITORY_ANONYMOUS = Meaning(
    NotFoundError,
    "the name is misspelt, or the repository is private and the request carries no token",
    f"check the URI; for a private repository, {_LOGIN}",
)
_GATED = Meaning(
    AccessDeniedError,
    "the repository is gated, and the account of this token has not been granted access, or the token may not read "
    "gated repositories",
    "accept its conditions on its page of the Hub, and check the rights of the token",
)
_GATED_ANONYMOUS = Meaning(
    AccessDeniedError,
    "the repository is gated, and the request carries no token",
    f"accept its conditions on its page of the Hub; then {_LOGIN}",
)
_DISABLED = Meaning(
    AccessDeniedError, "the Hub has disabled the repository", "look at its page of the Hub, or use another one"
)
_NO_REVISION = Meaning(
    NotFoundError,
    "the revision is misspelt, or it was deleted",
    "check ?revision= (or what follows the @) against the branches, tags and commits of the repository",
)
_NO_ENTRY = Meaning(
    NotFoundError,
    "the name is misspelt, or this revision does not have the file",
    "check the files of the repository at this revision",
)
_DENIED = Meaning(
    AccessDeniedError,
    "the token may not read this repository",
    "check the rights of the token: a fine-grained one names the repositories that it reads",
)
_DENIED_ANONYMOUS = Meaning(AccessDeniedError, "the Hub does not give it without a token", _LOGIN)
_LEGAL = Meaning(
    AccessDeniedError, "the Hub may not give it to this place or account", "look at the repository's page of the Hub"
)
_SIGNATURE = Meaning(
    AccessDeniedError,
    "the signed URL of the Hub is refused, and so is a new one: a proxy changes URLs, or the network's address differs "
    "between the Hub and the CDN",
    "check HTTPS_PROXY and what is between this machine and the CDN",
)
_UNEXPECTED = Meaning(
    BackendError,
    "something in front of the server answers, or the server is none of the Hub",
    "check HF_ENDPOINT and HTTPS_PROXY",
)
_NO_CONTENT = Meaning(UnavailableError, "the CDN does not have the content of the file, or not yet", "try again later")

#: Code in the header ``X-Error-Code``, or HTTP status where there is none that is known here -> what it means.
_ANSWERS: Mapping[str | int, Meaning] = {
    "DisabledRepo": _DISABLED,
    ENTRY_NOT_FOUND: _NO_ENTRY,
    "GatedRepo": _GATED,
    "RepoNotFound": _NO_REPOSITORY,
    "RevisionNotFound": _NO_REVISION,
    **_HUB.by_status,
    401: _INVALID_TOKEN,
    403: _DENIED,
    404: _NO_ENTRY,
    451: _LEGAL,
}

#: The same for a request without a token.
_WITHOUT_TOKEN: Mapping[Meaning, Meaning] = {
    _DENIED: _DENIED_ANONYMOUS,
    _GATED: _GATED_ANONYMOUS,
    _INVALID_TOKEN: _DENIED_ANONYMOUS,
    _NO_REPOSITORY: _NO_REPOSITORY_ANONYMOUS,
}

_CDN_ANSWERS: Mapping[str | int, Meaning] = {
    **ServiceMeanings.of("the CDN of the Hub", "file").by_status,
    400: _SIGNATURE,
    401: _SIGNATURE,
    403: _SIGNATURE,
    404: _NO_CONTENT,
    410: _NO_CONTENT,
}

_DISABLED_WORDS = "Access to this resource is disabled"

#: The Hub's tokens, which the words of a server may repeat.
_TOKEN_PATTERN = r"\bhf_\w+|\bBearer\s+\S+"  # noqa: S105 - a pattern

#: https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers: what is left (r), and when it is renewed (t).
_RATE_LIMIT = re.compile(r'"([^"]{1,40})"\s*;\s*r\s*=\s*([0-9]{1,9})\s*;\s*t\s*=\s*([0-9]{1,9})(?![0-9])')

_REDIRECT = Meaning(
    UnsupportedError,
    "HF_ENDPOINT names a server that moved, or something in front of the Hub redirects requests",
    f"{NAMES.check_server}",
)
_TOKEN = Meaning(
    AccessDeniedError,
    "the token was damaged, or the Hub is set to an address that is not encrypted",
    "check HF_TOKEN and HF_ENDPOINT (https://); HF_HUB_DISABLE_IMPLICIT_TOKEN=1 sends requests without a token",
)


def error_code(headers: Mapping[str, str]) -> str:
    """The Hub's own code for a refusal; empty where there is none.

    Args:
        headers: Of the answer, by lower-case name.
    """
    return headers.get("x-error-code", "")


class HfFailures(Failures):
    """Explains what goes wrong with one storage."""

    caught = (OSError, RedirectError, TokenError)

    #: Where the Hub is; other servers are its CDN.
    hub: Origin | None = None

    def of_answer(self, refusal: Refusal, path: str, operation: str) -> BackendError:
        """The error for an answer of the Hub, whose headers have its own code and words, or of its CDN."""
        if self.hub is not None and refusal.request.origin != self.hub:
            meaning = meaning_of_answer(refusal.status, own=_CDN_ANSWERS)
            meaning = meaning if meaning.cause else _UNEXPECTED
            told = f"the CDN {refusal.request.origin} answered {status_line(refusal.status)}"
            return self.described(meaning, told, path, operation, retry_after=_wait(refusal.headers))
        code, words = error_code(refusal.headers), refusal.headers.get("x-error-message", "")
        meaning = meaning_of_answer(refusal.status, code, _ANSWERS)
        meaning = meaning if meaning.cause else _UNEXPECTED
        if words.startswith(_DISABLED_WORDS):
            meaning = _DISABLED
        if not any(name.lower() == "authorization" for name, _ in refusal.request.headers):
            meaning = _WITHOUT_TOKEN.get(meaning, meaning)
        told = f"the Hub answered {status_line(refusal.status, code)}"
        if words and refusal.status != 401:  # what is said of a token may repeat it
            told += f": {quoted(words, _TOKEN_PATTERN)}"
        hint = None
        if refusal.status == 429:
            limited = _limited(refusal.headers)
            if limited is not None:
                resource, seconds = limited
                told += f"; the limit of {resource!r} requests is used up for {seconds} s"
                hint = f"try again in {seconds} s, set HF_TOKEN (its limits are higher), or lower MX_CONCURRENCY"
        return self.described(meaning, told, path, operation, hint=hint, retry_after=_wait(refusal.headers))

    def unanswered(self, exc: Exception, path: str, operation: str, silence_seconds: float | None) -> BackendError:
        """The error for a connection that failed, a redirect that is not followed, or a token that cannot be used."""
        if isinstance(exc, RedirectError):
            return self.described(_REDIRECT, str(exc), path, operation)
        if isinstance(exc, TokenError):
            return self.described(_TOKEN, f"no token can be sent: {exc}", path, operation)
        return super().unanswered(exc, path, operation, silence_seconds)


def _limited(headers: Mapping[str, str]) -> tuple[str, int] | None:
    """The kind of requests that the Hub limits, and the seconds until it answers them; None where it says neither."""
    match = _RATE_LIMIT.search(headers.get("ratelimit", ""))
    return (match[1], int(match[3])) if match is not None and match[2] == "0" else None


def _wait(headers: Mapping[str, str]) -> str | None:
    """What a ``Retry-After`` header would say."""
    limited = _limited(headers)
    return headers.get("retry-after") or (str(limited[1]) if limited is not None else None)
