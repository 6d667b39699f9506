"""What the error tables of object services share: meanings that each service has, rows of exceptions, quoting."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from attrs import frozen

from modelexpress_core.errors import (
    AccessDeniedError,
    SourceChangedError,
    ThrottledError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.storage.http.failures import ExceptionRow, Meaning, SettingNames

__all__ = [
    "CREDENTIAL_SERVICE_BUSY",
    "SET_CLOCK",
    "TRY_LATER",
    "ServiceMeanings",
    "no_credential_service",
    "no_version",
    "quoted",
    "shown_origin",
    "status_line",
]

TRY_LATER = "try again later, or lower MX_CONCURRENCY"
SET_CLOCK = "set the clock (chronyc tracking, timedatectl)"

#: A service that issues credentials has a passing fault, so that the load may try again.
CREDENTIAL_SERVICE_BUSY = Meaning(
    AccessDeniedError, "it has a passing fault, or is asked too much", "try again later", retryable=True
)

#: Longest text of a server that a message repeats.
_MAX_QUOTED_CHARACTERS = 300

#: Characters in a row that may be a key, a signature or a token.
_LONG_WORD = r"[A-Za-z0-9+/=_-]{40,}"


@frozen
class ServiceMeanings:
    """What every object service says in codes of its own.

    Attributes:
        busy: It has a passing fault.
        throttled: It gets more requests than it serves.
        changed: The object is of another version than the load wants.
        truncated: The object ends before the range that the load wants.
    """

    busy: Meaning
    throttled: Meaning
    changed: Meaning
    truncated: Meaning

    @classmethod
    def of(cls, service: str, thing: str = "object") -> ServiceMeanings:
        """The meanings for one service.

        Args:
            service: Its name in messages.
            thing: Its word for an object.
        """
        return cls(
            busy=Meaning(UnavailableError, f"{service} has a passing fault", TRY_LATER),
            throttled=Meaning(ThrottledError, f"{service} is asked more than it serves at a time", TRY_LATER),
            changed=Meaning(
                SourceChangedError,
                f"something replaced the {thing} since the load began",
                "start the load again when nothing writes to the model",
            ),
            truncated=Meaning(
                SourceChangedError,
                f"the {thing} is shorter than when the load began, or than its header says",
                "check that the upload was complete, and start the load again",
            ),
        )

    @property
    def by_status(self) -> Mapping[str | int, Meaning]:
        """The statuses with which services say it."""
        return {412: self.changed, 416: self.truncated, 429: self.throttled, 500: self.busy}


def no_version(names: SettingNames) -> Meaning:
    """The meaning of metadata or a listing without the version of an object."""
    return Meaning(
        UnsupportedError,
        "the server, or a proxy before it, leaves it out; bytes of two versions could be mixed",
        f"{names.check_server}, or use another server",
    )


def no_credential_service(
    what: str,
    check: str,
    *,
    unusable: Collection[type[BaseException]],
    unreachable: Collection[type[BaseException]],
) -> tuple[ExceptionRow, ExceptionRow]:
    """The rows for a service that issues credentials and cannot be reached.

    Args:
        what: What it issues.
        check: The next step.
        unusable: Exceptions for a name that does not resolve, or a certificate that is not trusted.
        unreachable: All others of connections; the load may try again after one.
    """
    seen = f"no connection to the service that gives {what}"
    wrong = Meaning(AccessDeniedError, "its name does not resolve, or its certificate is not trusted", check)
    absent = Meaning(AccessDeniedError, "it cannot be reached from here, or not now", check, retryable=True)
    return (tuple(unusable), seen, wrong), (tuple(unreachable), seen, absent)


def status_line(status: int, *details: str) -> str:
    """An answer in short: its status, and what else is known of it; empty details are left out."""
    return ", ".join(part for part in (f"HTTP {status}" if status else "", *details) if part)


def quoted(text: str, secrets: str) -> str:
    """One line of what a server says, without anything that looks like a key or a token.

    Args:
        text: What the server says.
        secrets: Pattern of the service's own keys or tokens; long words are hidden besides.
    """
    text = re.sub(f"{secrets}|{_LONG_WORD}", "***", " ".join(text.split()))
    return text if len(text) <= _MAX_QUOTED_CHARACTERS else f"{text[: _MAX_QUOTED_CHARACTERS - 3]}..."


def shown_origin(url: str, otherwise: str = "") -> str:
    """Scheme, host and port of a URL, which may hold more that messages must not show.

    Args:
        url: The URL.
        otherwise: What to show of a URL without a host.
    """
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else otherwise
