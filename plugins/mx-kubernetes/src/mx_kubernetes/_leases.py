"""Roles of servers as ``Lease`` objects of Kubernetes, each with a token that grows with each change of holder.

No clocks of two servers are compared: a server takes a role over only after it has seen the object unchanged for as
long as the lease lasts, on its own clock. Each write names the version that it replaces, so that of two servers one
succeeds. The object lasts twice as long as the holder asks for, and is written again when half of that is used up: a
holder that renews its role three times in the meantime writes once.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import math
import time

from attrs import frozen

from modelexpress_core.contracts.metadata_store import LeaderLease, StoreUnavailableError
from mx_kubernetes._client import Kubernetes, Object
from mx_kubernetes._errors import ApiError
from mx_kubernetes._objects import GROUP, MANAGER, UNREADABLE

__all__ = ["Leases"]

_ROLE, _TOKEN, _DURATION = f"{GROUP}/role", f"{GROUP}/token", f"{GROUP}/duration-seconds"
_FACTOR = 2.0
_MAX_TOKEN = (1 << 63) - 1
_TRIES = 3

#: Roles whose objects are remembered.
_MAX_SEEN = 10_000

#: Leases that nobody renewed for so long are removed: each version of a model that was ever cached has one.
_REMOVED_AFTER_SECONDS = 7 * 86_400


@frozen
class _Held:
    """A lease that a holder of this server has.

    Attributes:
        lease: The lease.
        manifest: Its object, as it was last written.
        until: When it ends for this server, on the monotonic clock.
    """

    lease: LeaderLease
    manifest: Object
    until: float


@frozen
class _Seen:
    """A version of an object, and when it was first seen, on the monotonic clock."""

    version: str
    since: float


class Leases:
    """The leases in one namespace.

    Args:
        api: The API server.
        namespace: The namespace.
    """

    def __init__(self, api: Kubernetes, namespace: str) -> None:
        self._api = api
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._held: dict[tuple[str, str], _Held] = {}
        self._seen: dict[str, _Seen] = {}

    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        """Take or renew the lease of ``role``; None if another holder has it.

        Raises:
            ApiError: The API server does not answer.
        """
        held = self._held.get((role, holder))
        begun = time.monotonic()
        if held is not None and held.until - begun >= seconds:
            return held.lease
        duration = _FACTOR * seconds
        manifest = None if held is None else held.manifest
        for _ in range(_TRIES):
            if manifest is None:
                manifest = await self._read(role)
            lease = _lease_of(role, manifest)
            if (
                manifest is not None
                and (lease is None or lease.holder != holder)
                and not self._has_ended(role, manifest)
            ):
                self._held.pop((role, holder), None)
                return None
            if lease is None or lease.holder != holder:
                token = max(time.time_ns() // 1_000_000, lease.token if lease else 0) + 1
                taken = LeaderLease(role, holder, min(token, _MAX_TOKEN))
            else:
                taken = lease
            begun = time.monotonic()
            try:
                written = await self._write(taken, duration, manifest)
            except ApiError as exc:
                if exc.status not in {404, 409}:
                    raise
                manifest = None  # another server was faster, or somebody removed the object
                self._held.pop((role, holder), None)
                continue
            self._held[role, holder] = _Held(taken, written, begun + duration)
            return taken
        message = f"Kubernetes: the lease of the role {role} changes at each try"
        raise StoreUnavailableError(message)

    async def leader(self, role: str) -> LeaderLease | None:
        """The lease of the last one that had ``role``; None if nobody had it.

        Raises:
            ApiError: The API server does not answer.
        """
        return _lease_of(role, await self._read(role))

    async def remove_old(self) -> None:
        """Remove leases that nobody has renewed for days. Tokens grow with the clock, so that none comes back.

        Raises:
            ApiError: The API server does not answer.
        """
        query: dict[str, str | int] = {"labelSelector": f"app.kubernetes.io/managed-by={MANAGER}", "limit": 500}
        listed = await self._api.request("GET", self._path, operation="list leases", query=query)
        before = _micro_time(time.time() - _REMOVED_AFTER_SECONDS)
        for each in listed.get("items") or ():
            renewed = each.get("spec", {}).get("renewTime")
            if isinstance(renewed, str) and renewed < before:
                metadata = each["metadata"]
                conditions = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
                try:
                    await self._api.request(
                        "DELETE",
                        f"{self._path}/{metadata['name']}",
                        operation="delete a lease",
                        body={"preconditions": conditions},
                    )
                except ApiError as exc:
                    if exc.status not in {404, 409}:
                        raise

    async def _read(self, role: str) -> Object | None:
        try:
            return await self._api.request("GET", f"{self._path}/{_name(role)}", operation="get a lease")
        except ApiError as exc:
            if exc.status != 404:
                raise
            return None

    async def _write(self, lease: LeaderLease, duration: float, manifest: Object | None) -> Object:
        now = _micro_time(time.time())
        spec = {} if manifest is None else dict(manifest.get("spec") or {})
        if spec.get("holderIdentity") != lease.holder:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = min(int(spec.get("leaseTransitions") or 0) + 1, (1 << 31) - 1)
        spec.update(holderIdentity=lease.holder, leaseDurationSeconds=math.ceil(duration), renewTime=now)
        metadata: Object = {"name": _name(lease.role)} if manifest is None else dict(manifest["metadata"])
        metadata["labels"] = {**(metadata.get("labels") or {}), "app.kubernetes.io/managed-by": MANAGER}
        ours = {_ROLE: lease.role, _TOKEN: str(lease.token), _DURATION: repr(duration)}
        metadata["annotations"] = {**(metadata.get("annotations") or {}), **ours}
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
        if manifest is None:
            return await self._api.request("POST", self._path, operation="create a lease", body=body)
        path = f"{self._path}/{metadata['name']}"
        return await self._api.request("PUT", path, operation="update a lease", body=body)

    def _has_ended(self, role: str, manifest: Object) -> bool:
        """Whether the object has been the same for as long as the lease lasts."""
        version = str(manifest["metadata"]["resourceVersion"])
        now = time.monotonic()
        seen = self._seen.get(role)
        if seen is None or seen.version != version:
            if len(self._seen) >= _MAX_SEEN:
                self._seen.clear()
            self._seen[role] = _Seen(version, now)
            return False
        return now - seen.since >= _duration_of(manifest)


def _name(role: str) -> str:
    return f"model-express-{hashlib.sha256(role.encode()).hexdigest()[:32]}"


def _lease_of(role: str, manifest: Object | None) -> LeaderLease | None:
    if manifest is None:
        return None
    try:
        annotations, holder = manifest["metadata"]["annotations"], manifest["spec"]["holderIdentity"]
        token = int(annotations[_TOKEN])
        if annotations[_ROLE] != role or not isinstance(holder, str) or not 0 < token <= _MAX_TOKEN:
            return None
    except UNREADABLE:
        return None
    return LeaderLease(role, holder, token) if holder else None


def _duration_of(manifest: Object) -> float:
    try:
        return float(manifest["metadata"]["annotations"][_DURATION])
    except UNREADABLE:
        return 60.0


def _micro_time(seconds: float) -> str:
    at = dt.datetime.fromtimestamp(seconds, dt.timezone.utc)
    return at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
