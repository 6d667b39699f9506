"""Which way bytes take: fabrics by a stand-in for sysfs, CMA by reading memory."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from mx_nixl._lanes import _CMA_NAMES, allows, fabrics, here, reads_memory_of


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
    assert here("UCX", {}) == here("UCX", {})
    assert here("UCX", {}).cma
    assert not here("UCX", {"UCX_TLS": "tcp"}).cma
    assert not here("LIBFABRIC", {}).cma
    assert {"mx_nixl_host", "mx_nixl_pid_namespace"} <= set(here("UCX", {}).topology)


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

    assert expected == list(fabrics(backend, environ, tmp_path))
    assert [] == list(fabrics(backend, environ, tmp_path / "none"))
