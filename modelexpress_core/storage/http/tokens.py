"""Access tokens and other credentials: fetched once for all threads, renewed before they end, replaced when refused."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import attrs
from attrs import field, frozen

__all__ = ["Token", "TokenCache"]

V = TypeVar("V")
_E = TypeVar("_E", bound=BaseException)

#: A token is renewed this long before its end, or at half of its life.
_RENEWAL_SECONDS = 300.0

#: How long a token that is still valid is used after it could not be renewed, until the next try.
_RENEWAL_PAUSE_SECONDS = 30.0

#: A token that ends sooner, or is in the last tenth of its life, is not used any more: a request takes time.
_MARGIN_SECONDS = 30.0
_MARGIN_SHARE = 0.1

#: How long a service that throttles is left alone if it does not say; doubled with each such answer.
_FIRST_BACKOFF_SECONDS = 1.0
_MAX_BACKOFF_SECONDS = 60.0


@frozen
class Token(Generic[V]):
    """A token that was just fetched.

    Attributes:
        value: What requests need of it. Never shown.
        lifetime_seconds: How long it is valid; infinite if it does not say.
    """

    value: V = field(repr=False)
    lifetime_seconds: float = math.inf


@frozen(eq=False)
class _Held(Generic[V]):
    """A token by the clock of the cache.

    Attributes:
        value: As in ``Token``.
        renew_at: After this, another one is fetched.
        ends_at: After this, it is not used any more.
        repeated: It was fetched in place of one that was refused, and is the same.
    """

    value: V = field(repr=False)
    renew_at: float
    ends_at: float
    repeated: bool = False


class TokenCache(Generic[V]):
    """Keeps one token for all threads. Thread-safe.

    One thread at a time fetches a token. Meanwhile the others use the old one while it is valid; otherwise they wait,
    and share the result, also a failure. Nothing here sleeps: core waits between the attempts of a load.

    Args:
        fetch: Fetches a token; called by one thread at a time.
        failures: What it raises.
        throttled: The wait in seconds that a service asks for with a failure, 0.0 if it throttles without a wait, None
            if it does not throttle. Until the wait is over, the failure is raised again without another request.
        clock: Seconds.
    """

    def __init__(
        self,
        fetch: Callable[[], Token[V]],
        *,
        failures: type[Exception],
        throttled: Callable[[Exception], float | None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch_token = fetch
        self._failures = failures
        self._throttled = throttled
        self._clock = clock
        self._lock = threading.Lock()
        self._held: _Held[V] | None = None
        self._fetches = 0
        self._failure: Exception | None = None
        self._throttled_times = 0
        self._throttled_until = -math.inf

    @property
    def held(self) -> V | None:
        """The token that was fetched last, valid or not; None before the first."""
        held = self._held
        return None if held is None else held.value

    def get(self) -> V:
        """A token that is valid now.

        Raises:
            Exception: One of ``failures``: none can be had.
        """
        held, now = self._held, self._clock()
        if held is not None and now < held.renew_at:
            return held.value
        if held is not None and now < held.ends_at:
            return self._renewed_early(held)
        return self._fetched_after(held).value

    def renew(self, is_refused: Callable[[V], bool], *, is_final: Callable[[V], bool] = lambda _: True) -> bool:
        """Fetch another token after a service refused one, once for all threads.

        Args:
            is_refused: Whether a token is the refused one.
            is_final: Whether a refused token that was fetched again stays the same; then it is not fetched again.

        Returns:
            Whether there is another one now.

        Raises:
            Exception: One of ``failures``: none can be had.
        """
        held = self._held
        if held is None or not is_refused(held.value):
            return True
        if held.repeated:
            return False
        found = self._fetched_after(held)
        if not is_refused(found.value):
            return True
        if is_final(found.value):
            with self._lock:
                if self._held is found:
                    self._held = attrs.evolve(found, repeated=True)
        return False

    def _fetched_after(self, previous: _Held[V] | None) -> _Held[V]:
        """A token other than ``previous``; what one thread fetches, or fails to, holds for all that wait."""
        fetches = self._fetches
        with self._lock:
            held = self._held
            if held is not None and held is not previous:
                return held
            failure = self._failure
            if failure is not None and (self._fetches != fetches or self._clock() < self._throttled_until):
                raise _copied(failure)
            return self._fetch()

    def _renewed_early(self, held: _Held[V]) -> V:
        """Another token for one that ends soon; ``held`` where that fails, or where another thread is at it."""
        if not self._lock.acquire(blocking=False):
            return held.value
        try:
            return (self._fetch() if self._held is held else self._held or held).value
        except self._failures:
            next_try = max(self._clock() + _RENEWAL_PAUSE_SECONDS, self._throttled_until)
            self._held = attrs.evolve(held, renew_at=next_try)
            return held.value
        finally:
            self._lock.release()

    def _fetch(self) -> _Held[V]:
        """Fetch a token; the caller holds the lock."""
        try:
            token = self._fetch_token()
        except self._failures as exc:
            self._failure = _copied(exc)  # the exception itself will have frames, and with them buffers of reads
            self._note_throttling(exc)
            raise
        finally:
            self._fetches += 1  # at the end, so that waiting threads see that another thread has tried
        self._failure, self._throttled_times = None, 0
        now, lifetime = self._clock(), token.lifetime_seconds
        margin = min(_MARGIN_SECONDS, _MARGIN_SHARE * lifetime)
        renewal = min(_RENEWAL_SECONDS, lifetime / 2)
        self._held = _Held(token.value, now + lifetime - renewal, now + lifetime - margin)
        return self._held

    def _note_throttling(self, failure: Exception) -> None:
        asked_for = self._throttled(failure)
        if asked_for is None:
            return
        backoff = _FIRST_BACKOFF_SECONDS * 2.0**self._throttled_times
        self._throttled_times += 1
        self._throttled_until = self._clock() + min(asked_for or backoff, _MAX_BACKOFF_SECONDS)


def _copied(failure: _E) -> _E:
    """The same failure for another thread: without the frames of the one that was raised."""
    copied = type(failure).__new__(type(failure), *failure.args)
    copied.__dict__.update(failure.__dict__)
    copied.__cause__ = failure.__cause__
    return copied
