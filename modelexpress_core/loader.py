"""The story of a load: a ranked list of candidates, each opened, fetched and completed, or aborted for the next.

1. **Candidates.** ``mx_rewrite_uri`` may replace the requested URI. If the request has an identity, discoveries find
   workers that hold the model. ``mx_rank_candidates`` ranks all candidates, best first. The scheme of each selects the
   plugin.
   Where workers that start together read storage once (``MX_FOLLOW``), the load first waits for its turn.
2. **Open.** A checkpoint: headers only, in parallel. A peer: the layouts of its tensors, and a lease. The load compares
   either with the destination. No weight byte has moved.
3. **Fetch.** From here on the destination is *touched*. Bytes go straight into place. A load from a peer takes more
   peers of the same tensors from the candidates, reads from several at once, and goes on while one of them is left.
4. **Complete.** Every planned byte has arrived, digests are right, peers confirm their leases, and every destination
   was written; otherwise the load raises.
5. **Abort.** Nothing writes to the destination any more. If it is untouched, or can be initialized again, the next
   candidate follows; otherwise the caller gets the error.

The two kinds of load are ``loads.checkpoint`` and ``loads.peer``; what is written is a ``loads.destination``.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import attrs

from modelexpress_core.checkpoint import Checkpoint
from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Tier
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.errors import BackendError, CheckpointError, ModelExpressError, PluginLoadError, ResolveError
from modelexpress_core.loads.candidate_queue import CandidateQueue
from modelexpress_core.loads.checkpoint import CheckpointLoad, Headers
from modelexpress_core.loads.context import LoadContext
from modelexpress_core.loads.destination import Destination, DestinationTouchedError
from modelexpress_core.loads.load import Load
from modelexpress_core.plugins import STORAGE
from modelexpress_core.report import LoadReport
from modelexpress_core.settings import from_env
from modelexpress_core.sources.discovery import find_candidates
from modelexpress_core.sources.server_cache import streamed_candidate
from modelexpress_core.sources.settings import FollowSettings
from modelexpress_core.uri import ModelURI

if TYPE_CHECKING:
    from modelexpress_core.sources.following import Turn

__all__ = ["Loader"]

_log = logging.getLogger(__name__)
_R = TypeVar("_R")


class Loader(LoadContext):
    """Finds candidates and loads from them, with the settings and plugins of one call.

    Attributes:
        try_next: Errors after which the next candidate may succeed.
    """

    try_next = (BackendError, CheckpointError, ResolveError, PluginLoadError)

    def request(
        self,
        uri: str | os.PathLike[str] | ModelURI,
        *,
        identity: SourceIdentity | None = None,
        worker_rank: int = 0,
        reader: str = "",
    ) -> LoadRequest:
        """Return the request of a load; plugins may rewrite its URI.

        Args:
            uri: The checkpoint.
            identity: The model as it will be in memory, by which discoveries find workers that hold it; None to use no
                discovery.
            worker_rank: Rank of the part that is needed.
            reader: Name of the reader, see ``LoadRequest``.

        Raises:
            InvalidURIError: ``uri`` is not valid.
        """
        return LoadRequest(self.plugins.rewrite_uri(ModelURI.parse(uri), self.environ), identity, worker_rank, reader)

    def candidates(self, request: LoadRequest) -> tuple[Candidate, ...]:
        """Return the candidates to try, best first.

        Raises:
            ResolveError: A plugin dropped them all.
            SettingsError: A variable that configures discoveries is not valid.
        """
        ranked = find_candidates(self.plugins, self.environ, self.with_content_version(request))
        if not ranked:
            message = f"no candidate is left for {request.uri}: a plugin's mx_rank_candidates dropped them all"
            raise ResolveError(message, hint="disable the plugin with MX_DISABLED_PLUGINS")
        _log.debug("candidates for %s: %s", request.uri, ", ".join(str(candidate.uri) for candidate in ranked))
        return ranked

    def first(
        self, request: LoadRequest, attempt: Callable[[Candidate], _R], destination: Destination | None = None
    ) -> _R:
        """Call ``attempt`` on candidates until it succeeds, and return its result; raise the last error otherwise.

        Args:
            request: The request.
            attempt: Tries one candidate.
            destination: Destination of the attempt, prepared for the next candidate after a failure; None if the
                attempt only reads.
        """
        return self._first(request, lambda candidate, _: attempt(candidate), destination)

    def _first(
        self,
        request: LoadRequest,
        attempt: Callable[[Candidate, CandidateQueue], _R],
        destination: Destination | None,
    ) -> _R:
        """As ``first``, for an attempt that may take more workers from the other candidates."""
        left = CandidateQueue(self.candidates(request), request)
        while True:
            candidate = left.take()
            try:
                return attempt(candidate, left)
            except self.try_next as exc:
                if self._ends_load(candidate, exc):
                    raise
                self._drop_failed(left, candidate, exc)
                if not left:
                    raise
                if destination is not None:
                    _prepare_for_next(destination, exc)
                # Without a server's cache a load is as it would be: one line says so.
                reason = exc.headline if candidate.tier is Tier.CACHE and candidate.origin != "caller" else exc
                _log.warning("trying the next candidate, because loading from %s failed: %s", candidate.uri, reason)

    def load(self, request: LoadRequest, destination: Destination) -> LoadReport:
        """Load into ``destination`` from the first candidate that succeeds."""
        request, headers = self._identified(request)
        with self.in_turn(request):
            return self._load(request, headers, destination)

    @contextlib.contextmanager
    def in_turn(self, request: LoadRequest) -> Iterator[Turn | None]:
        """Wait for the turn of ``request`` among the workers that load the same, if MX_FOLLOW is set.

        Yields:
            How the wait ended; None if the load waits for nobody.
        """
        names_checkpoint = request.uri.scheme in self.plugins.table(STORAGE).schemes
        if request.identity is None or not names_checkpoint or from_env(FollowSettings, self.environ).seconds is None:
            yield None
            return
        try:
            from modelexpress_core.sources.following import in_turn  # needs gRPC, which loads of files do without
        except ModuleNotFoundError as exc:
            _log.warning(
                "MX_FOLLOW has no effect, because %s is not installed: install modelexpress-core[grpc]", exc.name
            )
            yield None
            return
        with in_turn(self.environ, request) as turn:
            yield turn

    def _load(self, request: LoadRequest, headers: Headers | None, destination: Destination) -> LoadReport:
        def attempt(candidate: Candidate, left: CandidateQueue) -> LoadReport:
            with self._new_load(candidate, request, destination, left, headers) as load:
                load.open()
                load.fetch()
                return load.complete()

        return self._first(request, attempt, destination)

    def open_checkpoint(self, request: LoadRequest, destination: Destination) -> CheckpointLoad:
        """Return a load of the first candidate that opens, for code that copies from it in a ``with`` block."""

        def attempt(candidate: Candidate) -> CheckpointLoad:
            with contextlib.ExitStack() as opened:
                load = opened.enter_context(CheckpointLoad(candidate, self, destination))
                load.open()
                opened.pop_all()
                return load

        return self.first(request, attempt, destination)

    def open_headers(self, candidate: Candidate) -> Checkpoint:
        """Return the checkpoint at ``candidate``, without a load."""
        registered, storage = self.plugins.open(STORAGE, candidate.uri, self.environ)
        with contextlib.closing(storage):
            return self.read_headers(candidate.uri, registered, storage, self.new_budget())

    def with_content_version(self, request: LoadRequest) -> LoadRequest:
        """Return ``request`` with the version of the checkpoint in its identity; without identity if it is unknown."""
        return self._identified(request)[0]

    def _identified(self, request: LoadRequest) -> tuple[LoadRequest, Headers | None]:
        """``request`` with the version of the checkpoint in its identity; without identity if it cannot be told.

        A worker whose content is unknown must not be read. If the headers of the checkpoint were read, a load of it
        need not read them again.
        """
        identity, table = request.identity, self.plugins.table(STORAGE)
        if identity is None or identity.content_version:
            return request, None
        # A worker that streams from the server's cache may have no way to the source, which the cache knows.
        cached = streamed_candidate(self.plugins, self.environ, request)
        places = [candidate.uri for candidate in (cached, Candidate(request.uri)) if candidate is not None]
        places = [uri for uri in places if uri.scheme in table.schemes]
        if not places:
            return request, None
        headers = None
        reason = "its storage has no versions that other machines see too"
        for uri in places:
            try:
                if table.lookup(uri.scheme).provider.capabilities.global_versions:
                    headers = self._read_headers(uri)
            except ModelExpressError as exc:  # the load that tries the candidate reports it
                reason = str(exc)
                continue
            version = None if headers is None else headers.checkpoint.content_version
            if version is not None:
                return attrs.evolve(request, identity=identity.with_content_version(version)), headers
        _log.info("no worker is asked for %s, since its content version cannot be told: %s", request.uri, reason)
        hint = "give own_identity a content_version= of your own on both sides"
        request.skip("other workers", f"the content version of {request.uri} cannot be told: {reason}", hint)
        return attrs.evolve(request, identity=None), headers

    def _read_headers(self, uri: ModelURI) -> Headers:
        registered, storage = self.plugins.open(STORAGE, uri, self.environ)
        seconds: list[float] = []
        with contextlib.closing(storage):
            checkpoint = self.read_headers(
                uri, registered, storage, self.new_budget(), on_read=lambda taken, _whole: seconds.append(taken)
            )
        return Headers(checkpoint, min(seconds, default=None))

    def _ends_load(self, candidate: Candidate, exc: Exception) -> bool:
        """Whether no other candidate is tried: what fails is a plugin that the user named, or no place at all."""
        if isinstance(exc, PluginLoadError):  # one that only a discovery needs ends no load
            return candidate.origin == "caller"
        return not isinstance(exc, self.try_next)

    @staticmethod
    def _drop_failed(left: CandidateQueue, candidate: Candidate, exc: Exception) -> None:
        """Drop those that need no attempt after ``candidate`` failed: over another transport it is the same worker."""
        if isinstance(exc, BackendError) and exc.peer_at_fault and candidate.is_peer:
            left.drop_worker(candidate)

    def _new_load(
        self,
        candidate: Candidate,
        request: LoadRequest,
        destination: Destination,
        left: CandidateQueue,
        headers: Headers | None = None,
    ) -> Load:
        if candidate.is_peer:
            from modelexpress_core.loads.peer import PeerLoad  # needs gRPC, which loads of files do without

            return PeerLoad(candidate, self, destination, request, left)
        known = headers if headers is not None and headers.checkpoint.uri == candidate.uri else None
        return CheckpointLoad(candidate, self, destination, known)


def _prepare_for_next(destination: Destination, exc: Exception) -> None:
    """Prepare ``destination`` for the next candidate; raise ``exc`` if that is not possible."""
    try:
        destination.prepare_for_next()
    except DestinationTouchedError:
        raise exc from exc.__cause__
