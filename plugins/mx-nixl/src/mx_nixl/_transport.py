"""The transport: serves tensors with an agent of NIXL, and connects to those of other workers."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from functools import partial

from modelexpress_core.contracts.transport import PeerAccess, TensorTable
from modelexpress_core.settings import from_env
from modelexpress_core.sources.metrics import report_quarantine
from modelexpress_core.uri import ModelURI
from mx_nixl._agent import Agent, library
from mx_nixl._description import AgentDescription, Proof
from mx_nixl._errors import description_unreadable, nixl_errors, other_agent, other_backend, quarantine_full
from mx_nixl._lanes import here, lane_between, reads_memory_of, shares_memory
from mx_nixl._quarantine import QUARANTINE, Quarantine, quarantined_bytes
from mx_nixl._serving import NixlServed
from mx_nixl._session import BUFFER_BYTES, NixlSession
from mx_nixl.settings import NixlSettings

__all__ = ["NixlTransport", "open_nixl"]

_log = logging.getLogger(__name__)

#: Memory of reads that never ended; with more, no session begins.
_MAX_QUARANTINED_BYTES = 512 << 20


#: Connections that were left as they are, since their reads do not end: each takes some megabytes.
_MOST_ABANDONED = 64


class NixlTransport:
    """Serves and reads tensors over NIXL.

    Args:
        uri: The worker for ``connect``; for ``serve`` its authority is empty.
        settings: The backend, and how long a read may take.
        quarantine: Keeps the memory of reads that do not end.
        quarantine_bytes: With more memory in quarantine, no session begins.
    """

    def __init__(
        self,
        uri: ModelURI,
        settings: NixlSettings,
        *,
        quarantine: Quarantine = QUARANTINE,
        quarantine_bytes: int = _MAX_QUARANTINED_BYTES,
    ) -> None:
        self._uri = uri
        self._settings = settings
        self._quarantine = quarantine
        self._quarantine_bytes = quarantine_bytes

    def serve(self, table: TensorTable) -> NixlServed:
        """Register the tensors with an agent of their own."""
        return NixlServed(table, self._settings)

    def connect(self, access: PeerAccess) -> NixlSession:
        """Make an agent for this session, and connect it to the one of the worker."""
        uri = str(self._uri)
        try:
            description = AgentDescription.from_bytes(access.description)
        except ValueError as exc:
            raise description_unreadable(str(exc), uri) from exc
        if description.backend != self._settings.backend:
            raise other_backend(description.backend[:20], self._settings.backend, uri)
        self._quarantine.release_ended()
        if self._quarantine.nbytes + BUFFER_BYTES > self._quarantine_bytes:
            raise quarantine_full(f"{self._quarantine.nbytes >> 20} MiB", uri)
        if self._quarantine.abandoned >= _MOST_ABANDONED:
            raise quarantine_full(f"{self._quarantine.abandoned} connections", uri)
        theirs, ours = description.location, here(self._settings)
        proven = shares_memory(theirs, ours) and _proves(description.proof)
        lane = lane_between(theirs, ours, proven=proven)
        _log.info("reading %s %s, over %s", uri, "in place" if lane.on_host else "through buffers", lane.channel)
        agent = Agent(f"reader/{secrets.token_hex(8)}", self._settings.backend)
        with nixl_errors("connect", uri, peer_at_fault=True):
            name = agent.add(description.metadata)
        if name != description.agent:
            raise other_agent(uri)
        with nixl_errors("connect", uri, peer_at_fault=True):
            agent.connect(name)
        return NixlSession(
            agent,
            description,
            lane=lane,
            is_served=partial(_proves, description.proof) if proven else lambda: True,
            timeout_seconds=self._settings.read_timeout_seconds,
            uri=uri,
            quarantine=self._quarantine,
        )

    def close(self) -> None:
        """Do nothing: sessions and served tensors have the agents."""


def _proves(proof: Proof) -> bool:
    return reads_memory_of(proof.pid, proof.address, proof.nonce)


def open_nixl(uri: ModelURI, settings: Mapping[str, str]) -> NixlTransport:
    """Open the transport for ``nixl`` URIs.

    Raises:
        ModuleNotFoundError: No package of NIXL is installed.
        PluginLoadError: It does not import.
        SettingsError: A variable cannot be used.
    """
    chosen = from_env(NixlSettings, settings)
    library()
    report_quarantine("nixl", quarantined_bytes)
    return NixlTransport(uri, chosen)
