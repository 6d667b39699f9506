"""The worker's side: an agent with the tensors' allocations registered, which readers read without its help."""

from __future__ import annotations

import ctypes
import os
import secrets
import threading
from collections.abc import Mapping
from typing import Any

from modelexpress_core.contracts.transport import TensorTable
from mx_nixl._agent import Agent, rows_of
from mx_nixl._allocations import HOST, allocations_of, device_of, kind_of, merged
from mx_nixl._description import LIMIT_BYTES, MAX_TENSORS, AgentDescription, Proof, TensorPlace
from mx_nixl._errors import nixl_errors, too_many_tensors
from mx_nixl._lanes import Location, here
from mx_nixl.settings import NixlSettings

__all__ = ["NixlServed"]

_NONCE_BYTES = 16

_OPERATION = "register the tensors"


class NixlServed:
    """Tensors of one worker, readable until ``close``.

    Who knows the description can read and write the whole memory of this process until then. So each offer has an
    agent of its own, and ``close`` destroys it.

    Args:
        table: The tensors.
        settings: The backend of NIXL, and the name of the fabric.

    Attributes:
        description: The agent's metadata, and where each tensor lies.
        topology: Where the worker runs, so that readers can tell which lane they have.
        services: Empty.

    Raises:
        BackendError: The memory cannot be registered, or the tensors are too many.
    """

    services: Mapping[Any, object] = {}

    def __init__(self, table: TensorTable, settings: NixlSettings) -> None:
        self._table = table  # keeps the memory alive
        self._closing = threading.Lock()
        self._nonce = ctypes.create_string_buffer(secrets.token_bytes(_NONCE_BYTES), _NONCE_BYTES)
        location = here(settings)
        on_host = all(device_of(memory) == HOST for memory in table.tensors.values())
        self.topology = location.topology(os.getpid() if on_host else None)
        self._agent = Agent(f"{table.worker_id[:64]}/{secrets.token_hex(8)}", settings.backend, answers=True)
        try:
            self._register()
            self.description = self._describe(location)
        except BaseException:
            self.close()
            raise

    def _describe(self, location: Location) -> bytes:
        places = {
            name: TensorPlace(memory.data_ptr(), len(memory), device_of(memory))
            for name, memory in self._table.tensors.items()
        }
        with nixl_errors(_OPERATION, ""):
            metadata = self._agent.metadata()
        proof = Proof(os.getpid(), ctypes.addressof(self._nonce), self._nonce.raw)
        found = AgentDescription(self._agent.name, self._agent.backend, metadata, places, location, proof).to_bytes()
        if len(found) > LIMIT_BYTES or len(places) > MAX_TENSORS:
            raise too_many_tensors(len(places), len(found), LIMIT_BYTES, MAX_TENSORS)
        return found

    def _register(self) -> None:
        allocations = merged(allocations_of(self._table.tensors.values()))
        for on_host in (True, False):
            ranges = [
                (start, end - start, max(device, 0))
                for start, end, device in allocations
                if (device == HOST) is on_host
            ]
            if ranges:
                with nixl_errors(_OPERATION, ""):
                    self._agent.register(kind_of(HOST if on_host else 0), rows_of(ranges))

    def close(self) -> None:
        """Destroy the agent, so that no reader reads this memory any more."""
        with self._closing:
            ctypes.memset(self._nonce, 0, _NONCE_BYTES)  # nobody proves CMA with it from now on
            self._agent.close()
