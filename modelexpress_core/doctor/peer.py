"""The steps of a diagnosis of a worker: whether its tensors can be read, and which way the bytes take."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelexpress_core.contracts.candidates import Candidate, Peer
from modelexpress_core.contracts.transport import ChannelSession, PeerAccess, Transport
from modelexpress_core.doctor.examination import Examination, SkippedError, set_variables
from modelexpress_core.doctor.network import call_with_deadline
from modelexpress_core.doctor.step import Step
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import BackendError, IntegrityError
from modelexpress_core.loader import Loader
from modelexpress_core.loads.candidate_queue import peer_of
from modelexpress_core.messages import printable
from modelexpress_core.plugins import TRANSPORT, PluginManager
from modelexpress_core.providers import TransportProvider
from modelexpress_core.registry import Registered
from modelexpress_core.report import format_bytes
from modelexpress_core.settings import SettingValue, from_env
from modelexpress_core.sources.worker_client import Description, WorkerClient
from modelexpress_core.uri import ModelURI, worker_endpoint
from modelexpress_core.wire.settings import TlsSettings

if TYPE_CHECKING:
    import torch

__all__ = ["PeerExamination"]

#: More tensors, or longer descriptions, than any model has.
_MAX_TENSORS = 1_000_000
_MAX_DESCRIPTION_BYTES = 256 << 20

#: Deadline of what takes several calls, in time-outs of one wait on the network.
_FACTOR = 4


class PeerExamination(Examination):
    """The steps of a load from a worker, up to one chunk of a tensor."""

    def __init__(
        self,
        uri: str | os.PathLike[str] | ModelURI,
        environ: Mapping[str, str] | None,
        plugins: PluginManager | None,
        timeout_seconds: float,
    ) -> None:
        super().__init__(uri, environ, plugins, timeout_seconds)
        self._closing = contextlib.ExitStack()
        self._uri: ModelURI | None = None
        self._peer: Peer | None = None
        self._registered: Registered[TransportProvider] | None = None
        self._transport: Transport | None = None
        self._worker: WorkerClient | None = None
        self._described: Sequence[Description] = ()

    def steps(self) -> Iterator[Step]:
        """Take the steps one by one."""
        yield self._take("settings", self._read_settings)
        yield self._take("uri", self._parse)
        yield self._take("plugin", self._open_plugin)
        yield self._take("name", self._look_up)
        yield self._take("connection", self._connect)
        yield self._take("tls", self._encrypt)
        yield self._take("worker", self._ask)
        yield self._take("read", self._read)

    def close(self) -> None:
        """Close the connections, and wait for them no longer than the time-out."""
        with contextlib.suppress(Exception):
            call_with_deadline(self._timeout, self._closing.close, "close the connections")

    def _open_plugin(self, facts: dict[str, Any]) -> tuple[str, str]:
        loader = Loader(self._given_environ, self._plugins)
        request = loader.request(self._to_parse())
        uri = request.uri
        self._peer = peer_of(Candidate(uri), request)
        facts["uri"] = str(uri)
        self._registered, transport = loader.plugins.open(TRANSPORT, uri, self._environ)
        plugin = self._registered.plugin
        self._closing.callback(transport.close)
        self._uri, self._transport = uri, transport
        chosen = set_variables(self._rows())
        facts.update(plugin=plugin.name, version=plugin.version, variables=chosen)
        seen = f"{plugin.name} {plugin.version}".strip() + f" handles {uri.scheme}"
        return "ok", f"{seen}; {', '.join(chosen)} {'is' if len(chosen) == 1 else 'are'} set" if chosen else seen

    def _rows(self) -> list[SettingValue]:
        return [] if self._registered is None else self._plugin_settings(self._registered)

    def _endpoint(self) -> Endpoint:
        if self._uri is None:
            reason = "no transport is open"
            raise SkippedError(reason)
        if not self._uri.authority:
            reason = "the URI names no host"
            raise SkippedError(reason)
        tls = from_env(TlsSettings, self._environ)
        found = Endpoint.parse(worker_endpoint(self._uri))
        return Endpoint(found.host, found.port, found.tls, tls.authorities, tls_name=tls.peer_name)

    # -- the worker ---------------------------------------------------------------------------------------------------

    def _ask(self, facts: dict[str, Any]) -> tuple[str, str]:
        """Ask the worker what it holds."""
        if self._uri is None or self._peer is None:
            reason = "no transport is open"
            raise SkippedError(reason)
        if self._unreachable:
            reason = "there is no connection"
            raise SkippedError(reason)
        peer = self._peer
        worker = WorkerClient.from_env(self._environ, url=worker_endpoint(self._uri), server=peer.server)
        self._worker = self._closing.enter_context(worker)
        self._described = found = self._in_time(
            lambda: worker.describe(
                peer.source_id, peer.worker_id, most_tensors=_MAX_TENSORS, most_bytes=_MAX_DESCRIPTION_BYTES
            ),
            "ask the worker what it holds",
            _FACTOR,
        )
        chunks = sum(len(each.digests) for each in found)
        facts.update(source_id=peer.source_id, tensors=len(found), chunks=chunks)
        return "ok", f"it holds {len(found)} tensors of source {printable(peer.source_id)}, with {chunks} digests"

    def _read(self, facts: dict[str, Any]) -> tuple[str, str]:
        """Lease its memory, and read one chunk."""
        if self._worker is None or not self._described:
            reason = "it is not known what the worker holds"
            raise SkippedError(reason)
        chosen = max(self._described, key=lambda each: len(each.digests))
        if not chosen.digests:
            reason = "none of its tensors has bytes"
            raise SkippedError(reason)
        return self._in_time(lambda: self._read_chunk(chosen, facts), "read a chunk of a tensor", _FACTOR)

    def _read_chunk(self, chosen: Description, facts: dict[str, Any]) -> tuple[str, str]:
        from modelexpress_core.contracts.transport import TensorRead
        from modelexpress_core.transport.chunk_digests import chunk_digests

        worker, transport, peer, uri = self._worker, self._transport, self._peer, self._uri
        assert worker is not None  # noqa: S101 - for the type checker: the steps before have set them
        assert transport is not None  # noqa: S101 - likewise
        assert peer is not None  # noqa: S101 - likewise
        assert uri is not None  # noqa: S101 - likewise
        with worker.lease(peer.source_id, peer.worker_id or None) as lease:
            access = PeerAccess(peer, lease.lease_id, worker.access(lease.lease_id, uri.scheme), digests_compared=True)
            session = transport.connect(access)
            with contextlib.closing(session):
                destination = _first_chunk(chosen)
                begun = time.monotonic()
                list(session.read([TensorRead(chosen.layout.name, 0, destination)]))
                milliseconds = (time.monotonic() - begun) * 1000
                channel = session.channel if isinstance(session, ChannelSession) else ""
        name = printable(chosen.layout.name)
        facts.update(tensor=chosen.layout.name, bytes=len(destination), channel=channel)
        if chunk_digests(destination) != [chosen.digests[0]]:
            raise IntegrityError(
                f"the first {format_bytes(len(destination))} of {name} are not those that the worker had when it "
                "offered them",
                uri=str(uri),
                operation="read a chunk of a tensor",
                cause="its weights changed without the offer being withdrawn, or a memory or a network is faulty",
                hint="restart that worker",
            )
        seen = f"{format_bytes(len(destination))} of {name} in {milliseconds:.1f} ms, with the right digest"
        return "ok", f"{seen}; way of the bytes: {channel}" if channel else seen


def _first_chunk(described: Description) -> torch.Tensor:
    """Memory for the first chunk of a tensor.

    Raises:
        BackendError: The worker describes a tensor that cannot exist.
    """
    import torch

    from modelexpress_core.transport.chunk_digests import CHUNK_BYTES

    layout = described.layout
    dtype = getattr(torch, layout.dtype, None)
    if not isinstance(dtype, torch.dtype):
        reason = f"the worker has a tensor of the dtype {printable(layout.dtype)[:40]}, which torch does not know"
        raise BackendError(reason, operation="read a chunk of a tensor")
    # Elements that a tensor repeats count once.
    sizes = (size for size, step in zip(layout.shape, layout.stride, strict=True) if step)
    nbytes = math.prod(sizes) * dtype.itemsize
    return torch.empty(min(nbytes, CHUNK_BYTES), dtype=torch.uint8)
