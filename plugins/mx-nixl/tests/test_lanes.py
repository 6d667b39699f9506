"""Which way bytes take: fabrics by a stand-in for sysfs, CMA by reading memory."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from modelexpress_core.contracts.candidates import Peer, Tier
from mx_nixl._agent import MODULES
from mx_nixl._lanes import (
    _CMA_NAMES,
    Lane,
    Location,
    allows,
    fabrics,
    here,
    lane_between,
    may_read_memory_of,
    reads_memory_of,
    tier_of,
)
from mx_nixl.settings import NixlSettings


@pytest.mark.parametrize(
    ("ucx_tls", "allowed"),
    [
        (None, True),
        ("", True),
        ("all", True),
        ("tcp", False),
        ("tcp,cma", True),
        ("rc, sm", True),
        ("^tcp", False),
        ("^cma", False),
        ("rc,cuda", False),
    ],
)
def test_what_ucx_tls_allows(ucx_tls: str | None, allowed: bool) -> None:
    """Exceptions count as no, so that nothing is believed that is not said."""
    assert allowed is allows(ucx_tls, _CMA_NAMES)


def test_memory_is_read_by_its_address() -> None:
    """Of this process; other bytes, and memory or a process that is not there, prove nothing."""
    buffer = ctypes.create_string_buffer(b"0123456789abcdef", 16)
    address = ctypes.addressof(buffer)

    assert reads_memory_of(os.getpid(), address, b"0123456789abcdef")
    assert not reads_memory_of(os.getpid(), address, b"0123456789abcdeX")
    assert not reads_memory_of(os.getpid(), 8, b"0123456789abcdef")
    assert not reads_memory_of((1 << 31) - 1, address, b"0123456789abcdef")


def test_processes_of_one_container_are_at_one_place() -> None:
    """And UCX's variables say whether CMA is allowed; only UCX has it."""
    assert here(NixlSettings(), {}) == here(NixlSettings(), {})
    assert here(NixlSettings(), {}).cma
    assert not here(NixlSettings(), {"UCX_TLS": "tcp"}).cma
    assert not here(NixlSettings(backend="LIBFABRIC"), {}).cma
    assert {"mx_nixl_host", "mx_nixl_pid_namespace"} <= set(here(NixlSettings(), {}).topology())


def device(sysfs: Path, name: str, state: str, layer: str, gid: str = "") -> None:
    port = sysfs / name / "ports" / "1"
    (port / "gids").mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    (port / "link_layer").write_text(f"{layer}\n")
    (port / "gids" / "0").write_text(f"{gid}\n")


@pytest.mark.parametrize(
    ("backend", "environ", "expected"),
    [
        ("UCX", {}, ["infiniband-fe80:0000:0000:0001", "roce"]),
        ("UCX", {"UCX_NET_DEVICES": "mlx5_1:1"}, ["roce"]),
        ("UCX", {"UCX_TLS": "tcp"}, []),
        ("UCX", {"UCX_TLS": "rc,cuda"}, ["infiniband-fe80:0000:0000:0001", "roce"]),
        ("LIBFABRIC", {}, ["efa"]),
    ],
)
def test_fabrics_of_a_stand_in_for_sysfs(
    tmp_path: Path, backend: str, environ: dict[str, str], expected: list[str]
) -> None:
    """Active ports alone; InfiniBand with its subnet."""
    device(tmp_path, "mlx5_0", "4: ACTIVE", "InfiniBand", "fe80:0000:0000:0001:b8ce:f603:0031:2a4e")
    device(tmp_path, "mlx5_1", "4: ACTIVE", "Ethernet")
    device(tmp_path, "mlx5_2", "1: DOWN", "InfiniBand", "fe80:0000:0000:0002:b8ce:f603:0031:2a4f")
    device(tmp_path, "rdmap0s6", "4: ACTIVE", "Unspecified")

    assert expected == list(fabrics(NixlSettings(backend=backend), environ, tmp_path))
    assert [] == list(fabrics(NixlSettings(backend=backend), environ, tmp_path / "none"))
    named = NixlSettings(backend=backend, fabric="zone-1")
    assert [f"{name}@zone-1" for name in expected] == list(fabrics(named, environ, tmp_path))


# -- the order of attempts ---------------------------------------------------------------------------------------------

_HERE = here(NixlSettings(), {})


def peer(**topology: Any) -> Peer:
    return Peer("id", "w", topology={f"mx_nixl_{name}": value for name, value in topology.items()})


def near(**topology: Any) -> Peer:
    """A worker in this process."""
    return peer(**{"host": _HERE.host, "pid_namespace": _HERE.pid_namespace, "pid": str(os.getpid()), **topology})


@pytest.mark.usefixtures("nixl")
def test_a_worker_whose_memory_may_be_read_comes_first() -> None:
    """That is one of this host and PID namespace, unless UCX may not use CMA, or the backend has none."""
    assert Tier.FABRIC_PEER is tier_of(near(), {}, {})
    assert Tier.OTHER_PEER is tier_of(near(), {}, {"UCX_TLS": "tcp"})
    assert Tier.OTHER_PEER is tier_of(near(), {"MX_NIXL_BACKEND": "LIBFABRIC"}, {})
    for other in ("host", "pid_namespace", "pid"):
        assert Tier.OTHER_PEER is tier_of(near(**{other: ""}), {}, {}), other
    assert Tier.OTHER_PEER is tier_of(near(host="0123456789abcdef"), {}, {})
    assert Tier.OTHER_PEER is tier_of(near(pid=str((1 << 31) - 1)), {}, {})


