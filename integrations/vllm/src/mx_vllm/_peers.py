"""Loads from other workers of vLLM that hold the same tensors; storage is not asked for a weight."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from attrs import frozen

from modelexpress_core import PluginManager
from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Skipped
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.errors import ModelExpressError, ResolveError
from modelexpress_core.loader import Loader
from modelexpress_core.loads.targets import Target
from modelexpress_core.placement.destinations import Destinations
from modelexpress_core.report import LoadReport

__all__ = ["PeerResult", "load_from_peers"]

_log = logging.getLogger("vllm.modelexpress")

#: Time between two searches of a worker that may read from no other place.
_POLL_SECONDS = 1.0

#: Places that were left out, of which the reason is told.
_MOST_REASONS = 3

#: Memory of loads whose reads could not be stopped: it may still be written to, so it is not free until the end of the
#: process.
_written_to: list[Mapping[str, torch.Tensor]] = []


@frozen
class PeerResult:
    """How a load from other workers ended.

    Attributes:
        report: The report; None if nothing was loaded.
        reason: Why nothing was loaded.
        touched: Whether a byte of the destination may have been written.
    """

    report: LoadReport | None = None
    reason: str = ""
    touched: bool = False


class NoWorkerError(ResolveError):
    """No worker holds the same tensors."""


class _OnlyWorkers(Loader):
    """A loader that reads from workers alone, when its turn has come."""

    @contextmanager
    def in_turn(self, request: LoadRequest) -> Iterator[None]:  # noqa: ARG002 - the loader's signature
        """Wait for nobody: all ranks have waited together."""
        yield

    def candidates(self, request: LoadRequest) -> tuple[Candidate, ...]:
        """Return the workers that rank before the checkpoint."""
        ranked = super().candidates(request)
        workers = tuple(itertools.takewhile(lambda candidate: candidate.is_peer, ranked))
        if not workers:
            message = "no worker has the same tensors"
            raise NoWorkerError(message)
        return workers


class _Written(Target):
    """Run-time tensors, and whether any load has ever written to them."""

    written = False

    def touch(self) -> None:
        self.written = True
        super().touch()


def load_from_peers(
    tensors: Mapping[str, torch.Tensor],
    uri: str,
    identity: SourceIdentity,
    *,
    worker_rank: int,
    plugins: PluginManager,
    wait_seconds: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], Any] = time.sleep,
) -> PeerResult:
    """Load from workers with an equal identity; never raises for what a worker or the network does.

    Args:
        tensors: What is written, by name.
        uri: The checkpoint that tells the content version, if the identity has none.
        identity: The identity of the tensors once they are loaded.
        worker_rank: Rank of the part of the model.
        plugins: Plugins to use.
        wait_seconds: How long to look again while no worker could be read.
        clock: A monotonic clock, in seconds.
        pause: Waits for some seconds.
    """
    deadline = clock() + wait_seconds
    while True:
        result = _attempt(tensors, uri, identity, worker_rank, plugins)
        if result.report is not None or result.touched or clock() >= deadline:
            return result
        pause(min(_POLL_SECONDS, max(0.0, deadline - clock())))


def _attempt(
    tensors: Mapping[str, torch.Tensor], uri: str, identity: SourceIdentity, worker_rank: int, plugins: PluginManager
) -> PeerResult:
    skipped: list[Skipped] = []
    destination: _Written | None = None
    loader = _OnlyWorkers(None, plugins)
    try:
        destination = _Written(Destinations(tensors, torch.device("cpu")), strict=True, cast=False)
        request = loader.request(uri, identity=identity, worker_rank=worker_rank)
        request = attrs.evolve(request, on_skipped=skipped.append)
        return PeerResult(loader.load(request, destination))
    except Exception as exc:  # noqa: BLE001 - whatever fails here, storage may succeed
        touched = destination is not None and destination.written
        if touched and not isinstance(exc, loader.try_next):
            _written_to.append(tensors)
        if isinstance(exc, NoWorkerError):
            return PeerResult(reason="; ".join(filter(None, (exc.headline, _reasons(skipped, identity)))))
        return PeerResult(reason=_headline(exc), touched=touched)


def _headline(exc: BaseException) -> str:
    return exc.headline if isinstance(exc, ModelExpressError) else f"{type(exc).__name__}: {exc}"


def _reasons(skipped: list[Skipped], identity: SourceIdentity) -> str:
    """Return why workers and discoveries were left out, on one line."""
    skipped = [each for each in skipped if each.peer is not None or _is_discovery(each.place)]
    told = []
    for each in skipped[:_MOST_REASONS]:
        reasons = list(each.reasons)
        if each.identity is not None:
            # The request that was searched for has the content version of the checkpoint, which is not known here.
            found = each.identity.differences(identity.with_content_version(each.identity.content_version))
            different = ", ".join(
                f"{name} is {theirs or 'empty'}, not {ours or 'empty'}" for name, (theirs, ours) in found.items()
            )
            reasons.insert(0, f"it holds something else: {different or 'other content'}")
        told.append(f"{each.place} is not read, because {'; '.join(reasons)}")
    more = len(skipped) - len(told)
    return "; ".join(told) + (f"; and {more} more" if more > 0 else "")


def _is_discovery(place: str) -> bool:
    """Return whether a place without a worker is a discovery, or all of them; else it is the server's cache."""
    return place == "other workers" or ("://" in place and not place.startswith(("mx://", "mxs://")))
