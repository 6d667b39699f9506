"""Why a load would read from a place, or would not: each candidate in order, and each place that was left out.

The loader finds the candidates and opens them as a load does. Discoveries, trust, ranking and the loader itself say why
they leave a place out. No weight byte moves, and leases are released at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import attrs
from attrs import field, frozen

from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Peer, Skipped
from modelexpress_core.contracts.identity import CONTENT_KEY, SourceIdentity
from modelexpress_core.errors import ModelExpressError, ResolveError
from modelexpress_core.loader import Loader
from modelexpress_core.loads.candidate_queue import CandidateQueue
from modelexpress_core.messages import hide_credentials, listed
from modelexpress_core.plugins import STORAGE, TRANSPORT, PluginManager
from modelexpress_core.resources import start_thread
from modelexpress_core.sources.discovery import find_candidates
from modelexpress_core.uri import ModelURI, worker_endpoint

if TYPE_CHECKING:
    import torch
    from torch import nn

    from modelexpress_core.checkpoint import Checkpoint
    from modelexpress_core.loads.destination import Destination

__all__ = ["Explanation", "Place", "explain"]

_T = TypeVar("_T")
_R = TypeVar("_R")

#: Workers that are opened, all at the same time. The others are listed as next.
_MAX_OPENED_WORKERS = 8

#: Workers that are asked whether they answer: how many at the same time, and for how long.
_THREADS = 16
_ANSWER_SECONDS = 3.0

_IDENTITY_DEFAULTS = SourceIdentity("")


@frozen
class Place:
    """A place that weights may come from.

    Attributes:
        place: Redacted URI, or a text that names it.
        status: ``"chosen"``: a load reads it. ``"next"``: a load reads it if those before it fail. ``"possible"``: a
            worker with an equal identity reads it; this one did not say its own. ``"unusable"``: no load reads it.
        reason: Why.
        hint: What to do, if it is unusable; may be empty.
        worker_id: The worker; empty for other places.
        source_id: What the worker holds.
        worker_rank: Its rank; None for other places.
        identity: What the worker published of its identity, if that differs or is not compared.
        differences: Fields of the identity that differ: name, what the worker has, what is needed.
        tensors: Tensors of a checkpoint; None if unknown, as below.
        files: Files of a checkpoint.
        bytes: Bytes of the tensors of a checkpoint.
        content_version: Content version of a checkpoint; empty if it has none that other machines see.
    """

    place: str
    status: Literal["chosen", "next", "possible", "unusable"]
    reason: str
    hint: str = ""
    worker_id: str = ""
    source_id: str = ""
    worker_rank: int | None = None
    identity: Mapping[str, str] = field(factory=dict)
    differences: Sequence[tuple[str, str, str]] = ()
    tensors: int | None = None
    files: int | None = None
    bytes: int | None = None
    content_version: str = ""


@frozen
class Explanation:
    """What a load would do.

    Attributes:
        uri: Redacted URI of the load, after ``mx_rewrite_uri``.
        model_name: Name of the model whose workers were looked for; empty if none were.
        worker_rank: Rank of the part that is needed.
        places: First the candidates in the order of attempts, then the places that were left out.
        error: What the load would raise; None if it can read from a place.
    """

    uri: str
    model_name: str
    worker_rank: int
    places: tuple[Place, ...]
    error: ModelExpressError | None = field(default=None, eq=False)

    @property
    def usable(self) -> bool:
        """Whether a load can read from a place."""
        return self.error is None

    @property
    def chosen(self) -> Place | None:
        """The place that a load reads; None if there is none."""
        return next((place for place in self.places if place.status == "chosen"), None)

    def to_dict(self) -> dict[str, Any]:
        """The explanation as plain data, for JSON."""
        without_error = attrs.asdict(self, filter=lambda attribute, _: attribute.name != "error")
        error = None if self.error is None else {"type": type(self.error).__name__, "message": str(self.error)}
        return {**without_error, "usable": self.usable, "error": error}


def explain(
    uri: str | os.PathLike[str] | ModelURI,
    target: nn.Module | Mapping[str, torch.Tensor] | None = None,
    identity: SourceIdentity | None = None,
    *,
    model_name: str = "",
    content_version: str = "",
    worker_rank: int = 0,
    strict: bool = True,
    cast: bool = False,
    device: str | torch.device = "cpu",
    environ: Mapping[str, str] | None = None,
    plugins: PluginManager | None = None,
) -> Explanation:
    """Return where a load would read from, in which order, and why it would not read from other places.

    The places are opened as ``load_into`` with the same arguments opens them: headers are read, layouts compared, and
    leases taken and released. No weight byte moves.

    Args:
        uri: The URI of the load.
        target: A module, or tensors by name; without them, places are opened and not compared.
        identity: The model as it will be in the memory of ``target``; see ``own_identity``.
        model_name: If there is no ``identity``: lists the workers of this model, and what is known of their identities.
        content_version: With ``model_name``: the content that workers must hold, if ``uri`` does not tell it.
        worker_rank: Rank of the part of the model that ``target`` is.
        strict: As in ``load_into``.
        cast: As in ``load_into``.
        device: As in ``load_into``.
        environ: Variables to read settings from; by default the process's.
        plugins: Plugins to use; by default all that are installed and allowed.

    Raises:
        InvalidURIError: ``uri`` is not valid.
        SettingsError: A variable is not valid.
        PlacementError: ``target`` has no tensors that a load can write.
    """
    examiner = _Examiner(environ, plugins)
    partial = identity is None and bool(model_name)
    if partial:
        identity = SourceIdentity(model_name)
        identity = identity.with_content_version(content_version) if content_version else identity
    request = examiner.request(uri, identity=identity, worker_rank=worker_rank)
    destination: Destination | None = None
    if target is not None:
        from modelexpress_core.loads.targets import Target
        from modelexpress_core.placement.destinations import Destinations
        from modelexpress_core.placement.devices import device_with_memory

        destination = Target(Destinations(target, device_with_memory(device)), strict=strict, cast=cast)
    return examiner.explain(request, destination, partial=partial)


class _Examiner(Loader):
    """A loader that opens each candidate, and goes no further."""

    def __init__(self, environ: Mapping[str, str] | None, plugins: PluginManager | None) -> None:
        super().__init__(environ, plugins)
        self.plugins = self.plugins.without_observers()

    def explain(self, request: LoadRequest, destination: Destination | None, *, partial: bool) -> Explanation:
        """Return what a load with ``request`` would do; ``partial`` if its identity is no more than a name."""
        skipped: list[Skipped] = []
        request = attrs.evolve(request, on_skipped=skipped.append)
        if request.identity is None:
            hint = "pass identity=own_identity(...); `mx explain --model NAME` lists the workers of a model"
            request.skip("other workers", "the load has no identity to find them by", hint)
        resolved = self.with_content_version(request)
        if partial and resolved.identity is None:  # its workers are shown, and none of them is read
            resolved = attrs.evolve(resolved, identity=request.identity)
        places: list[Place] = []
        error: ModelExpressError | None = None
        try:
            ranked = find_candidates(self.plugins, self.environ, resolved) if partial else self.candidates(resolved)
        except ResolveError as exc:
            error = exc
        else:
            places, error = self._attempts(ranked, resolved, destination)
        places += _in_threads(lambda each: self._left_out(each, resolved, partial=partial), tuple(skipped), _THREADS)
        name = "" if request.identity is None else request.identity.model_name
        return Explanation(str(request.uri), hide_credentials(name), request.worker_rank, tuple(places), error)

    def _attempts(
        self, ranked: Sequence[Candidate], request: LoadRequest, destination: Destination | None
    ) -> tuple[list[Place], ModelExpressError | None]:
        """Return the candidates in order, and the error of a load that reads none of them."""
        workers = [candidate for candidate in ranked if candidate.is_peer]
        opened = [each for each in ranked if not each.is_peer or each in workers[:_MAX_OPENED_WORKERS]]
        answers = _in_threads(lambda each: self._opened(each, request, destination), opened, _MAX_OPENED_WORKERS)
        results = dict(zip(opened, answers, strict=True))
        found: dict[Candidate, Place] = {}
        chosen = False
        error: ModelExpressError | None = None
        left = CandidateQueue(ranked, request)
        while left:
            candidate = left.take()
            result = results.get(candidate)
            if isinstance(result, Place):
                found[candidate] = attrs.evolve(result, status="next" if chosen else "chosen")
                chosen = True
            elif result is None:
                reason = f"it is not asked here: at most {_MAX_OPENED_WORKERS} workers are"
                found[candidate] = attrs.evolve(_place_of(candidate), status="next", reason=reason)
            else:
                found[candidate] = attrs.evolve(_place_of(candidate), reason=result.headline, hint=result.hint or "")
                self._drop_failed(left, candidate, result)
                error = result
                if not chosen and self._ends_load(candidate, result):
                    break
        rest = "it is a worker that was at fault, over another transport"
        if left:
            rest = f"a load ends before it, with {type(error).__name__}"
        places = [found.get(each) or attrs.evolve(_place_of(each), reason=rest) for each in ranked]
        return places, None if chosen else error

    def _opened(
        self, candidate: Candidate, request: LoadRequest, destination: Destination | None
    ) -> Place | ModelExpressError:
        """Return the candidate as it was found, or why it cannot be read."""
        try:
            if not candidate.is_peer:
                checkpoint = self.open_headers(candidate)
                if destination is not None:
                    destination.check_checkpoint(checkpoint)
                table = self.plugins.table(STORAGE)
                version = table.lookup(candidate.uri.scheme).provider.capabilities.global_versions
                return _place_with(checkpoint, candidate, (version and checkpoint.content_version) or "")
            if destination is None:
                self._reach(candidate.uri, candidate.peer, request)
                reason = "it answers; its tensors are not compared, because no model was given"
            else:
                self._new_load(candidate, request, destination, CandidateQueue((), request), None).probe()
                reason = "it answers, its tensors have the layout of the model, and it grants a lease"
        except ModelExpressError as exc:
            return exc
        if candidate.origin != "caller" and candidate.peer is not None:
            reason = f"its identity is equal, {reason}"
        return attrs.evolve(_place_of(candidate), reason=reason)

    def _reach(self, uri: ModelURI, peer: Peer | None, request: LoadRequest) -> None:
        """Ask the worker at ``uri`` for its manifest: this proves that it is alive, holds the source and allows reads.

        Raises:
            ModelExpressError: It cannot be asked, or refuses.
        """
        from modelexpress_core.sources.worker_client import WorkerClient

        self.plugins.table(TRANSPORT).lookup(uri.scheme)
        source_id, _, worker_id = uri.path.partition("/")
        if not source_id and request.identity is not None:
            source_id = request.identity.source_id
        server = "" if peer is None else peer.server
        try:
            worker = WorkerClient.from_env(
                self.environ, url=worker_endpoint(uri), server=server, deadline_seconds=_ANSWER_SECONDS
            )
            with worker:
                worker.manifest(source_id, worker_id or None)
        except ModelExpressError as exc:
            exc.hint = exc.hint or "check that the worker runs"
            raise

    def _left_out(self, skipped: Skipped, request: LoadRequest, *, partial: bool) -> Place:
        """Return a place that is no candidate."""
        place = Place(skipped.place, "unusable", "; ".join(skipped.reasons), skipped.hint)
        if skipped.peer is not None:
            place = attrs.evolve(
                place,
                worker_id=skipped.peer.worker_id,
                source_id=skipped.peer.source_id,
                worker_rank=skipped.peer.worker_rank,
            )
        if skipped.identity is None or request.identity is None:
            return place
        found = skipped.identity.differences(request.identity)
        if partial:  # no more is known of the identity here than the name, and the content of the URI
            known = {"model_name", *((CONTENT_KEY,) if request.identity.content_version else ())}
            found = {name: values for name, values in found.items() if name in known}
        differences = [(name, theirs, ours) for name, (theirs, ours) in found.items()]
        place = attrs.evolve(place, differences=differences, identity=_described(skipped.identity))
        if differences:
            shown = listed(
                [f"{name} is {theirs or 'empty'}, not {ours or 'empty'}" for name, theirs, ours in differences]
            )
            return attrs.evolve(place, reason="; ".join([f"it holds something else: {shown}", *skipped.reasons]))
        return place if skipped.reasons or not partial else self._possible(place, skipped, request)

    def _possible(self, place: Place, skipped: Skipped, request: LoadRequest) -> Place:
        """Return a worker that differs in nothing that is known, with whether it can be reached."""
        error: ModelExpressError | None = None
        for uri in skipped.uris:
            try:
                self.plugins.table(TRANSPORT).lookup(uri.scheme)
            except ModelExpressError as exc:
                error = error or exc
                continue
            place = attrs.evolve(place, place=str(uri))
            try:
                self._reach(uri, skipped.peer, request)
            except ModelExpressError as exc:  # its other transports have the same address
                error = exc
                break
            return attrs.evolve(place, status="possible", reason="it answers; a worker with an equal identity reads it")
        return place if error is None else attrs.evolve(place, reason=error.headline, hint=error.hint or "")


def _place_of(candidate: Candidate) -> Place:
    place = Place(str(candidate.uri), "unusable", "")
    if candidate.peer is None:
        return place
    peer = candidate.peer
    return attrs.evolve(place, worker_id=peer.worker_id, source_id=peer.source_id, worker_rank=peer.worker_rank)


def _place_with(checkpoint: Checkpoint, candidate: Candidate, content_version: str) -> Place:
    named = "it is the URI of the load" if candidate.origin == "caller" else f"{candidate.origin} names it"
    return attrs.evolve(
        _place_of(candidate),
        reason=f"{named}, and its headers can be read with {checkpoint.provider}",
        tensors=len(checkpoint.tensors),
        files=len(checkpoint.files),
        bytes=checkpoint.tensor_bytes,
        content_version=content_version,
    )


def _described(identity: SourceIdentity) -> Mapping[str, str]:
    """What an identity says beyond the defaults."""
    return {name: here for name, (here, _) in identity.differences(_IDENTITY_DEFAULTS).items()}


def _in_threads(call: Callable[[_T], _R], items: Sequence[_T], most: int) -> list[_R]:
    """Return what ``call`` returns for each item; ``most`` calls run at once.

    An interruption does not wait for calls under way, as an executor of Python would.
    """
    results: list[_R | None] = [None] * len(items)
    errors: list[BaseException] = []
    left = iter(range(len(items)))
    lock = threading.Lock()
    ended = threading.Semaphore(0)

    def run() -> None:
        try:
            while (number := _next(left, lock)) is not None:
                results[number] = call(items[number])
        except BaseException as exc:  # noqa: BLE001 - raised to the caller
            errors.append(exc)
        finally:
            ended.release()

    threads = min(most, len(items))
    for _ in range(threads):
        start_thread(threading.Thread(target=run, name="mx-explain", daemon=True), "look at places")
    for _ in range(threads):
        ended.acquire()
    if errors:
        raise errors[0]
    return cast("list[_R]", results)


def _next(numbers: Iterator[int], lock: threading.Lock) -> int | None:
    with lock:
        return next(numbers, None)
