"""Faults amid loads from other workers, in small numbers; ``python -m benchmarks peer_faults`` has hundreds of each."""

from __future__ import annotations

import contextlib

import pytest
import torch

import modelexpress_core as mx
from benchmarks.peer_fault_workers import Amid, Lane
from benchmarks.peer_faults import FRAMES, GRPC, NIXL, flips_in_memory, flips_on_the_wire, kills, readers, stops
from devtools.missing import ToolMissingError
from modelexpress_core.errors import BackendError
from modelexpress_core.testing import serving_worker
from tests.support.peers import empty_like, tensors_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("peer faults")]

_MIB = 48


@pytest.fixture(params=[GRPC, NIXL], ids=lambda lane: lane.scheme)
def lane(request: pytest.FixtureRequest) -> Lane:
    """Each transport."""
    found: Lane = request.param
    if found.scheme == "nixl":
        pytest.importorskip("mx_nixl")
        from mx_nixl._agent import has_library

        if not has_library():
            reason = "NIXL: pip install nixl-cu12 (x86-64 Linux)"
            raise ToolMissingError(reason)
    return found


def test_killed_sources_cost_no_load(lane: Lane) -> None:
    """Each is killed at a random point; a second source or a checkpoint has the rest, and every byte is right."""
    row = kills(lane, 3, _MIB)

    assert (3, 0, 0) == (row["right"], row["wrong"], row["failed"])
    assert row["details"]["noticed"]  # not each: the bytes that a source has sent may be all that it had to send


def test_a_stopped_source_writes_nothing_later(lane: Lane) -> None:
    """The load ends elsewhere; when the source goes on, the memory keeps what was written meanwhile."""
    row = stops(lane, 1, _MIB)

    assert 0 == row["wrong"]
    assert 1 == row["right"] + row["details"]["unusable"]


def test_killed_readers_leave_nothing_behind(lane: Lane) -> None:
    """No lease, descriptor, thread or mapping; the source serves the next reader."""
    row = readers(lane, 5, _MIB)

    assert (5, 0) == (row["count"] - row["failed"], row["wrong"])
    left = row["details"]["left over"]
    assert (0, 0, 0, 0) == tuple(max(0, left[what]) for what in ("leases", "descriptors", "threads", "mappings"))
    assert left["MiB"] < 8


def test_bits_that_change_in_memory_are_found(lane: Lane) -> None:
    """After publication, also at the ends of tensors of odd sizes: the load fails and names the tensor."""
    row = flips_in_memory(lane, 20)

    assert (20, 0, 0) == (row["right"], row["wrong"], row["failed"])


@pytest.mark.parametrize("wire", [GRPC, FRAMES], ids=["bulk", "frames"])
def test_bits_that_change_on_the_wire_are_found(wire: Lane) -> None:
    """In plain text, also in the frames of HTTP/2 and the heads of answers: no load delivers other bytes."""
    row = flips_on_the_wire(wire, 20)

    assert (20, 0) == (row["right"], row["wrong"])


def test_a_source_that_restarts_on_the_same_port_is_not_believed(lane: Lane) -> None:
    """Amid a load, with other weights of the same layout: the load fails, and the next one has the new weights."""
    old = dict(tensors_of(_MIB))
    new = {name: tensor.flip(0) for name, tensor in old.items()}
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        port = first.enter_context(serving_worker(old, [lane.scheme], environ=lane.environ)).port

        def restart(_: str) -> None:
            first.close()
            second.enter_context(serving_worker(new, [lane.scheme], environ=lane.environ, port=port))

        uri = f"{lane.scheme}://127.0.0.1:{port}/0123456789abcdef/w"
        with pytest.raises(BackendError):
            mx.load_into(empty_like(old), uri, environ={}, plugins=Amid(10 << 20, restart).manager())
        here = empty_like(old)
        mx.load_into(here, uri, environ={})

    assert [name for name, tensor in new.items() if not torch.equal(tensor, here[name])] == []
