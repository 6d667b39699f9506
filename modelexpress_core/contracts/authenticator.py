"""What authenticates the calls that a server or a worker answers."""

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
    UNAVAILABLE = "the authority that knows the callers cannot be reached"


@frozen
class Call:
    """What a call says of who makes it.

    Attributes:
        token: What came after ``Bearer``; None where there is no such header.
        names: Names in the certificate that the client proved to have, the subject's last.
    """

    token: str | None = None
    names: Sequence[str] = ()

    def __repr__(self) -> str:
        """Without the token."""
        return f"Call(token={'***' if self.token else None}, names={self.names!r})"


class RefusedError(Exception):
    """The call is not answered.

    Args:
        refusal: Why, as a status of gRPC.
        reason: The text of the answer. Holds no token.
    """

    def __init__(self, refusal: Refusal, reason: str) -> None:
        super().__init__(reason)
        self.refusal = refusal
        self.reason = reason


class Authenticator(Protocol):
    """Says who a call is from.

    Attributes:
        by_certificate: Whether it looks at the names in the certificate, which are there only once a call is taken up.
            One that does not is asked before anything of a request is read.
    """

    by_certificate: bool

    async def authenticate(self, call: Call) -> str:
        """The name of whoever makes the call: records that they publish belong to that name. Never empty.

        Raises:
            RefusedError: It is not known, or they may not.
        """
