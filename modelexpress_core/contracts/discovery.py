"""What every discovery does: it finds the workers and places that hold a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from modelexpress_core.contracts.candidates import Candidate, LoadRequest

__all__ = ["Discovery"]


class Discovery(Protocol):
    """Finds the workers and places that hold a model. Core opens one for each load, and closes it after its answer.

    The URI of a peer is ``<transport>://<endpoint of the worker>/<source id>/<worker id>``, with ``?tls=1`` if it
    uses TLS; its scheme selects the transport. A place that holds files has the URI of a checkpoint, and no peer.
    """

    def candidates(self, request: LoadRequest) -> Sequence[Candidate]:
        """The places that may serve ``request``, in any order; an empty list is no error.

        ``request.skip(place, reason)`` tells ``mx explain`` of a place that is left out.

        Raises:
            BackendError: The discovery has no answer. Core logs the error and continues with other places.
        """
        ...

    def close(self) -> None:
        """Close connections."""
        ...
