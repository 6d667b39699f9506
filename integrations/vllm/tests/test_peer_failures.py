"""Workers of real vLLM that read from one that dies, stops, has damaged memory, or another version."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from devtools.seaweedfs import SeaweedFS
from integrations.vllm.tests.workers import NIXL, NO_NIXL, Server, Start, scheme

_CHECKSUMS = ("call", "compute_weight_checksums")

#: How long a load may take after the worker is gone that it read.
_MOST_SECONDS = 10.0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("sent", "transport"), [("SIGKILL", NO_NIXL), ("SIGSTOP", NIXL)])
def test_a_worker_that_is_gone_while_it_is_read_is_replaced_by_storage(
    sent: str,
    transport: dict[str, str],
    checkpoint: Callable[[str], Path],
    s3_server: SeaweedFS,
    server: Server,
    start: Start,
    faulty_plugin: str,
) -> None:
    """Soon, and into a new model, since the old one was written to. One that goes on later changes nothing any more."""
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", f"vllm/gone-{sent.lower()}")
    first = start(directory, uri, transport)
    assert "ready" == first.ready
    server.wait_for(1)
    expected = (first.do("tokens"), first.do(*_CHECKSUMS))
    signals = {"PYTHONPATH": faulty_plugin, "TEST_SIGNAL": sent, "TEST_SIGNALLED": str(first.process.pid)}
    second = start(directory, uri, {**transport, **signals})
    results = [(second.do("tokens"), second.do(*_CHECKSUMS))]
    if sent == "SIGSTOP":
        os.killpg(first.process.pid, signal.SIGCONT)
        assert expected == (first.do("tokens"), first.do(*_CHECKSUMS))
        results.append((second.do("tokens"), second.do(*_CHECKSUMS)))
    else:
        assert first.process.wait() < 0

    assert all(expected == result for result in results)
    assert "ModelExpress loads the weights into a new model, because" in second.log
    assert ["s3"] == [scheme(place) for place in second.loaded_from()]
    [seconds] = re.findall(r"SECONDS AFTER THE SIGNAL (\S+)", second.log)
    assert float(seconds) < _MOST_SECONDS


@pytest.mark.timeout(1800)
def test_damaged_memory_of_a_worker_is_not_served_to_others(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, server: Server, start: Start
) -> None:
    """Bits that flipped after the weights were offered: readers compare digests, and turn to storage."""
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", "vllm/damaged")
    first = start(directory, uri, NO_NIXL)
    assert "ready" == first.ready
    server.wait_for(1)
    tokens, checksums = first.do("tokens"), first.do(*_CHECKSUMS)
    first.do("damage")
    assert checksums != first.do(*_CHECKSUMS)
    second = start(directory, uri, NO_NIXL)

    assert (tokens, checksums) == (second.do("tokens"), second.do(*_CHECKSUMS))
    assert ["s3"] == [scheme(place) for place in second.loaded_from()]
    assert "ModelExpress loads the weights into a new model, because" in second.log
    assert "arrived twice with other bytes than the worker had when it offered them" in second.log


@pytest.mark.timeout(1800)
def test_other_weights_under_the_same_name_are_not_read_from_workers(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, server: Server, start: Start, changed: Path
) -> None:
    """A fine-tune in another place, and a new version in the same: all have one --model and equal shapes.

    One worker reads the new version from storage, and the next one reads that worker.
    """
    directory = checkpoint("llama")
    uri = s3_server.upload(directory, "models", "vllm/versions")
    engines = [start(directory, uri, NO_NIXL)]
    assert "ready" == engines[0].ready
    server.wait_for(1)
    engines.append(start(directory, s3_server.upload(changed, "models", "vllm/tuned"), NO_NIXL))
    assert "ready" == engines[1].ready
    server.wait_for(2)
    s3_server.upload(changed, "models", "vllm/versions")
    engines.append(start(directory, uri, NO_NIXL))
    assert "ready" == engines[2].ready
    server.wait_for(3)
    engines.append(start(directory, uri, NO_NIXL, load_format="mx-target"))
    base, *others = [(engine.do("tokens"), engine.do(*_CHECKSUMS)) for engine in engines]

    assert others[0] == others[1] == others[2] != base
    assert ["s3", "s3", "s3", "grpc"] == [scheme(place) for engine in engines for place in engine.loaded_from()]
