"""Runs ``mx`` in copies of a process that has imported everything already: importing torch takes seconds of CPU time.

A copy runs what ``python -m modelexpress_core`` runs, with the variables, the directory and the streams that the test
gives it, and ends as a program of its own does. What differs is that modules are imported before the variables are set:
where a variable is given that Python or a library reads when it starts, a program is started instead.
"""

from __future__ import annotations

import array
import atexit
import gc
import json
import os
import re
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from devtools.processes import end_with_parent

__all__ = ["Commands", "RunningCommand"]

_ROOT = Path(__file__).resolve().parents[2]

#: Variables that are read when Python, or a library of the list below, is imported.
_READ_AT_START = re.compile(r"PYTHON|LD_|LC_|LANG|TZ$|GRPC_|OMP_|MKL_|TORCH|TERMINAL_WIDTH|_?TYPER_|MALLOC_")

#: What the commands import; nothing that reads the variables of this project, or finds plugins.
_MODULES = (
    "google.protobuf.message",
    "prometheus_client",
    "mx_azure.plugin",
    "mx_gcs.plugin",
    "mx_hf.plugin",
    "mx_s3._storage",
    "mx_s3.plugin",
    "mx_streamer.plugin",
    "modelexpress_core.cli.app",
    "modelexpress_core.cli.doctor",
    "modelexpress_core.cli.inspect",
    "modelexpress_core.cli.load",
    "modelexpress_core.cli.plugins",
    "modelexpress_core.cli.pull",
    "modelexpress_core.cli.serve",
    "modelexpress_core.cli.settings",
    "modelexpress_core.cli.sources",
)

_MAX_REQUEST_BYTES = 1 << 20


class RunningCommand:
    """A command that was started: what tests need of ``subprocess.Popen``.

    Attributes:
        pid: Of its process, which is no child of this one.
        stdout: What it prints.
        stderr: What it says.
    """

    def __init__(self, pid: int, stdout: IO[str], stderr: IO[str], status: socket.socket) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        self._status = status
        self._returncode: int | None = None
        self._lock = threading.Lock()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or the number of the signal that killed it, as a negative number.

        Raises:
            TimeoutError: It has not ended after ``timeout`` seconds.
        """
        with self._lock:
            if self._returncode is None:
                self._status.settimeout(timeout)
                answer = self._status.recv(32)
                self._status.close()
                if not answer:
                    raise RuntimeError("the process that runs the commands has ended")
                self._returncode = int(answer)
            return self._returncode

    @property
    def returncode(self) -> int | None:
        """What ``wait`` returned; None before that."""
        return self._returncode

    def poll(self) -> int | None:
        """The same, or None while it runs."""
        try:
            return self.wait(0)
        except (BlockingIOError, TimeoutError):
            return None

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """The rest of what it prints and says, once it has ended; it is killed after ``timeout`` seconds.

        Raises:
            TimeoutError: It had to be killed.
        """
        if self.stdout.closed:
            return "", ""
        with self.stdout, self.stderr, ThreadPoolExecutor(2) as pool:
            printed, said = pool.submit(self.stdout.read), pool.submit(self.stderr.read)
            try:
                self.wait(timeout)
            except TimeoutError:
                self.kill()
                raise
            return printed.result(), said.result()


class Commands:
    """Starts copies of one process, which is made at first use and ends with this object, and with this process.

    Args:
        *modules: What it imports besides what all commands need.
    """

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._environ: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None

    def can_run(self, environ: Mapping[str, str]) -> bool:
        """Whether a copy does what a new program does with these variables."""
        self._start()
        return _read_at_start(environ) == _read_at_start(self._environ)

    def run(
        self, arguments: Sequence[str], environ: Mapping[str, str], *, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run ``mx`` with ``arguments``, and with these variables only."""
        if not self.can_run(environ):
            return subprocess.run(
                [sys.executable, "-m", "modelexpress_core", *arguments],
                env=dict(environ),
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        running = self.start(arguments, environ)
        printed, said = running.communicate(timeout)
        return subprocess.CompletedProcess(list(arguments), running.wait(), printed, said)

    def start(self, arguments: Sequence[str], environ: Mapping[str, str]) -> RunningCommand:
        """Start it, and go on."""
        self._start()
        assert self._requests is not None
        out, printed = os.pipe()
        err, said = os.pipe()
        ours, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"arguments": list(arguments), "environ": dict(environ), "directory": os.getcwd()}
        with status:
            handles = array.array("i", [printed, said, status.fileno()])
            encoded = json.dumps(request).encode()
            assert len(encoded) <= _MAX_REQUEST_BYTES
            self._requests.sendmsg([encoded], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, handles)])
        os.close(printed)
        os.close(said)
        ours.settimeout(60)
        return RunningCommand(int(ours.recv(32)), os.fdopen(out), os.fdopen(err), ours)

    def close(self) -> None:
        """End the process, and with it every command that still runs."""
        if self._process is not None and self._requests is not None:
            self._requests.close()
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        if self._process is not None:
            return
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_REQUEST_BYTES)
        self._environ = dict(os.environ)
        with theirs:
            # The streams are no terminal, like those of its copies.
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), *_MODULES, *self._modules],
                cwd=_ROOT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - it calls nothing that takes a lock
            )


