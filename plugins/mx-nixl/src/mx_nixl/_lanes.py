"""Which way bytes take between two workers: a fabric of RDMA, shared memory of one host (CMA), or neither.

Two workers have a fabric in common if both publish its name. They share memory through CMA (Linux's system call
``process_vm_readv``) if the reader can read a nonce in the worker's memory, and UCX may use CMA on both sides. Else UCX
takes TCP or another lane, over which reads that have begun cannot be stopped.

A load ranks workers before it talks to them, by what they publish: the names of their fabrics, host, PID namespace and
process. Whether this process may read the memory of that process, the kernel says.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from attrs import frozen

from modelexpress_core.contracts.candidates import Peer, Tier
from modelexpress_core.messages import printable
from modelexpress_core.settings import from_env
from mx_nixl.settings import NixlSettings

__all__ = [
    "Lane",
    "Location",
    "allows",
    "fabrics",
    "here",
    "is_offered",
    "lane_between",
    "may_read_memory_of",
    "reads_memory_of",
    "shares_memory",
    "tier_of",
]

_log = logging.getLogger(__name__)

#: Names in UCX_TLS that include CMA, and those that include RDMA.
_CMA_NAMES = frozenset({"all", "cma", "sm", "shm"})
_RDMA_NAMES = frozenset({"all", "dc", "dc_mlx5", "dc_x", "ib", "rc", "rc_mlx5", "rc_v", "rc_verbs", "rc_x"})

_SYSFS = Path("/sys/class/infiniband")

#: What workers publish: identifiers of the running system and of the PID namespace, the names of their fabrics, and the
#: number of a process whose memory may be read through CMA.
_HOST_KEY = "mx_nixl_host"
_PID_NAMESPACE_KEY = "mx_nixl_pid_namespace"
_FABRICS_KEY = "mx_nixl_fabrics"
_PID_KEY = "mx_nixl_pid"

#: A value that is longer comes from no worker of ours.
_MAX_VALUE_LENGTH = 1024
_MAX_PID = (1 << 31) - 1


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

    def topology(self, pid: int | None = None) -> Mapping[str, str]:
        """What a worker publishes of it.

        Args:
            pid: The process of the worker, if all its tensors are in memory of the host.
        """
        entries = {_HOST_KEY: self.host, _PID_NAMESPACE_KEY: self.pid_namespace}
        if self.fabrics:
            entries[_FABRICS_KEY] = ",".join(self.fabrics)
        if self.cma and pid is not None:
            entries[_PID_KEY] = str(pid)
        return entries


@frozen
class Lane:
    """The way that bytes are meant to take between two workers. UCX chooses it in fact.

    Attributes:
        name: For logs.
        reason: Why it is not a faster one; empty for those that are fast.
        on_host: Whether reads go straight into memory of the host.
        on_device: Whether they go straight into memory of devices.
        in_calls: Whether this process alone writes what it reads, in its calls of NIXL: no device of a fabric does.
        low_bytes_per_second: A rate below it is far less than the lane can carry; 0 if nothing is known of it.
    """

    name: str
    reason: str = ""
    on_host: bool = False
    on_device: bool = False
    in_calls: bool = False
    low_bytes_per_second: float = 0.0

    @property
    def channel(self) -> str:
        """For reports: the name, and the reason."""
        return f"{self.name}: {self.reason}" if self.reason else self.name

    def explain_slowness(self, nbytes: int, seconds: float) -> str:
        """Why ``nbytes`` in ``seconds`` is far less than the lane can carry; empty if it is not, or not measurable."""
        if nbytes < _MEASURABLE_BYTES or seconds <= 0 or nbytes / seconds >= self.low_bytes_per_second:
            return ""
        rate, low = nbytes / seconds / 1e9, self.low_bytes_per_second / 1e9
        return (
            f"{nbytes / 1e9:.2f} GB came at {rate:.3f} GB/s, and {self.name} carries more than {low:.2f} GB/s; UCX may "
            "have taken another lane (UCX_PROTO_INFO=y shows which), or the machine or the network is busy"
        )


#: A shorter read says nothing of the rate.
_MEASURABLE_BYTES = 128 << 20

#: Far below what was measured of CMA (1.6 to 3.2 GB/s on two cores), and of any fabric of RDMA (100 Gbit/s and more).
_LOW_CMA = 0.25e9
_LOW_FABRIC = 1.0e9


def lane_between(theirs: Location, ours: Location, *, proven: bool) -> Lane:
    """The lane from a worker to a reader.

    Args:
        theirs: Where the worker runs.
        ours: Where the reader runs.
        proven: Whether the reader can read the worker's memory through CMA.
    """
    common = sorted({*theirs.fabrics} & {*ours.fabrics})
    cma = shares_memory(theirs, ours) and proven
    if common:
        return Lane(f"the fabric {common[0]}", on_host=True, on_device=True, low_bytes_per_second=_LOW_FABRIC)
    if cma:
        return Lane("shared memory (CMA)", on_host=True, in_calls=True, low_bytes_per_second=_LOW_CMA)
    return Lane("TCP or another lane", _why_neither(theirs, ours))


def _why_neither(theirs: Location, ours: Location) -> str:
    """Why two workers have neither a fabric in common nor shared memory."""
    if theirs.host != ours.host:
        return "the worker runs on another host, and they have no RDMA fabric in common"
    if theirs.pid_namespace != ours.pid_namespace:
        return "the worker runs in another PID namespace of this host"
    if not (theirs.cma and ours.cma):
        return "UCX_TLS or MX_NIXL_BACKEND of one of them leaves out shared memory (CMA)"
    return "this process may not read the memory of the worker's process"


def shares_memory(theirs: Location, ours: Location) -> bool:
    """Whether UCX may use CMA between both, as far as their places tell."""
    return (theirs.host, theirs.pid_namespace) == (ours.host, ours.pid_namespace) and theirs.cma and ours.cma


def tier_of(
    peer: Peer, settings: Mapping[str, str], environ: Mapping[str, str] = os.environ, sysfs: Path = _SYSFS
) -> Tier:
    """The position of a worker in the order of attempts, by what it publishes; that may be anything.

    It comes first if both sides have a fabric in common, or if it runs on this host and this process may read its
    memory. Else it comes after ``grpc``, which is far faster than NIXL over TCP.

    Raises:
        SettingsError: A variable cannot be used.
    """
    from mx_nixl._agent import has_library

    values = {key: _published(peer, key) for key in (_HOST_KEY, _PID_NAMESPACE_KEY, _FABRICS_KEY, _PID_KEY)}
    pid = _pid(values[_PID_KEY])
    theirs = Location(
        values[_HOST_KEY], values[_PID_NAMESPACE_KEY], tuple(filter(None, values[_FABRICS_KEY].split(","))), cma=pid > 0
    )
    ours = here(from_env(NixlSettings, settings), environ, sysfs)
    proven = shares_memory(theirs, ours) and may_read_memory_of(pid)
    lane = lane_between(theirs, ours, proven=proven)
    return Tier.FABRIC_PEER if lane.on_host and has_library() else Tier.OTHER_PEER


def _published(peer: Peer, key: str) -> str:
    """The value that a worker publishes; empty if there is none, or none of ours."""
    value: object = peer.topology.get(key, "")
    if isinstance(value, str) and len(value) <= _MAX_VALUE_LENGTH:
        return value
    shown = printable(repr(value)[:80])
    _log.debug("the worker %s publishes a wrong %s, which is not used: %s", printable(peer.worker_id[:80]), key, shown)
    return ""


def _pid(text: str) -> int:
    """The number of a process; 0 if ``text`` is none."""
    if not (text.isascii() and text.isdecimal() and len(text) < 11):
        return 0
    return number if (number := int(text)) <= _MAX_PID else 0


def here(settings: NixlSettings, environ: Mapping[str, str] = os.environ, sysfs: Path = _SYSFS) -> Location:
    """The location of this process. NIXL reads the variables of UCX from the process's environment alone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        namespace = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        boot, namespace = os.urandom(16), ""  # no other process has the same
    host = hashlib.blake2b(boot, digest_size=8).hexdigest()
    cma = settings.backend == "UCX" and allows(environ.get("UCX_TLS"), _CMA_NAMES)
    return Location(host, namespace, tuple(fabrics(settings, environ, sysfs)), cma=cma)