def test_without_nixl_no_worker_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Because it cannot be read here."""
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, None)

    assert Tier.OTHER_PEER is tier_of(near(), {}, {})


@pytest.mark.usefixtures("nixl")
def test_a_worker_on_a_fabric_in_common_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a stand-in for sysfs: the same kind of device, subnet and name of the network."""
    device(tmp_path, "mlx5_0", "4: ACTIVE", "InfiniBand", "fe80:0000:0000:0001:b8ce:f603:0031:2a4e")
    subnet = "infiniband-fe80:0000:0000:0001"
    for settings, theirs, tier in (
        ({}, f"roce,{subnet}", Tier.FABRIC_PEER),
        ({}, "roce", Tier.OTHER_PEER),
        ({}, "infiniband-fe80:0000:0000:0002", Tier.OTHER_PEER),
        ({}, f"{subnet}@a", Tier.OTHER_PEER),
        ({"MX_NIXL_FABRIC": "a"}, f"{subnet}@a", Tier.FABRIC_PEER),
        ({"MX_NIXL_FABRIC": "b"}, f"{subnet}@a", Tier.OTHER_PEER),
        ({"MX_NIXL_FABRIC": "b"}, subnet, Tier.OTHER_PEER),
    ):
        found = tier_of(peer(fabrics=theirs, host="0123456789abcdef"), settings, {}, tmp_path)

        assert tier is found, (settings, theirs)


@pytest.mark.parametrize("key", ["host", "pid_namespace", "fabrics", "pid"])
@pytest.mark.parametrize(
    "value", ["", "\0", "-1", "0", "٣", "9" * 5000, ",", "," * 100_000, "roce," * 50_000, "1e3", " 1", None, 7, b"x"]
)
@pytest.mark.usefixtures("nixl")
def test_what_a_stranger_publishes_brings_it_no_place_and_no_error(key: str, value: Any) -> None:
    """Whatever it is, and however long: the worker comes after the others."""
    assert Tier.OTHER_PEER is tier_of(peer(**{key: value}), {}, {})
    assert Tier.OTHER_PEER is tier_of(near(**{key: value}), {}, {}) or key == "fabrics"


@pytest.mark.usefixtures("nixl")
def test_the_rank_of_many_workers_is_found_quickly() -> None:
    """A thousand of them take far less than a second: nothing is opened or asked over the network."""
    worker = near(host="0123456789abcdef", fabrics="roce")
    begun = time.process_time()
    for _ in range(1000):
        tier_of(worker, {}, {})

    assert time.process_time() - begun < 1.0


def test_the_kernel_says_whose_memory_may_be_read() -> None:
    """Not that of another user, and of no process that is not there."""
    assert may_read_memory_of(os.getpid())
    assert not may_read_memory_of((1 << 31) - 1)
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    program = f"""
import os
from mx_nixl._lanes import may_read_memory_of
may_read_memory_of(1)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
print(may_read_memory_of({os.getpid()}))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert ("False\n", 0) == (ended.stdout, ended.returncode), ended.stderr


def test_a_worker_in_another_pid_namespace_comes_after_the_others() -> None:
    """As between two pods of one node: the host is the same, but CMA does not reach it."""
    program = """
import json, os
from mx_nixl._lanes import here
from mx_nixl.settings import NixlSettings
print(json.dumps(dict(here(NixlSettings(), {}).topology(os.getpid()))))
"""
    command = ["unshare", "--pid", "--fork", *(["--user"] if os.geteuid() else []), sys.executable, "-c", program]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        ended = None
    if ended is None or "unshare" in ended.stderr:
        pytest.skip("this user or this machine may not make PID namespaces")
    assert 0 == ended.returncode, ended.stderr
    published = json.loads(ended.stdout)

    assert _HERE.host == published["mx_nixl_host"]
    assert _HERE.pid_namespace != published["mx_nixl_pid_namespace"]
    assert Tier.OTHER_PEER is tier_of(Peer("id", "w", topology=published), {}, {})


# -- the lane ----------------------------------------------------------------------------------------------------------


def test_the_lane_is_the_best_one_that_both_have() -> None:
    """A fabric before shared memory; memory of devices is read in place over a fabric alone."""
    ours = Location("h", "1", ("efa", "roce"), cma=True)
    for theirs, proven, channel, on_host, on_device in (
        (Location("g", "2", ("roce",), cma=True), False, "the fabric roce", True, True),
        (Location("h", "1", ("roce",), cma=True), True, "the fabric roce", True, True),
        (Location("h", "1", (), cma=True), True, "shared memory (CMA)", True, False),
        (Location("h", "1", (), cma=True), False, ": this process may not read the memory of the", False, False),
        (Location("h", "1", (), cma=False), True, ": UCX_TLS or MX_NIXL_BACKEND of one of them", False, False),
        (Location("h", "2", (), cma=True), True, ": the worker runs in another PID namespace", False, False),
        (Location("g", "1", (), cma=True), True, ": the worker runs on another host", False, False),
    ):
        lane = lane_between(theirs, ours, proven=proven)

        assert channel in lane.channel
        assert (on_host, on_device) == (lane.on_host, lane.on_device)


def test_a_rate_far_below_that_of_the_lane_is_explained() -> None:
    """With both figures. Short reads, and lanes of which nothing is known, say nothing."""
    lane = Lane("shared memory (CMA)", low_bytes_per_second=0.4e9)

    assert "1.00 GB came at 0.050 GB/s, and shared memory (CMA) carries more than 0.40 GB/s" in lane.explain_slowness(
        10**9, 20.0
    )
    assert "" == lane.explain_slowness(10**9, 2.0)
    assert "" == lane.explain_slowness(10**6, 20.0)
    assert "" == lane.explain_slowness(10**9, 0.0)
    assert "" == Lane("TCP or another lane").explain_slowness(10**9, 20.0)
