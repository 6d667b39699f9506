"""The worker that is read in the benchmarks ``p2p`` and ``p2p_sources``, in a process of its own.

``python -m benchmarks.peer_source MIB [ADDRESS]``; the address is 127.0.0.1 by default. It offers one set of tensors
over every transport that is installed, over plain sockets, and over bare gRPC with serialisers that do nothing. It
prints one line of JSON with the addresses, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import grpc.aio
import torch

import modelexpress_core as mx
from modelexpress_core.transport.tensor_bytes import host_memory

__all__ = ["BARE_METHOD", "FRAME_BYTES", "REQUEST", "tensors_of"]

TENSORS = 400

#: One tensor has this share of all bytes, as an embedding does.
_LARGEST_SHARE = 0.15

#: Of the plain sockets: number of the tensor, first byte, number of bytes.
REQUEST = struct.Struct("<IQQ")

#: Of bare gRPC: the number of bytes of a message, and its method.
FRAME_BYTES = 1 << 20
BARE_METHOD = "/bare/Stream"


def tensors_of(mib: int, *, seed: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors of ``mib`` MiB together, in touched memory: random with a seed, else all the same."""
    total = mib << 20
    largest = int(total * _LARGEST_SHARE) // 2 * 2
    other = (total - largest) // (TENSORS - 1) // 2 * 2
    sizes = [largest, *[other] * (TENSORS - 1)]
    memory = torch.full((sum(sizes),), 0xAA, dtype=torch.uint8)
    if seed is not None:
        memory.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    parts = memory.split(sizes)
    return {f"layers.{number:03}.weight": part.view(torch.bfloat16) for number, part in enumerate(parts)}


def _serve_sockets(memory: list[memoryview]) -> int:
    listening = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            while len(request := connection.recv(REQUEST.size, socket.MSG_WAITALL)) == REQUEST.size:
                number, offset, length = REQUEST.unpack(request)
                connection.sendall(memory[number][offset : offset + length])

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listening.getsockname()[1])


def _serve_bare_grpc(total: int) -> int:
    frame = bytes(FRAME_BYTES)
    ports: list[int] = []
    ready = threading.Event()

    async def stream(_request: bytes, _context: Any) -> AsyncIterator[bytes]:  # noqa: ANN401 - of gRPC
        for _ in range(total // FRAME_BYTES):
            yield frame

    class Handler(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the annotations alone
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:  # noqa: ANN401 - as above
            if handler_call_details.method == BARE_METHOD:
                return grpc.unary_stream_rpc_method_handler(stream)
            return None

    async def serve() -> None:
        server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
        server.add_generic_rpc_handlers([Handler()])
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        ready.set()
        await server.wait_for_termination()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    ready.wait()
    return ports[0]


def _serve_nixl(tensors: Mapping[str, torch.Tensor]) -> tuple[Any, Mapping[str, Any]]:
    """An agent that lets others read the memory of all tensors, which is one, and what they need for it."""
    from mx_nixl._agent import Agent, rows_of

    first, *_ = tensors.values()
    address, total = first.data_ptr(), sum(tensor.nbytes for tensor in tensors.values())
    agent = Agent(uuid.uuid4().hex, "UCX", answers=True)
    agent.register("DRAM", rows_of([(address, total, 0)]))
    return agent, {"metadata": agent.metadata().hex(), "address": address, "bytes": total}


def main() -> None:
    """Serve."""
    mib = int(sys.argv[1])
    host = sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1"
    tensors = tensors_of(mib, seed=1)
    memory = [host_memory(tensor.view(torch.uint8)) for tensor in tensors.values()]
    identity = mx.own_identity("benchmark", tensors, content_version="1")
    with socket.create_server(("127.0.0.1", 0)) as taken:  # no server listens there
        nowhere = f"127.0.0.1:{taken.getsockname()[1]}"
    environ: Mapping[str, str] = {
        **os.environ,
        "MODEL_EXPRESS_URL": nowhere,
        "MX_WORKER_HOST": host,
        "MX_WORKER_GRPC_PORT": "0",
        "MX_NIXL_OFFER": "1",
    }
    with mx.publish(tensors, identity=identity, environ=environ) as offer:
        said = {
            "worker": f"{offer.endpoint}/{identity.source_id}/{offer.worker_id}",
            "transports": offer.transports,
            "pid": os.getpid(),
            "sockets": _serve_sockets(memory),
            "bare gRPC": _serve_bare_grpc(mib << 20),
        }
        raw_agent = None
        if "nixl" in offer.transports:
            raw_agent, said["raw NIXL"] = _serve_nixl(tensors)
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
        sys.stdin.read()
        del raw_agent


if __name__ == "__main__":
    main()
