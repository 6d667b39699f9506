"""Read grants: the server signs that a reader may read one worker, and the worker verifies it.

A grant is ``<message>.<signature>``, both in base64url without padding: a serialised ``ReadGrant``, and its HMAC-SHA256
(RFC 2104) under a key that only the server and this worker have. A worker learns nothing with which it could call the
server, or another worker, as the reader.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable

from attrs import frozen
from google.protobuf.message import DecodeError

from modelexpress_core.contracts.authenticator import Call, Refusal, RefusedError
from modelexpress_core.wire.proto.modelexpress import access_pb2

__all__ = ["ANONYMOUS", "GRANT_SECONDS", "GrantAuthenticator", "ReadGrant", "new_grant_key", "sign_grant"]

#: Name of a reader where no grants are needed.
ANONYMOUS = "anonymous"

#: How long a grant is valid.
GRANT_SECONDS = 300

#: A grant that expires later than this much after ``GRANT_SECONDS`` from now was not signed by a clock like ours.
_CLOCK_TOLERANCE_SECONDS = 60

_KEY_BYTES = 32

#: A longer text is no grant: names are far shorter.
_MAX_CHARACTERS = 8192

#: Keys that verify: the present one and the one before it, whose grants may still be on the way.
_KEPT_KEYS = 2


@frozen
class ReadGrant:
    """What a grant says.

    Attributes:
        reader: Name of the reader, as the server authenticated it.
        source_id: The source that it may read.
        worker_id: The worker that it may read it from.
        expires_at_ms: Until when, in milliseconds since 1970 by the server's clock.
    """

    reader: str
    source_id: str
    worker_id: str
    expires_at_ms: int


def new_grant_key() -> bytes:
    """Return a new random key for one worker."""
    return secrets.token_bytes(_KEY_BYTES)


def sign_grant(grant: ReadGrant, key: bytes) -> str:
    """Return ``grant`` with its signature, as text that fits into a bearer token."""
    message = access_pb2.ReadGrant(
        reader=grant.reader,
        mx_source_id=grant.source_id,
        worker_id=grant.worker_id,
        expires_at_ms=grant.expires_at_ms,
    ).SerializeToString()
    return f"{_encoded(message)}.{_encoded(_signature(message, key))}"


class GrantAuthenticator:
    """Authenticates the readers of one worker by their grants. Thread-safe.

    Until the server has given a key, calls are refused if ``required``; otherwise every caller is answered, since the
    server authenticates no callers either.

    Args:
        source_id: The source that the worker holds.
        worker_id: The worker.
        required: Whether callers need a grant even before the server has given a key.
        clock: A monotonic clock, in seconds.
    """

    by_certificate = False

    def __init__(
        self, source_id: str, worker_id: str, *, required: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._source_id = source_id
        self._worker_id = worker_id
        self._required = required
        self._clock = clock
        self._keys: deque[bytes] = deque(maxlen=_KEPT_KEYS)
        self._server_time_offset_ms = 0.0
        self._lock = threading.Lock()

    def accept_key(self, key: bytes) -> None:
        """Verify grants with ``key`` from now on, and with the key before it."""
        with self._lock:
            if key and key not in self._keys:
                self._keys.append(key)

    def accept_server_time(self, server_time_ms: int) -> None:
        """Take over the time of the server: grants expire by its clock, whatever this machine's says."""
        if server_time_ms:
            self._server_time_offset_ms = server_time_ms - self._clock() * 1000

    async def authenticate(self, call: Call) -> str:
        """The name of the reader; ``ANONYMOUS`` where no grants are needed."""
        with self._lock:
            keys = tuple(self._keys)
        if not keys:
            if self._required:
                reason = "this worker has not yet been published, so it cannot verify read grants"
                raise RefusedError(Refusal.UNAVAILABLE, reason)
            return ANONYMOUS
        if call.token is None:
            raise RefusedError(Refusal.UNAUTHENTICATED, "a read grant of the server is needed, and none was sent")
        grant = _verified(call.token, keys)
        if grant is None:
            reason = "the read grant is not valid: its signature is not one of the server for this worker"
            raise RefusedError(Refusal.UNAUTHENTICATED, reason)
        if (grant.source_id, grant.worker_id) != (self._source_id, self._worker_id):
            raise RefusedError(Refusal.PERMISSION_DENIED, "the read grant is for another source or another worker")
        now_ms = self._clock() * 1000 + self._server_time_offset_ms
        latest_ms = now_ms + (GRANT_SECONDS + _CLOCK_TOLERANCE_SECONDS) * 1000
        if not now_ms < grant.expires_at_ms <= latest_ms:
            raise RefusedError(Refusal.UNAUTHENTICATED, "the read grant has expired")
        return grant.reader


def _verified(text: str, keys: tuple[bytes, ...]) -> ReadGrant | None:
    """The content of a grant that one of ``keys`` signed; None if none did."""
    message, dot, signature = text.partition(".")
    if not dot or len(text) > _MAX_CHARACTERS:
        return None
    try:
        data, given = _decoded(message), _decoded(signature)
    except ValueError:
        return None
    matches = [hmac.compare_digest(_signature(data, key), given) for key in keys]
    if not any(matches):
        return None
    try:
        grant = access_pb2.ReadGrant.FromString(data)
    except DecodeError:  # not of a server that has the key
        return None
    return ReadGrant(grant.reader, grant.mx_source_id, grant.worker_id, grant.expires_at_ms)


def _signature(message: bytes, key: bytes) -> bytes:
    return hmac.new(key, _PURPOSE + message, hashlib.sha256).digest()


#: Signed with each grant, so that the key signs nothing else.
_PURPOSE = b"modelexpress read grant 1\0"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _decoded(text: str) -> bytes:
    data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if _encoded(data) != text:
        reason = "another text for the same bytes"
        raise ValueError(reason)
    return data
