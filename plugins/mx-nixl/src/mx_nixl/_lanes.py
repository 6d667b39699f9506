"""Which way bytes take between two workers: a fabric of RDMA, shared memory of one host (CMA), or neither.

Two workers have a fabric in common if both publish its name. They share memory through CMA (Linux's system call
``process_vm_readv``) if the reader can read a nonce in the worker's memory, and UCX may use CMA on both sides. Else UCX
takes TCP or another lane, over which reads that have begun cannot be stopped.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from attrs import frozen

from modelexpress_core.settings import from_env
from mx_nixl.settings import NixlSettings

__all__ = ["Location", "allows", "fabrics", "here", "is_offered", "reads_memory_of"]

#: Names in UCX_TLS that include CMA, and those that include RDMA.
_CMA_NAMES = frozenset({"all", "cma", "sm", "shm"})
_RDMA_NAMES = frozenset({"all", "dc", "dc_mlx5", "dc_x", "ib", "rc", "rc_mlx5", "rc_v", "rc_verbs", "rc_x"})

_SYSFS = Path("/sys/class/infiniband")


@frozen
class Location:
    """Where a process runs, as far as its lanes depend on it.

    Attributes:
        host: The same for all processes of one running system, containers included.
        pid_namespace: The same for all processes that see each other's numbers.
        fabrics: Names of the fabrics of this host that the backend uses.
        cma: Whether UCX may use CMA.
    """

    host: str
    pid_namespace: str
    fabrics: tuple[str, ...] = ()
    cma: bool = False

    @property
    def topology(self) -> Mapping[str, str]:
        """What the worker publishes of it."""
        entries = {"mx_nixl_host": self.host, "mx_nixl_pid_namespace": self.pid_namespace}
        return {**entries, "mx_nixl_fabrics": ",".join(self.fabrics)} if self.fabrics else entries


def here(backend: str, environ: Mapping[str, str] = os.environ) -> Location:
    """The location of this process. NIXL reads the variables of UCX from the process's environment alone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        namespace = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        boot, namespace = os.urandom(16), ""  # no other process has the same
    host = hashlib.blake2b(boot, digest_size=8).hexdigest()
    tls = environ.get("UCX_TLS")
    return Location(host, namespace, tuple(fabrics(backend, environ)), cma=backend == "UCX" and allows(tls, _CMA_NAMES))


def allows(ucx_tls: str | None, names: frozenset[str]) -> bool:
    """Whether ``UCX_TLS`` allows one of the transports ``names``. Exceptions (``^tcp``) count as no."""
    words = {word.strip() for word in (ucx_tls or "all").split(",")}
    return not any(word.startswith("^") for word in words) and not words.isdisjoint(names)


def fabrics(backend: str, environ: Mapping[str, str] = os.environ, sysfs: Path = _SYSFS) -> Iterator[str]:
    """Yield the names of the fabrics whose devices are active: the kind of device, and the subnet of InfiniBand."""
    chosen = {word.partition(":")[0].strip() for word in (environ.get("UCX_NET_DEVICES") or "all").split(",")}
    found = set()
    for port in sorted(sysfs.glob("*/ports/*")):
        device = port.parent.parent.name
        efa = device.startswith(("efa", "rdmap"))
        if efa is not (backend == "LIBFABRIC") or not _text(port / "state").startswith("4:"):
            continue
        if efa:
            found.add("efa")
        elif allows(environ.get("UCX_TLS"), _RDMA_NAMES) and chosen & {"all", device}:
            if _text(port / "link_layer") == "InfiniBand":
                subnet = ":".join(_text(port / "gids" / "0").split(":")[:4])
                found.add(f"infiniband-{subnet}")
            else:
                found.add("roce")
    yield from sorted(found)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def is_offered(settings: Mapping[str, str]) -> bool:
    """Whether workers offer their tensors over NIXL: if the user says so, or NIXL and a fabric are there."""
    from mx_nixl._agent import has_library

    chosen = from_env(NixlSettings, settings)
    if chosen.offer is not None:
        return chosen.offer
    return has_library() and any(fabrics(chosen.backend))


def reads_memory_of(pid: int, address: int, expected: bytes) -> bool:
    """Whether this process can read ``expected`` in the memory of another process, through CMA."""
    libc = _libc()
    if not hasattr(libc, "process_vm_readv"):
        return False
    buffer = ctypes.create_string_buffer(len(expected))
    local = _IoVector(ctypes.addressof(buffer), len(expected))
    remote = _IoVector(address, len(expected))
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    count = libc.process_vm_readv(
        ctypes.c_int(pid),
        ctypes.byref(local),
        ctypes.c_ulong(1),
        ctypes.byref(remote),
        ctypes.c_ulong(1),
        ctypes.c_ulong(0),
    )
    return bool(count == len(expected) and buffer.raw == expected)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class _IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))
