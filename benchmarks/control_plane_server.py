"""The servers of ``benchmarks.control_plane``: ``mx serve`` with signal handlers, and a bare gRPC server.

``serve ...`` is the command itself. On SIGUSR1 it collects garbage. On SIGUSR2 it starts profiling the thread of its
event loop; on the next SIGUSR2 it writes the profile to the file in ``BENCHMARK_PROFILE``. ``bare`` is a gRPC server
that only answers UpdateStatus: the limit for a server in Python.
"""

from __future__ import annotations

import asyncio
import cProfile
import gc
import os
import signal
import sys
from typing import Any

import grpc.aio

from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from modelexpress_core.wire.rpc import MESSAGE_OPTIONS, P2P


async def _bare() -> None:
    async def update_status(_: Any, __: Any) -> p2p_pb2.UpdateStatusResponse:  # noqa: ANN401 - of gRPC
        return p2p_pb2.UpdateStatusResponse(success=True, message="updated")

    method = P2P.methods["UpdateStatus"]
    answer = grpc.unary_unary_rpc_method_handler(
        update_status, method.request.FromString, method.response.SerializeToString
    )
    server = grpc.aio.server(options=MESSAGE_OPTIONS)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(P2P.name, {"UpdateStatus": answer})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"serving on 127.0.0.1:{port}", file=sys.stderr, flush=True)
    await server.wait_for_termination()


def _main() -> None:
    if sys.argv[1] == "bare":
        asyncio.run(_bare())
        return
    from modelexpress_core.cli import main

    profile, profiles = cProfile.Profile(), False

    def toggle(*_: object) -> None:
        nonlocal profiles
        profiles = not profiles
        if profiles:
            profile.enable()
        else:
            profile.disable()
            profile.dump_stats(os.environ["BENCHMARK_PROFILE"])

    signal.signal(signal.SIGUSR1, lambda *_: gc.collect())
    signal.signal(signal.SIGUSR2, toggle)
    main()


if __name__ == "__main__":
    _main()
