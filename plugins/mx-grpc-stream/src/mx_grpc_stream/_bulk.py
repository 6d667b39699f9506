"""The bulk channel between workers: what one side offers, and how the other side opens it."""

from __future__ import annotations

import logging
import socket

from attrs import frozen

from modelexpress_core.bulk.serving import BulkServer, Content
from modelexpress_core.bulk.tensor_content import TensorContent
from modelexpress_core.bulk.tickets import Ticket, Tickets
from modelexpress_core.contracts.transport import TensorTable
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.wire.settings import AuthSettings, TlsSettings
from modelexpress_core.wire.tls import server_contexts
from mx_grpc_stream.settings import GrpcStreamSettings

__all__ = ["ServedBulk", "serve_bulk"]

_log = logging.getLogger(__name__)

#: A ticket ends with its lease; this is the most that a lease can last for it.
_TICKET_SECONDS = 24 * 3600.0

_LAST_PORT = 65535


class _TensorSource:
    """The tensors of a worker as a bulk server reads them."""

    def __init__(self, table: TensorTable) -> None:
        self._table = table
        self._contents = {name: TensorContent(memory) for name, memory in table.tensors.items()}

    def holds(self, ticket: Ticket) -> bool:
        """Whether the lease of a ticket lasts."""
        return self._table.holds_lease(ticket.lease_id)

    def content(self, ticket: Ticket, name: str) -> Content | None:  # noqa: ARG002 - all tensors belong to the ticket
        """The memory of a tensor."""
        return self._contents.get(name)

    def count_sent(self, ticket: Ticket, nbytes: int) -> None:
        """Count bytes for the lease of the ticket."""
        self._table.count_sent(ticket.lease_id, nbytes)


@frozen
class ServedBulk:
    """A bulk channel that is open.

    Attributes:
        server: Its server.
        tickets: Issues its tickets.
        content: What tickets are for: the id of the worker.
        version: The source id, which stands for the version of the content.
    """

    server: BulkServer
    tickets: Tickets
    content: str
    version: str

    def ticket(self, lease_id: str, reader: str) -> str:
        """A ticket for the reader that holds a lease, and showed a certificate with this name."""
        return self.tickets.issue(
            lease_id, content=self.content, version=self.version, seconds=_TICKET_SECONDS, reader=reader
        )


def serve_bulk(
    table: TensorTable, settings: GrpcStreamSettings, tls: TlsSettings, auth: AuthSettings
) -> ServedBulk | None:
    """Open the bulk channel of a worker; None if there is to be none.

    Without it, everything goes over gRPC: that it cannot be opened is logged, and is no error.

    Raises:
        SettingsError: A file of TLS cannot be used.
    """
    if not settings.bulk_port:
        return None
    tickets = Tickets()
    port = settings.bulk_port + table.device
    # Where callers are authenticated, weights and tickets are for them alone.
    secret = auth.mode != "off" and tls.certificate is None and not settings.bulk_plaintext
    contexts = server_contexts(tls, ask_for_certificates=auth.mode != "off") if tls.certificate else None
    try:
        server = BulkServer(
            _TensorSource(table),
            tickets,
            host=_LOOPBACK if secret else "",
            port=port if port <= _LAST_PORT else 0,
            tls=contexts,
        )
    except ModelExpressError as exc:
        _log.warning("tensors are offered over gRPC alone: %s", exc)
        return None
    if server.port != port:
        _log.info("port %d is in use: the bulk channel of worker %s has %d", port, table.worker_id, server.port)
    return ServedBulk(server, tickets, table.worker_id, table.source_id)


_LOOPBACK = socket.inet_ntoa(socket.INADDR_LOOPBACK.to_bytes(4, "big"))
