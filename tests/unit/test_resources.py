"""Too few threads, too little memory, devices that torch does not know: errors of ours, before or amid a load."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import modelexpress_core as mx
from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.errors import PlacementError, ResourceError
from modelexpress_core.providers import StorageProvider
from modelexpress_core.resources import allocating, start_thread, starting_threads
from tests.support.plugins import core_and


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 64 MiB in 64 tensors."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file({f"weight.{number}": torch.full((1 << 20,), number, dtype=torch.uint8) for number in range(64)}, path)
    return path


def _run(code: str, *arguments: object) -> str:
    """The output of ``code`` in another Python, whose limits do not concern this one."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MX_CONCURRENCY": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- threads -----------------------------------------------------------------------------------------------------------

#: Leaves so much address space that only a few stacks of threads fit: root ignores the limit of processes.
_FEW_THREADS = """
import resource, sys, threading
import torch
import modelexpress_core as mx
path, stack, spare = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
mx.load_state_dict(path)  # what is loaded at first use takes its address space
threading.stack_size(stack)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))
try:
    state = mx.load_state_dict(path)
except BaseException as exc:
    print(type(exc).__name__, exc)
else:
    print("loaded", len(state), all(bool((t == int(n.split(".")[1])).all()) for n, t in state.items()))
print("threads", sum(t.name.startswith("mx-") for t in threading.enumerate()))
"""


@pytest.mark.slow
def test_a_real_limit_on_threads(model: Path) -> None:
    """The stack of the first thread does not fit into the address space that is left."""
    printed = _run(_FEW_THREADS, model, 1 << 30, 512 << 20)

    assert printed.startswith("ResourceError"), printed
    assert "no thread could be started" in printed
    assert "ulimit -u" in printed
    assert printed.endswith("threads 0\n")


_NO_ROOM = """
import resource, sys, threading
from modelexpress_core.errors import ResourceError
from modelexpress_core.resources import start_thread
threading.stack_size(256 << 10)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 10), resource.RLIM_INFINITY))
try:
    start_thread(threading.Thread(target=print), "serve")
except ResourceError as exc:
    print(exc)
"""


@pytest.mark.slow
def test_a_real_limit_that_leaves_room_for_a_stack_alone() -> None:
    """Such a thread ends before it runs, and Python would wait for it without end."""
    assert _run(_NO_ROOM).startswith("could not serve: no thread could be started")


class _FewThreads:
    """In place of ``Thread.start``: fails after so many threads whose name begins with a prefix."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prefix: str, allowed: int) -> None:
        start = threading.Thread.start
        self.started = 0

        def limited(thread: threading.Thread) -> None:
            if thread.name.startswith(prefix):
                if self.started >= allowed:
                    raise RuntimeError("can't start new thread")
                self.started += 1
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)


@pytest.mark.parametrize("prefix", ["mx-fetch", "mx-header"])
def test_mocked_no_thread_is_left(model: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    """The load ends with our error, and no thread of it is left."""
    _FewThreads(monkeypatch, prefix, 0)

    with pytest.raises(ResourceError, match="no thread could be started") as caught:
        mx.load_state_dict(model)

    assert caught.value.cause
    assert caught.value.hint
    assert [] == [thread.name for thread in threading.enumerate() if thread.name.startswith("mx-fetch")]


def test_mocked_few_threads_are_enough(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With those that could be started the load goes on, and says so once."""
    limited = _FewThreads(monkeypatch, "mx-fetch", 1)  # even with two processors a load begins with more

    state = mx.load_state_dict(model)

    assert 1 == limited.started
    assert all(bool((tensor == int(name.split(".")[1])).all()) for name, tensor in state.items())
    assert ["the load goes on without more threads than 1"] == [
        record.message.partition(":")[0] for record in caplog.records if "threads" in record.message
    ]


