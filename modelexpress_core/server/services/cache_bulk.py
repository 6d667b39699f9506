"""The bulk channel of a server: tickets for versions of models, and their files."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import threading
import time
from typing import TYPE_CHECKING

from modelexpress_core.bulk.file_content import FileContent
from modelexpress_core.bulk.serving import BulkServer, Content
from modelexpress_core.bulk.tickets import Ticket, Tickets
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.wire.peers import peer_address
from modelexpress_core.wire.settings import AuthSettings, TlsSettings
from modelexpress_core.wire.tls import server_contexts

if TYPE_CHECKING:
    from modelexpress_core.server.cache import ModelCache, Snapshot
    from modelexpress_core.server.metrics import CacheMetrics

__all__ = ["TICKET_SECONDS", "CacheBulk", "open_bulk"]

_log = logging.getLogger(__name__)

#: How long a ticket is good for; a reader then asks for another one.
TICKET_SECONDS = 3600

#: A version that was found is not looked for again in this time.
_FOUND_SECONDS = 1.0

#: Connections: 32 readers with 16 each.
_MAX_CONNECTIONS = 512

#: Files that one request may read.
_MAX_NAMES = 64

_LOOPBACK = socket.inet_ntoa(socket.INADDR_LOOPBACK.to_bytes(4, "big"))


class _CacheSource:
    """The files of a cache as a bulk server reads them: a ticket is for one version of one model."""

    def __init__(self, cache: ModelCache, metrics: CacheMetrics) -> None:
        self._cache = cache
        self._metrics = metrics
        self._lock = threading.Lock()
        self._found: dict[tuple[str, str], tuple[float, Snapshot]] = {}

    def holds(self, ticket: Ticket) -> bool:
        """Whether the version is in the cache."""
        return self._snapshot(ticket) is not None

    def content(self, ticket: Ticket, name: str) -> Content | None:
        """A file of the version, which stays in the cache until it is closed."""
        snapshot = self._snapshot(ticket)
        if snapshot is None or name not in snapshot.files:
            return None
        holding = contextlib.ExitStack()
        holding.enter_context(self._cache.hold(snapshot))
        return FileContent(
            snapshot.files[name].size,
            lambda seconds: snapshot.try_open_file(name, seconds),
            close=holding.close,
            present_bytes=lambda: snapshot.present_bytes,
        )

    def count_sent(self, ticket: Ticket, nbytes: int) -> None:  # noqa: ARG002 - all tickets count alike
        """Count bytes."""
        self._cache.sent(nbytes)
        self._metrics.sent("bulk", nbytes)

    def _snapshot(self, ticket: Ticket) -> Snapshot | None:
        key, now = (ticket.content, ticket.version), time.monotonic()
        with self._lock:
            at, found = self._found.get(key, (0.0, None))
        if found is not None and now - at < _FOUND_SECONDS:
            return found
        for weights in (True, False):
            found = self._cache.find(ticket.content, version=ticket.version, weights=weights)
            if found is not None:
                with self._lock:
                    self._found = {each: past for each, past in self._found.items() if now - past[0] < _FOUND_SECONDS}
                    self._found[key] = (now, found)
                return found
        return None


class CacheBulk:
    """A bulk channel that is open.

    Args:
        server: Its server.
        tickets: Issues its tickets.
        this_host_alone: Whether it listens on loopback.
        host: Where readers reach this replica; empty if they reach it where they called it.

    Attributes:
        host: As above.
    """

    def __init__(self, server: BulkServer, tickets: Tickets, *, this_host_alone: bool, host: str = "") -> None:
        self.host = host
        self._server = server
        self._tickets = tickets
        self._this_host_alone = this_host_alone

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._server.port

    def reaches(self, peer: str) -> bool:
        """Whether the caller with gRPC's name ``peer`` can connect to it."""
        address = peer_address(peer)
        return not self._this_host_alone or (bool(address) and ipaddress.ip_address(address).is_loopback)

    def ticket(self, place: str, version: str, reader: str) -> str:
        """A ticket for a reader that showed a certificate with this name."""
        return self._tickets.issue("", content=place, version=version, seconds=TICKET_SECONDS, reader=reader)

    def close(self) -> None:
        """End all requests, and close it."""
        self._server.close()


def open_bulk(
    cache: ModelCache,
    metrics: CacheMetrics,
    *,
    host: str,
    port: int,
    replica_host: str,
    plaintext: bool,
    tls: TlsSettings,
    auth: AuthSettings,
) -> CacheBulk | None:
    """Open the bulk channel of a server; None if it cannot be opened, which is logged: gRPC carries all bytes then.

    Args:
        cache: Whose files it sends.
        metrics: Counts them.
        host: Address that the server listens on.
        port: Port to listen on; any free one if it is in use.
        replica_host: Where readers reach this replica of several; empty if it is the only one.
        plaintext: Whether it is for other hosts also where callers are authenticated and there is no TLS.
        tls: Files of TLS.
        auth: How callers are authenticated.

    Raises:
        SettingsError: A file of TLS cannot be used.
    """
    # Where callers are authenticated, weights and tickets are for them alone.
    secret = auth.mode != "off" and tls.certificate is None and not plaintext
    contexts = server_contexts(tls, ask_for_certificates=auth.mode != "off") if tls.certificate else None
    tickets = Tickets()
    try:
        server = BulkServer(
            _CacheSource(cache, metrics),
            tickets,
            host=_LOOPBACK if secret else host.strip("[]"),
            port=port,
            tls=contexts,
            max_connections=_MAX_CONNECTIONS,
            max_names=_MAX_NAMES,
        )
    except ModelExpressError as exc:
        _log.warning("models are sent over gRPC alone: %s", exc)
        return None
    return CacheBulk(server, tickets, this_host_alone=secret, host="" if secret else replica_host)
