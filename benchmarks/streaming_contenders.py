"""The readers that are compared on the cache of a server (see ``benchmarks.contenders``)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import struct
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import digest_of, pieces
from benchmarks.contenders import Contender, IntoPlace, in_threads

__all__ = ["BareModelFiles", "ExistingClient", "ModelFiles", "SendfileSockets", "serve_bare_grpc", "serve_sendfile"]

#: Number of the file, offset, length.
_REQUEST = struct.Struct("<IQQ")
_PIECE_BYTES = 4 << 20
_MESSAGE_BYTES = 1 << 20
_BARE = "/benchmark/Files"


def serve_sendfile(directory: Path) -> int:
    """Serve ranges of the files with ``sendfile`` in threads of this process; returns the port."""
    files = [os.open(path, os.O_RDONLY) for path in sorted(directory.glob("*.safetensors"))]
    listening = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            while len(request := connection.recv(_REQUEST.size, socket.MSG_WAITALL)) == _REQUEST.size:
                number, offset, length = _REQUEST.unpack(request)
                while length:
                    sent = os.sendfile(connection.fileno(), files[number], offset, length)
                    offset, length = offset + sent, length - sent

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listening.getsockname()[1])


def serve_bare_grpc(total: int) -> int:
    """Serve messages as large as those of StreamModelFiles with grpcio alone; returns the port."""
    import asyncio

    import grpc

    message = bytes(_MESSAGE_BYTES)
    ports: list[int] = []
    ready = threading.Event()

    async def stream(_request: bytes, _context: Any) -> Any:  # noqa: ANN401 - of gRPC
        for _ in range(total // _MESSAGE_BYTES):
            yield message

    class Handler(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the annotations alone
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:  # noqa: ANN401 - as above
            return grpc.unary_stream_rpc_method_handler(stream) if handler_call_details.method == _BARE else None

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


class SendfileSockets(IntoPlace):
    """``sendfile`` to ``recv_into`` over plain sockets: the limit."""

    def __init__(self, directory: str, port: int) -> None:
        super().__init__(directory)
        self.port = port

    def run(self, *, connections: int) -> None:  # type: ignore[override]
        names = [section.name for section in self.sections]
        memory = self.destination.memory

        def work(take: Callable[[], tuple[Any, ...] | None]) -> None:
            with socket.create_connection(("127.0.0.1", self.port)) as connection:
                while (piece := take()) is not None:
                    name, offset, length, there = piece
                    connection.sendall(_REQUEST.pack(names.index(name), offset, length))
                    if connection.recv_into(memory[there : there + length], length, socket.MSG_WAITALL) != length:
                        message = "the server closed the connection"
                        raise ConnectionError(message)

        in_threads(connections, work, list(pieces(self.sections, _PIECE_BYTES)))


class BareModelFiles(Contender):
    """grpcio with serialisers that do nothing, in messages of 1 MiB; what arrives is counted and dropped."""

    def __init__(self, port: int, total: int, expected: str) -> None:
        self.tensors = {}
        self.port, self.total, self.expected = port, total, expected

    def run(self, **_setting: Any) -> None:  # noqa: ANN401 - as above
        import grpc

        received = 0
        options = [("grpc.max_receive_message_length", -1)]
        with grpc.insecure_channel(f"127.0.0.1:{self.port}", options=options) as channel:
            for message in channel.unary_stream(_BARE)(b""):
                received += len(message)
        if received != self.total // _MESSAGE_BYTES * _MESSAGE_BYTES:
            reason = f"{received} bytes came"
            raise ConnectionError(reason)

    def digest(self) -> str:
        """Nothing is kept, so there is nothing to compare."""
        return self.expected

    def release(self) -> None:
        """Do nothing."""


class ModelFiles(Contender):
    """StreamModelFiles of our server, read by grpcio; what arrives is counted and dropped."""

    def __init__(self, url: str, model: str, total: int, expected: str) -> None:
        self.tensors = {}
        self.url, self.model, self.total, self.expected = url, model, total, expected

    def run(self, **_setting: Any) -> None:  # noqa: ANN401 - as above
        import grpc

        from modelexpress_core.wire.proto.modelexpress import model_pb2
        from modelexpress_core.wire.rpc import MODEL

        request = model_pb2.ModelFilesRequest(model_name=self.model, chunk_size=_MESSAGE_BYTES).SerializeToString()
        received = 0
        options = [("grpc.max_receive_message_length", -1)]
        with grpc.insecure_channel(self.url, options=options) as channel:
            for message in channel.unary_stream(MODEL.path("StreamModelFiles"))(request):
                received += len(message)
        if received < self.total:
            reason = f"{received} bytes came, of {self.total}"
            raise ConnectionError(reason)

    def digest(self) -> str:
        """Nothing is kept, so there is nothing to compare."""
        return self.expected

    def release(self) -> None:
        """Do nothing."""


class ExistingClient(Contender):
    """``ModelCacheClient`` of the ``modelexpress`` package, which writes files, and the safetensors library."""

    def __init__(self, url: str, model: str) -> None:
        # The package's own __init__ imports torch and more, which this part of it does not need.
        spec = importlib.util.find_spec("modelexpress")
        if spec is None or spec.submodule_search_locations is None:
            message = "the package modelexpress is not installed"
            raise ModuleNotFoundError(message)
        bare = types.ModuleType("modelexpress")
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules["modelexpress"] = bare
        from modelexpress.model_client import ModelCacheClient  # type: ignore[import-not-found]

        self.client, self.url, self.model = ModelCacheClient, url, model
        self.directory = ""
        self.tensors = {}

    def run(self, **_setting: Any) -> Mapping[str, Any] | None:  # noqa: ANN401 - as above
        self.directory = tempfile.mkdtemp()
        with self.client(self.url, self.directory) as client:
            snapshot = client.install_metadata_snapshot(self.model)
            client.install_weight_files(self.model, snapshot)
        self.snapshot = Path(snapshot)
        return None

    def digest(self) -> str:
        """Of what it wrote."""
        from safetensors.torch import load_file

        files = sorted(self.snapshot.glob("*.safetensors"))
        return digest_of({name: tensor for file in files for name, tensor in load_file(file).items()})

    def release(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.directory, ignore_errors=True)
