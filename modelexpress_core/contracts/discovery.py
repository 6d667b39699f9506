"""What every discovery does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from modelexpress_core.contracts.candidates import Candidate, LoadRequest

__all__ = ["Discovery"]


class Discovery(Protocol):
    """Knows who holds models now. One is opened for each load, and closed when it has answered.

    The URI of a peer is ``<transport>://<endpoint of the worker>/<source id>/<worker id>``, with ``?tls=1`` if it
    speaks TLS; its scheme picks the transport. Other places that hold the model have the URI of a checkpoint.
    """

    def candidates(self, request: LoadRequest) -> Sequence[Candidate]:
        """The places that hold what ``request`` asks for, in any order; none is no error.

        Raises:
            BackendError: It cannot be told who holds it. Other places are tried then.
        """
        ...

    def close(self) -> None:
        """Give up connections."""
        ...
