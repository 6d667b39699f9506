"""One agent of NIXL: its library, its backend, registered memory, and reads."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mx_nixl._errors import agent_closed, backend_fails, library_unusable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.uint64]

__all__ = ["MODULES", "Agent", "has_library", "library", "rows_of"]

#: The packages that hold NIXL's bindings, in the order in which they are tried.
MODULES = ("nixl", "nixl_cu12", "nixl_cu13")

#: Variables that keep the logs of NIXL and UCX out of stdout, which may be a program's data. What the user set stays.
_LOG_VARIABLES = {"NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_FILE": "stderr"}

#: How long the thread that answers readers sleeps: it delays reads over TCP by this, and uses 1 % of a core.
_DELAY_MICROSECONDS = 2_000

_loading = threading.Lock()


def library() -> Any:  # noqa: ANN401 - a module without annotations, of one of several packages
    """NIXL's module with its classes.

    Raises:
        ModuleNotFoundError: No package of NIXL is installed.
        PluginLoadError: Those that are installed do not import.
    """
    with _loading:
        failure = None
        for package in MODULES:
            if importlib.util.find_spec(package) is None:
                continue
            try:
                return _imported(f"{package}._api")
            except ImportError as exc:
                failure = failure or (package, exc)
        if failure is None:
            raise ModuleNotFoundError(name="nixl")
        raise library_unusable(failure[0].replace("_", "-"), failure[1]) from failure[1]


def _imported(name: str) -> Any:  # noqa: ANN401 - as above
    for variable, value in _LOG_VARIABLES.items():
        os.environ.setdefault(variable, value)
    log = logging.getLogger("nixl")
    known = log.handlers[:]
    raise_exceptions = logging.raiseExceptions
    log.addFilter(_nothing)  # the import logs to stdout
    try:
        return importlib.import_module(name)
    finally:
        log.removeFilter(_nothing)
        logging.raiseExceptions = raise_exceptions  # NIXL changes it for the whole process
        if not known and log.handlers:  # NIXL's own, which writes to stdout
            log.handlers.clear()
            log.propagate = True


def _nothing(_record: logging.LogRecord) -> bool:
    return False


class Agent:
    """An agent of NIXL with one backend, and without a listener. Thread-safe.

    Args:
        name: Its name, which no other agent has.
        backend: The backend.
        answers: Whether others read from it: then a thread of NIXL answers them. One that only reads needs none,
            because ``is_done`` moves its reads on.

    Raises:
        ModuleNotFoundError: No package of NIXL is installed.
        PluginLoadError: It does not import.
        UnavailableError: The backend does not start.
    """

    def __init__(self, name: str, backend: str, *, answers: bool = False) -> None:
        nixl = library()
        self.name = name
        self.backend = backend
        config = nixl.nixl_agent_config(
            enable_prog_thread=False,
            enable_listen_thread=False,
            backends=[],
            sync_mode=nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_RW,
        )
        agent = nixl.nixl_agent(name, config)
        if answers:
            agent.agent = _answering(nixl.nixlBind, name)
        options = agent.get_plugin_params(backend)
        if backend == "UCX":
            options["ucx_error_handling_mode"] = "peer"  # without it, the death of a worker is not noticed
        try:
            agent.create_backend(backend, options)
        except Exception as exc:
            raise backend_fails(backend, exc, os.environ.get("UCX_TLS")) from exc
        self._agent: Any = agent

    @property
    def _open(self) -> Any:  # noqa: ANN401 - NIXL has no annotations
        agent = self._agent
        if agent is None:
            raise agent_closed()
        return agent

    def register(self, kind: str, rows: Rows) -> None:
        """Register memory: rows of address, bytes and device, of the kind DRAM or VRAM."""
        agent = self._open
        agent.register_memory(agent.get_reg_descs(rows, kind), backends=[self.backend])

    def metadata(self) -> bytes:
        """What other agents need to read the registered memory."""
        blob: bytes = self._open.get_agent_metadata()
        return blob

    def add(self, metadata: bytes) -> str:
        """Make another agent known, and return its name."""
        name = self._open.add_remote_agent(metadata)
        return name.decode(errors="replace") if isinstance(name, bytes) else str(name)

    def connect(self, name: str) -> None:
        """Connect to another agent. Without this, the first reads would wait for it even if CMA moves their bytes."""
        self._open.make_connection(name, backends=[self.backend])

    def remove(self, name: str) -> None:
        """Forget another agent, and end the connection to it."""
        self._open.remove_remote_agent(name)

    def new_read(self, name: str, local: tuple[str, Rows], remote: tuple[str, Rows]) -> Any:  # noqa: ANN401 - as above
        """A read of rows of another agent into rows of this process, which ``post`` begins."""
        agent = self._open
        into, origin = agent.get_xfer_descs(local[1], local[0]), agent.get_xfer_descs(remote[1], remote[0])
        return agent.initialize_xfer("READ", into, origin, name, backends=[self.backend])

    def post(self, read: Any) -> bool:  # noqa: ANN401 - as above
        """Begin a read; return whether it has ended already."""
        return bool(self._open.transfer(read) == "DONE")

    def is_done(self, read: Any) -> bool:  # noqa: ANN401 - as above
        """Whether a read has ended; raises if it has failed."""
        return bool(self._open.check_xfer_state(read) == "DONE")

    def close(self) -> None:
        """Destroy the agent: nothing reads or writes with it afterwards, if no read is under way."""
        self._agent = None


def _answering(bindings: Any, name: str) -> Any:  # noqa: ANN401 - NIXL has no annotations
    """An agent with a thread that answers others.

    NIXL's own class for Python lets the thread look for work all the time, which takes a whole core (NIXL 1.5.1). With
    a delay it sleeps until there is some.
    """
    config = bindings.nixlAgentConfig()
    config.useProgThread = True
    config.useListenThread = False
    config.syncMode = bindings.NIXL_THREAD_SYNC_RW
    config.pthrDelay = _DELAY_MICROSECONDS
    return bindings.nixlAgent(name, config)


def rows_of(ranges: Sequence[tuple[int, int, int]]) -> Rows:
    """Rows of address, bytes and device, as NIXL takes them."""
    import numpy as np

    return np.array(ranges, dtype=np.uint64).reshape(-1, 3)


def has_library() -> bool:
    """Whether a package of NIXL is installed. Imports none."""
    return any(importlib.util.find_spec(package) is not None for package in MODULES)
