"""Downloads from another replica of the server, which has a version already or downloads it now."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import attrs

from modelexpress_core.contracts.metadata_store import StoreUnavailableError
from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.copying.puller import Pull
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.loader import Loader
from modelexpress_core.server.cache.places import HUB, Place
from modelexpress_core.server.cache.records import CachedFile
from modelexpress_core.server.replicas import Claim
from modelexpress_core.uri import ModelURI

__all__ = ["DownloadLease", "always", "claim_all", "nearest"]

_log = logging.getLogger(__name__)


class DownloadLease(Protocol):
    """Agrees with the other replicas of a server on who downloads a version."""

    def claim(self, key: str) -> Claim:
        """Claim the version ``key`` for this replica, or learn who has it.

        Raises:
            StoreUnavailableError: The metadata store does not answer.
        """
        ...

    def release(self, key: str) -> None:
        """This replica does not have ``key`` any more."""
        ...


def always() -> bool:
    """Nobody else downloads it."""
    return True


def claim_all(lease: DownloadLease, keys: Iterable[str]) -> None:
    """Claim versions that this replica has."""
    for key in keys:
        try:
            lease.claim(key)
        except StoreUnavailableError as exc:
            _log.warning("the other replicas do not learn which models this one has: %s", exc)
            return


def nearest(
    lease: DownloadLease,
    pull: Pull,
    *,
    loader: Loader,
    place: Place,
    version: str,
    files: Sequence[CachedFile],
    key: str,
) -> tuple[Pull, str, Callable[[], bool]]:
    """The pull from another replica, or ``pull`` from the storage where this replica is to download.

    Without an answer of the metadata store, and if the other replica does not answer, the storage is read once more
    than needed; nobody waits for that.

    Returns:
        The pull, the address of the replica (empty for the storage), and whether this replica still is the one that
        downloads.
    """
    try:
        claim = lease.claim(key)
    except StoreUnavailableError as exc:
        _log.warning("%s is downloaded without asking the other replicas: %s", place.shown, exc)
        return pull, "", always
    if claim.own:
        return pull, "", claim.lasts
    try:
        nearer = _pull_from(claim.holder, pull, loader=loader, place=place, version=version, files=files)
    except ModelExpressError as exc:
        _log.warning("%s is not read from the replica %s: %s", place.shown, claim.holder, exc)
        return pull, "", always
    pull.close()
    return nearer, claim.holder, always


def _pull_from(
    replica: str, pull: Pull, *, loader: Loader, place: Place, version: str, files: Sequence[CachedFile]
) -> Pull:
    """A pull of the files of a version from another replica, compared with the digests of their storage.

    Raises:
        ModelExpressError: It does not have this version.
    """
    server = ModelURI.parse(replica)
    query = {"revision": version} if place.name.startswith(f"{HUB}/") else {}
    # The metadata store names the replica, so that it gets the token of this server.
    address = f"{'https' if server.scheme == 'mxs' else 'http'}://{server.authority}"
    environ = {**loader.environ, "MODEL_EXPRESS_URL": address}
    nearer = pull.like(Loader(environ, loader.plugins), attrs.evolve(server, path=place.name, query=query))
    try:
        chosen = _chosen(dict(nearer.select().files), files, version)
    except BaseException:
        nearer.close()
        raise
    nearer.selection = attrs.evolve(nearer.selection, files=chosen)
    return nearer


def _chosen(
    found: Mapping[str, ObjectInfo], files: Sequence[CachedFile], version: str
) -> tuple[tuple[str, ObjectInfo], ...]:
    """What a replica has of ``files``, with the digests that their storage publishes."""
    chosen = []
    for file in files:
        info = found.get(file.path)
        if info is None or (info.size, info.version) != (file.size, version):
            message = f"it has another version than {version[:12]}"
            raise ModelExpressError(message, hint="the model is downloaded from its storage")
        chosen.append((file.path, attrs.evolve(info, digests=file.digests)))
    return tuple(chosen)
