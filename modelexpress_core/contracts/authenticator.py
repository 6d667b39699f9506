"""What every authenticator does: it names the caller of a call that a server or a worker answers."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from attrs import frozen

__all__ = ["Authenticator", "Call", "Refusal", "RefusedError"]


class Refusal(Enum):
    """Why a call is refused; the names are those of gRPC's statuses."""

    UNAUTHENTICATED = "the caller is unknown"
    PERMISSION_DENIED = "the caller is known and may not make this call"
    UNAVAILABLE = "the service that authenticates callers does not answer"


@frozen
class Call:
    """The credentials of a call.

    Attributes:
        token: The bearer token of its metadata; None if it has none.
        names: Names in the client's certificate, which TLS has verified, the subject's last.
    """

    token: str | None = None
    names: Sequence[str] = ()

    def __repr__(self) -> str:
        """Without the token."""
        return f"Call(token={'***' if self.token else None}, names={self.names!r})"


class RefusedError(Exception):
    """Raised by an authenticator that refuses a call.

    Args:
        refusal: The status of the answer.
        reason: The text of the answer, without the token.
    """

    def __init__(self, refusal: Refusal, reason: str) -> None:
        super().__init__(reason)
        self.refusal = refusal
        self.reason = reason


class Authenticator(Protocol):
    """Names the caller of a call, or refuses the call.

    Attributes:
        by_certificate: Whether it uses the names in the client's certificate. If so, TLS asks clients for a
            certificate, and the server needs one, too. If not, it is called before anything of a request is read.
    """

    by_certificate: bool

    async def authenticate(self, call: Call) -> str:
        """The name of the caller, never empty. Records that it publishes belong to that name.

        Raises:
            RefusedError: The caller is unknown, or may not make the call.
        """
