"""Tickets: who may read what, and until when. The process that issues them verifies them, and keeps none."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable

from attrs import astuple, frozen

__all__ = ["Ticket", "Tickets"]

#: A longer text is no ticket of ours.
_MAX_TICKET_CHARACTERS = 4096


@frozen
class Ticket:
    """What the holder of a ticket may read.

    Attributes:
        lease_id: The lease that keeps the bytes as they are; the ticket ends with it.
        content: What is read: the id of a worker, or of a cached model.
        version: The version of the content.
        until: When the ticket ends in any case, by the monotonic clock of the process that issued it.
        reader: The name in the certificate of the reader, which has to show it again; empty where readers show none.
    """

    lease_id: str
    content: str
    version: str
    until: float
    reader: str = ""


class Tickets:
    """Issues tickets, and verifies them. Their key lives as long as this object. Thread-safe.

    Args:
        clock: A monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = secrets.token_bytes(32)
        self._clock = clock

    def issue(self, lease_id: str, *, content: str, version: str, seconds: float, reader: str = "") -> str:
        """A ticket for ``seconds`` from now: a secret of its reader, in characters that a header can have."""
        ticket = Ticket(lease_id, content, version, self._clock() + seconds, reader)
        payload = _encoded(json.dumps(astuple(ticket), ensure_ascii=True, separators=(",", ":")).encode())
        return f"{payload}.{_encoded(self._signature(payload))}"

    def verified(self, text: str) -> Ticket | None:
        """The ticket that ``text`` is; None if it was not issued here, was changed, or has ended."""
        payload, _, signature = text.partition(".")
        if len(text) > _MAX_TICKET_CHARACTERS or not text.isascii():
            return None
        try:
            genuine = hmac.compare_digest(_decoded(signature), self._signature(payload))
        except binascii.Error:
            return None
        if not genuine:
            return None
        ticket = Ticket(*json.loads(_decoded(payload)))
        return ticket if self._clock() < ticket.until else None

    def _signature(self, payload: str) -> bytes:
        return hmac.digest(self._key, payload.encode("ascii"), hashlib.sha256)


def _encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode("ascii")


def _decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
