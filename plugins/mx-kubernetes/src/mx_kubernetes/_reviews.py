"""Authenticates callers by the tokens of their service accounts, which the API server of Kubernetes reviews.

A call costs a review (TokenReview) only if its token is new here: answers are kept for a minute, refusals too, and
callers with the same token share one review. A text that cannot be a token of a service account for this server is
refused without a question: what strangers send costs the API server little, and pushes out nothing that is known of
others.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from attrs import frozen

from modelexpress_core.contracts.authenticator import Call, Refusal, RefusedError
from modelexpress_core.errors import SettingsError
from modelexpress_core.server.deadlines import time_out
from modelexpress_core.settings import from_env
from mx_kubernetes._client import Kubernetes, Object, in_background
from mx_kubernetes._errors import ApiError
from mx_kubernetes.settings import ReviewSettings

__all__ = ["ReviewAuthenticator", "open_reviews"]

_PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
_PREFIX = "system:serviceaccount:"

#: Longest token: those of service accounts have about 1 KiB.
_MAX_TOKEN_BYTES = 16 << 10

#: Answers that are kept, of each kind: callers, and refusals.
_MAX_KEPT = 10_000

#: Reviews under way, and callers that wait for one.
_REVIEWS = 8
_MAX_WAITING = 256
_REVIEW_SECONDS = 4.0


def open_reviews(settings: Mapping[str, str]) -> ReviewAuthenticator:
    """The authenticator ``kubernetes``.

    Raises:
        SettingsError: Audiences or allowed service accounts are not set, or no API server is known.
    """
    wanted = from_env(ReviewSettings, settings)
    missing = [
        name
        for name, values in (
            ("MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES", wanted.audiences),
            ("MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS", wanted.allowed),
        )
        if not values
    ]
    if missing:
        message = f"the authentication by Kubernetes needs {' and '.join(missing)}"
        hint = "set the audience of the tokens, such as modelexpress, and the service accounts as namespace:name,..."
        raise SettingsError(message, hint=hint)
    return ReviewAuthenticator(
        Kubernetes(settings), audiences=wanted.audiences, allowed=wanted.allowed, cache_seconds=wanted.cache_seconds
    )


@frozen
class _Answer:
    """What is known of a token.

    Attributes:
        name: The name of the caller; empty if the call is refused.
        refusal: Why it is refused.
        reason: The text of the refusal.
        until: When the answer is no longer used.
    """

    name: str
    refusal: Refusal
    reason: str
    until: float


class ReviewAuthenticator:
    """Names a caller by its service account, ``system:serviceaccount:namespace:name``.

    Args:
        api: The API server.
        audiences: A token has one of them.
        allowed: Service accounts whose calls are answered, as ``namespace:name``.
        cache_seconds: How long an answer is used.
        clock: Steady clock in seconds.
        wall_clock: Seconds since 1970, which tokens expire by.
    """

    by_certificate = False

    def __init__(
        self,
        api: Kubernetes,
        *,
        audiences: Collection[str],
        allowed: Collection[str],
        cache_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._audiences = tuple(audiences)
        self._allowed = frozenset(f"{_PREFIX}{account}" for account in allowed)
        self._cache_seconds = cache_seconds
        self._clock = clock
        self._wall_clock = wall_clock
        self._known: OrderedDict[bytes, _Answer] = OrderedDict()
        self._refused: OrderedDict[bytes, _Answer] = OrderedDict()
        self._reviews: dict[bytes, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(_REVIEWS)

    async def authenticate(self, call: Call) -> str:
        """The name of the caller.

        Raises:
            RefusedError: The token is not one of an allowed service account, or the API server cannot be asked.
        """
        if call.token is None:
            raise RefusedError(Refusal.UNAUTHENTICATED, "a token of a service account is wanted, and none was sent")
        token = call.token.encode("utf-8", "surrogateescape")
        key = hashlib.sha256(token).digest()
        answer = self._kept(key)
        if answer is None:
            expires = self._expiry(token)
            answer = await self._reviewed(key, call.token, expires)
        if not answer.name:
            raise RefusedError(answer.refusal, answer.reason)
        return answer.name

    def _kept(self, key: bytes) -> _Answer | None:
        answer = self._known.get(key) or self._refused.get(key)
        return answer if answer is not None and self._clock() < answer.until else None

    def _expiry(self, token: bytes) -> float:
        """When the token expires, in seconds since 1970, as it says itself, unverified.

        Raises:
            RefusedError: By its own words it is no token of a service account for this server.
        """
        claims = _claims(token) if len(token) <= _MAX_TOKEN_BYTES else None
        if claims is None:
            raise RefusedError(Refusal.UNAUTHENTICATED, "the token is not one of a service account of Kubernetes")
        given = claims.get("aud")
        audiences = given if isinstance(given, list) else [given]
        if not any(audience in self._audiences for audience in audiences):
            wanted = ", ".join(self._audiences)
            raise RefusedError(Refusal.UNAUTHENTICATED, f"the token is for another audience than this server: {wanted}")
        expires = claims.get("exp")
        if not isinstance(expires, (int, float)) or expires <= self._wall_clock():
            raise RefusedError(Refusal.UNAUTHENTICATED, "the token has expired; the kubelet renews projected tokens")
        return float(expires)

    async def _reviewed(self, key: bytes, token: str, expires: float) -> _Answer:
        """The answer of the API server, which callers with the same token share."""
        review = self._reviews.get(key)
        if review is None:
            if len(self._reviews) >= _MAX_WAITING:
                raise RefusedError(Refusal.UNAVAILABLE, "too many tokens wait for the API server of Kubernetes")
            review = self._reviews[key] = in_background(self._review(key, token, expires))
            review.add_done_callback(lambda _: self._reviews.pop(key, None))
        try:
            # A caller that goes away does not end the review for the others.
            await asyncio.wait_for(asyncio.shield(review), time_out(2 * _REVIEW_SECONDS))
        except (ApiError, asyncio.TimeoutError) as exc:
            reason = f"the API server of Kubernetes cannot review the token: {exc or 'it takes too long'}"
            raise RefusedError(Refusal.UNAVAILABLE, reason) from exc
        answer = self._kept(key)
        if answer is None:  # the cache keeps nothing, or the token expires now
            raise RefusedError(Refusal.UNAVAILABLE, "the review of the token was outdated at once; try again")
        return answer

    async def _review(self, key: bytes, token: str, expires: float) -> None:
        async with self._turns:
            answered = await self._api.request(
                "POST",
                _PATH,
                operation="create tokenreviews",
                body={
                    "apiVersion": "authentication.k8s.io/v1",
                    "kind": "TokenReview",
                    "spec": {"token": token, "audiences": [*self._audiences]},
                },
                seconds=_REVIEW_SECONDS,
            )
        status = answered.get("status")
        name, refusal, reason = self._verdict(status if isinstance(status, dict) else {})
        lasts = max(1.0, min(self._cache_seconds, expires - self._wall_clock()))
        answer = _Answer(name, refusal, reason, self._clock() + lasts)
        kept, other = (self._known, self._refused) if name else (self._refused, self._known)
        other.pop(key, None)
        kept[key] = answer
        kept.move_to_end(key)
        while len(kept) > _MAX_KEPT:
            kept.popitem(last=False)

    def _verdict(self, status: Object) -> tuple[str, Refusal, str]:
        """The caller's name, or why it is refused."""
        user = status.get("user")
        name = user.get("username") if isinstance(user, dict) else None
        if status.get("authenticated") is not True or not isinstance(name, str):
            return "", Refusal.UNAUTHENTICATED, "Kubernetes does not know the token, or it was revoked"
        audiences = status.get("audiences")
        # An API server that does not know audiences answers without them: the token may be for another service.
        if not isinstance(audiences, list) or not set(self._audiences).intersection(map(str, audiences)):
            return "", Refusal.UNAUTHENTICATED, "the token is for another audience than this server"
        if name not in self._allowed:
            reason = f"{name} may not call this server: it is not among MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS"
            return "", Refusal.PERMISSION_DENIED, reason
        return name, Refusal.UNAUTHENTICATED, ""


def _claims(token: bytes) -> Mapping[str, Any] | None:
    """The claims of a JSON Web Token (RFC 7519), unverified; None for what is none."""
    parts = token.split(b".")
    if len(parts) != 3 or not all(parts):
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + b"=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        return None
    return claims if isinstance(claims, dict) else None