def _read_at_start(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if _READ_AT_START.match(name)}


# -- in the process that is copied -------------------------------------------------------------------------------------


def _copy(requests: socket.socket) -> None:
    """Take requests until there are no more; returns in the copies only, which are ready to run their command."""
    selector = selectors.DefaultSelector()
    selector.register(requests, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is not requests:  # a copy has ended
                pid, status = key.data
                _, code = os.waitpid(pid, 0)
                status.send(str(os.waitstatus_to_exitcode(code)).encode())
                status.close()
                selector.unregister(key.fileobj)
                os.close(key.fd)
                continue
            content, handles, _, _ = socket.recv_fds(requests, _MAX_REQUEST_BYTES, 3)
            if not content:
                os._exit(0)
            printed, said, status_handle = handles
            pid = os.fork()
            if pid == 0:
                end_with_parent()
                for other in list(selector.get_map().values()):
                    if other.fileobj is not requests:
                        os.close(other.fd)
                        other.data[1].close()
                selector.close()
                requests.close()
                os.close(status_handle)
                _become(json.loads(content), printed, said)
                return
            os.close(printed)
            os.close(said)
            status = socket.socket(fileno=status_handle)
            status.send(str(pid).encode())
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, status))


def _become(request: Mapping[str, object], printed: int, said: int) -> None:
    """Take over what the test gave."""
    os.dup2(printed, 1)
    os.dup2(said, 2)
    os.close(printed)
    os.close(said)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    os.chdir(str(request["directory"]))
    environ, arguments = request["environ"], request["arguments"]
    assert isinstance(environ, dict)
    assert isinstance(arguments, list)
    os.environ.clear()
    os.environ.update(environ)
    sys.path[0] = os.getcwd()
    sys.argv = ["mx", *arguments]


_code: object = None


def _end() -> None:
    """End a copy when all is done that Python does at the end, but for taking the modules apart, which takes long."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(_code if isinstance(_code, int) else int(_code is not None))


if __name__ == "__main__":
    for _module in sys.argv[2:]:
        __import__(_module)
    gc.collect()
    gc.freeze()  # else each copy would look through, and so copy, all that was imported
    _copy(socket.socket(fileno=int(sys.argv[1])))
    atexit.register(_end)

    try:
        runpy.run_module("modelexpress_core", run_name="__main__", alter_sys=True)
    except BaseException as exc:  # which Python reports before it calls _end
        _code = exc.code if isinstance(exc, SystemExit) else 1
        raise