def test_mocked_no_thread_for_a_pull(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those that fetch, and those that verify."""
    for prefix in ("mx-verify", "mx-fetch"):
        with monkeypatch.context() as patched:
            _FewThreads(patched, prefix, 0)
            with pytest.raises(ResourceError):
                mx.pull(model.parent, tmp_path / prefix, environ={})


def test_mocked_no_thread_for_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """One place turns the failure into our error, and leaves other failures alone."""
    with monkeypatch.context() as patched:
        _FewThreads(patched, "mx-", 0)
        with pytest.raises(ResourceError, match="could not serve: no thread"):
            start_thread(threading.Thread(target=print, name="mx-any"), "serve")
        with (
            pytest.raises(ResourceError),
            starting_threads("serve"),
            ThreadPoolExecutor(1, thread_name_prefix="mx-any") as pool,
        ):
            pool.submit(print)
    with pytest.raises(RuntimeError, match="other") as caught, starting_threads("serve"):
        raise RuntimeError("other")
    assert not isinstance(caught.value, ResourceError)


def test_every_start_of_a_thread_in_core_is_translated() -> None:
    """No module starts a thread by itself, so that none raises Python's own error."""
    core = Path(mx.__file__).parent
    starts = [
        str(path.relative_to(core))
        for path in core.rglob("*.py")
        if path.name != "resources.py" and path.parent.name != "testing"
        for line in path.read_text().splitlines()
        if "thread.start()" in line.lower() or ("Thread(" in line and ").start()" in line)
    ]

    assert [] == starts


# -- memory ------------------------------------------------------------------------------------------------------------

_LITTLE_MEMORY = """
import resource, sys, threading
import torch
import modelexpress_core as mx
path, spare, use = sys.argv[1], int(sys.argv[2]), sys.argv[3]
threading.stack_size(256 << 10)
kept = mx.load_state_dict(path)  # its memory cannot serve the next load
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))
try:
    if use == "state":
        mx.load_state_dict(path)
    else:
        with torch.device("meta"):
            model = torch.nn.ModuleDict({"weight": torch.nn.Module()})
            for number in range(64):
                model["weight"].register_buffer(str(number), torch.empty(1 << 20, dtype=torch.uint8))
        mx.load_into(model, path)
except BaseException as exc:
    print(type(exc).__name__, exc)
"""


@pytest.mark.slow
@pytest.mark.parametrize("use", ["state", "model"])
def test_a_real_limit_on_memory(model: Path, use: str) -> None:
    """The tensors take 64 MiB, and half of that is left. The stack of a thread may be what does not fit any more."""
    printed = _run(_LITTLE_MEMORY, model, 32 << 20, use)

    assert printed.startswith("ResourceError"), printed
    assert "could not allocate memory for " in printed or "no memory for a stack" in printed
    assert "Likely cause" in printed
    assert "Next step" in printed


class _Hungry:
    """A storage of which a read needs more memory than there is."""

    def __init__(self, path: Path, *, headers: bool) -> None:
        self._content = path.read_bytes()
        self._headers = headers

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        yield self.stat("model/model.safetensors")

    def stat(self, path: str) -> ObjectInfo:
        return ObjectInfo(path, len(self._content), "v")

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        if self._headers or offset:
            raise MemoryError
        buffer[:] = self._content[offset : offset + len(buffer)]
        return len(buffer)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("headers", [True, False])
def test_mocked_no_memory_for_a_read(model: Path, headers: bool) -> None:
    """In a thread that fetches, and in one that reads headers."""
    storage = _Hungry(model, headers=headers)

    class Plugin:
        @mx.hookimpl
        def mx_register_storages(self) -> list[StorageProvider]:
            return [StorageProvider("mx-hungry", ("hungry",), lambda _uri, _settings: storage)]

    with pytest.raises(ResourceError, match=r"could not allocate memory for .*hungry://host/model"):
        mx.load_state_dict("hungry://host/model", plugins=core_and(mx_hungry=Plugin()), environ={})


def test_messages_of_torch_are_understood() -> None:
    """Those of its allocators for host memory and for GPUs; other failures stay what they are."""
    said = [
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "[enforce fail at alloc_cpu.cpp:83] data. DefaultCPUAllocator: not enough memory: you tried to allocate",
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of",
        "CUDA error: out of memory",
    ]
    for text in said:
        with pytest.raises(ResourceError, match="for the tensor a: "), allocating("the tensor a"):
            raise RuntimeError(text)
    with pytest.raises(ResourceError) as bare, allocating("the tensor a"):
        raise MemoryError
    assert "could not allocate memory for the tensor a" == bare.value.headline
    with pytest.raises(RuntimeError, match="shape") as caught, allocating("the tensor a"):
        raise RuntimeError("shape mismatch")
    assert not isinstance(caught.value, ResourceError)


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "cpu:x", "", "meta", "privateuseone"])
def test_a_device_that_torch_cannot_use(model: Path, device: str) -> None:
    """Refused before anything is read, with the name and what to pass."""
    target: Any = nn.Linear(2, 2)
    calls = (
        lambda: mx.load_state_dict(model, device=device),
        lambda: mx.load_into(target, model, device=device),
    )
    for call in calls:
        with pytest.raises(PlacementError) as caught:
            call()
        assert repr(device) in str(caught.value)
        assert "'cpu'" in str(caught.value.hint)


def test_devices_that_torch_knows(model: Path) -> None:
    """By name or as torch's own object."""
    for device in ("cpu", torch.device("cpu")):
        assert 64 == len(mx.load_state_dict(model, device=device))