def allows(ucx_tls: str | None, names: frozenset[str]) -> bool:
    """Whether ``UCX_TLS`` allows one of the transports ``names``. Exceptions (``^tcp``) count as no."""
    words = {word.strip() for word in (ucx_tls or "all").split(",")}
    return not any(word.startswith("^") for word in words) and not words.isdisjoint(names)


def fabrics(settings: NixlSettings, environ: Mapping[str, str] = os.environ, sysfs: Path = _SYSFS) -> Iterator[str]:
    """Yield the names of the fabrics whose devices are active.

    A name is the kind of device, with the subnet of InfiniBand, and with ``MX_NIXL_FABRIC`` if that is set: RoCE is
    routed and EFA is not, so nothing else tells which of their devices reach each other.
    """
    chosen = {word.partition(":")[0].strip() for word in (environ.get("UCX_NET_DEVICES") or "all").split(",")}
    found = set()
    for port in sorted(sysfs.glob("*/ports/*")):
        device = port.parent.parent.name
        efa = device.startswith(("efa", "rdmap"))
        if efa is not (settings.backend == "LIBFABRIC") or not _text(port / "state").startswith("4:"):
            continue
        if efa:
            found.add("efa")
        elif allows(environ.get("UCX_TLS"), _RDMA_NAMES) and chosen & {"all", device}:
            if _text(port / "link_layer") == "InfiniBand":
                subnet = ":".join(_text(port / "gids" / "0").split(":")[:4])
                found.add(f"infiniband-{subnet}")
            else:
                found.add("roce")
    domain = f"@{settings.fabric}" if settings.fabric else ""
    yield from (f"{name}{domain}" for name in sorted(found))


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
    return has_library() and any(fabrics(chosen))


def reads_memory_of(pid: int, address: int, expected: bytes) -> bool:
    """Whether this process can read ``expected`` in the memory of another process, through CMA."""
    return _read(pid, address, len(expected)) == expected


def may_read_memory_of(pid: int) -> bool:
    """Whether the kernel lets this process read the memory of another one.

    It checks this before it looks at addresses. Nothing is at address 0, so that no byte is read.
    """
    ctypes.set_errno(0)
    return _read(pid, 0, 1) is not None or ctypes.get_errno() == errno.EFAULT


def _read(pid: int, address: int, nbytes: int) -> bytes | None:
    """Bytes of the memory of a process; None if they cannot be read."""
    libc = _libc()
    if not hasattr(libc, "process_vm_readv"):
        return None
    buffer = ctypes.create_string_buffer(nbytes)
    local = _IoVector(ctypes.addressof(buffer), nbytes)
    remote = _IoVector(address, nbytes)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    count = libc.process_vm_readv(
        ctypes.c_int(pid),
        ctypes.byref(local),
        ctypes.c_ulong(1),
        ctypes.byref(remote),
        ctypes.c_ulong(1),
        ctypes.c_ulong(0),
    )
    return buffer.raw if count == nbytes else None


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class _IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))
