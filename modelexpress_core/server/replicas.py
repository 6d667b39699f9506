"""Which replica of a server downloads a version of a model: the others read it from there.

Each version is a role in the metadata store. The replica that has the role downloads the version from its storage, and
keeps the role for as long as it has the version. A replica that does not get the role learns who has it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from attrs import field, frozen

from modelexpress_core.contracts.metadata_store import LeaderLease, MetadataStore, StoreUnavailableError

__all__ = ["Claim", "Replicas"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

#: How often a role is asked for that ended between two questions.
_MAX_QUESTIONS = 5

#: Of a lease; it is renewed three times meanwhile.
_RENEWALS = 3


@frozen
class Claim:
    """Who downloads a version.

    Attributes:
        holder: Endpoint of the replica that does.
        own: Whether it is this one.
        token: Grows with each change of holder.
        lasts: Whether this replica still has the role, as far as it knows. One that lost it stops its download: another
            has begun one. A metadata store that does not answer ends no download: each replica writes to a directory
            of its own, so that the worst is a download more.
    """

    holder: str
    own: bool
    token: int
    lasts: Callable[[], bool] = field(repr=False, eq=False)


class Replicas:
    """Claims versions for this replica, and keeps them. Thread-safe but for ``run`` and ``once``.

    Args:
        store: The metadata store that all replicas share.
        endpoint: The ``host:port`` by which the others reach this replica.
        loop: The event loop of the store.
        seconds: How long a lease lasts without renewal: so long do others wait if this replica is killed.
    """

    def __init__(
        self,
        store: MetadataStore,
        endpoint: str,
        loop: asyncio.AbstractEventLoop,
        *,
        seconds: float = 15.0,
    ) -> None:
        self._store = store
        self._endpoint = endpoint
        self._loop = loop
        self._seconds = seconds
        self._lock = threading.Lock()
        self._held: dict[str, int] = {}

    async def run(self) -> None:
        """Renew all claims at intervals until cancelled."""
        while True:
            await asyncio.sleep(self._seconds / _RENEWALS)
            await self.once()

    async def once(self) -> None:
        """Renew all claims. What the store does not answer is tried again the next time."""
        with self._lock:
            held = list(self._held)
        for key in held:
            try:
                await self._renew(key)
            except StoreUnavailableError as exc:
                _log.warning("the metadata store does not answer, so a role may be lost: %s", exc)
            except Exception:  # noqa: BLE001 - of a plugin's store, say
                _log.exception("a role could not be renewed")

    def claim(self, key: str) -> Claim:
        """Claim the version ``key`` for this replica, or learn who has it. Called from threads other than the loop's.

        A claim of this replica is kept until ``release``, and lost if the store cannot be asked for long.

        Raises:
            StoreUnavailableError: The store does not answer, or replicas take turns too fast.
        """
        return self._wait(self._claim(key))

    def release(self, key: str) -> None:
        """Claim it no longer: this replica does not have the version any more, or failed to download it.

        The role ends with its lease.
        """
        with self._lock:
            self._held.pop(key, None)

    async def _claim(self, key: str) -> Claim:
        for _ in range(_MAX_QUESTIONS):
            lease = await self._store.lead(_role(key), self._endpoint, self._seconds)
            if lease is not None:
                return self._own(key, lease)
            other = await self._store.leader(_role(key))
            if other is not None:
                self.release(key)
                return Claim(other.holder, own=False, token=other.token, lasts=lambda: False)
        message = "the role of a download changes hands at each question"
        raise StoreUnavailableError(message)

    def _own(self, key: str, lease: LeaderLease) -> Claim:
        with self._lock:
            self._held[key] = lease.token
        return Claim(self._endpoint, own=True, token=lease.token, lasts=lambda: self._lasts(key, lease.token))

    def _lasts(self, key: str, token: int) -> bool:
        with self._lock:
            return self._held.get(key) == token

    async def _renew(self, key: str) -> None:
        lease = await self._store.lead(_role(key), self._endpoint, self._seconds)
        with self._lock:
            held = self._held.get(key)
            if held is None:  # released meanwhile: the lease ends by itself
                return
            if lease is None or lease.token != held:
                # With another token, somebody else had the role in between, and may have begun a download.
                del self._held[key]
                _log.info("another replica has taken a version over: %s", key)

    def _wait(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(self._seconds)
        except concurrent.futures.TimeoutError as exc:
            future.cancel()
            message = f"no answer within {self._seconds:.0f} s"
            raise StoreUnavailableError(message) from exc


def _role(key: str) -> str:
    """The name of a role: keys have names of models, which may be long."""
    return f"version:{hashlib.sha256(key.encode()).hexdigest()}"
