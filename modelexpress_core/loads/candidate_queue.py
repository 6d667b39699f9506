"""The candidates of one load, best first, without those that failed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Peer
from modelexpress_core.errors import InvalidURIError

__all__ = ["CandidateQueue", "peer_of"]


class CandidateQueue:
    """The candidates that were not tried yet. Thread-safe: a load takes more workers from it while it reads.

    Args:
        candidates: All candidates, best first.
        request: The request of the load.
    """

    def __init__(self, candidates: Sequence[Candidate], request: LoadRequest) -> None:
        self._request = request
        self._lock = threading.Lock()
        self._ranks = {id(candidate): number for number, candidate in enumerate(candidates)}
        self._left = list(candidates)

    def __len__(self) -> int:
        """Return how many are left."""
        with self._lock:
            return len(self._left)

    def take(self) -> Candidate:
        """Remove the best candidate, and return it."""
        with self._lock:
            return self._left.pop(0)

    def take_worker(self, is_wanted: Callable[[Candidate], bool]) -> Candidate | None:
        """Remove the best wanted worker, and return it; None if there is none.

        Workers that rank below a checkpoint are left: the checkpoint is to be read before them.
        """
        with self._lock:
            for number, candidate in enumerate(self._left):
                if not candidate.is_peer:
                    return None
                if is_wanted(candidate):
                    return self._left.pop(number)
            return None

    def put_back(self, candidate: Candidate) -> None:
        """Return a candidate to its place in the order."""
        with self._lock:
            self._left.append(candidate)
            self._left.sort(key=lambda each: self._ranks[id(each)])

    def drop_worker(self, failed: Candidate) -> None:
        """Remove the worker of a candidate that failed, whichever transport reads it."""
        worker_id = peer_of(failed, self._request).worker_id
        if not worker_id:
            return
        with self._lock:
            self._left = [
                each for each in self._left if not each.is_peer or peer_of(each, self._request).worker_id != worker_id
            ]


def peer_of(candidate: Candidate, request: LoadRequest) -> Peer:
    """Return the peer of a candidate, by default as its URI names it: ``<transport>://<endpoint>/<source>/<worker>``.

    Raises:
        InvalidURIError: It names no source, and the request has no identity.
    """
    if candidate.peer is not None:
        return candidate.peer
    source_id, _, worker_id = candidate.uri.path.partition("/")
    if not source_id:
        if request.identity is None:
            message = f"{candidate.uri} does not name the source and the worker to read"
            raise InvalidURIError(
                message, hint="write <transport>://<host>:<port>/<source id>/<worker id>; `mx sources` shows both"
            )
        source_id = request.identity.source_id
    return Peer(source_id=source_id, worker_id=worker_id, worker_rank=request.worker_rank)
