"""Loads of a file that something writes to at random moments: every byte of one state of the file, or an error."""

from __future__ import annotations

import ctypes
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import modelexpress_core as mx
from modelexpress_core.errors import SourceChangedError
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from modelexpress_core.storage.file import FileStorage
from tests.support.checkpoints import safetensors_file
from tests.support.plugins import core_and

_BYTES = 1 << 18
_CHUNK_BYTES = 4096

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16


def _fallocate(path: Path, mode: int, offset: int, length: int) -> None:
    """Deallocate or zero a range; skips the test where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as stream:
        done = libc.fallocate(
            stream.fileno(), ctypes.c_int(mode | _KEEP_SIZE), ctypes.c_int64(offset), ctypes.c_int64(length)
        )
    if done:
        pytest.skip(f"fallocate({mode}): {os.strerror(ctypes.get_errno())}")


def _write(path: Path, offset: int, length: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(os.urandom(length))


_CHANGES: dict[str, Callable[[Path, int, int], None]] = {
    "write": _write,
    "punch": lambda path, offset, length: _fallocate(path, _PUNCH_HOLE, offset, length),
    "zero": lambda path, offset, length: _fallocate(path, _ZERO_RANGE, offset, length),
}


class _Announcing(FileStorage):
    """Announces the first read: by then the load has pinned the version."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned = threading.Event()

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        self.pinned.set()
        return super().read_into(path, offset, buffer, version=version)


class _Plugin:
    def __init__(self, storage: _Announcing) -> None:
        self._storage = storage

    @mx.hookimpl
    def mx_register_storages(self) -> list[StorageProvider]:
        can = StorageCapabilities(read_runs=True, recheck=True, concurrency=2, most_concurrency=2)
        return [StorageProvider("mx-changing", ("changing",), lambda _uri, _settings: self._storage, capabilities=can)]


class _Writer:
    """Changes a file a few times at random moments, with its modification time restored, and keeps every state."""

    def __init__(self, path: Path, change: Callable[[Path, int, int], None], seed: int) -> None:
        self._path = path
        self._change = change
        self._random = random.Random(seed)
        self.states = [self._tensor_bytes()]

    def _tensor_bytes(self) -> bytes:
        return self._path.read_bytes()[-_BYTES:]

    def change(self, pinned: threading.Event) -> None:
        assert pinned.wait(60)
        pause = threading.Event()
        for _ in range(self._random.randrange(4)):
            pause.wait(0.018 + self._random.random() * 0.01)  # a fresh file is read 20 ms after it was written
            length = self._random.randrange(1, _BYTES // 4)
            offset = self._path.stat().st_size - self._random.randrange(length, _BYTES + 1)
            before = self._path.stat()
            self._change(self._path, offset, length)
            os.utime(self._path, ns=(before.st_atime_ns, before.st_mtime_ns))
            self.states.append(self._tensor_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES)
def test_random_changes_during_loads_are_never_delivered_mixed(
    tmp_path: Path, change: Callable[[Path, int, int], None]
) -> None:
    """Forty loads: some succeed, with the bytes of one moment, and some fail."""
    path = tmp_path / "model.safetensors"
    outcomes: list[str] = []
    for seed in range(40):
        content = random.Random(seed).randbytes(_BYTES)
        path.write_bytes(safetensors_file({"weight": ("U8", [_BYTES], content)}))
        storage = _Announcing()
        writer = _Writer(path, change, seed)
        thread = threading.Thread(target=writer.change, args=(storage.pinned,))
        thread.start()
        try:
            loaded = mx.load_state_dict(
                f"changing://{path}",
                environ={"MX_CHUNK_BYTES": str(_CHUNK_BYTES)},
                plugins=core_and(mx_changing=_Plugin(storage)),
            )
        except SourceChangedError:
            outcomes.append("error")
        else:
            outcomes.append("loaded")
        finally:
            storage.pinned.set()
            thread.join()
        if outcomes[-1] == "loaded":
            assert bytes(loaded["weight"].numpy()) in writer.states, f"a mixture, with the seed {seed}"

    assert {"loaded", "error"} == set(outcomes)


def test_a_change_after_the_last_read_fails_the_load(tmp_path: Path) -> None:
    """The bytes may be of one moment, but nothing proves it: a mapped write shows in the times only later."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_file({"weight": ("U8", [4096], bytes(4096))}))
    block = mx.deferred_weights(path)

    with pytest.raises(SourceChangedError), block as weights:
        copies = {name: tensor + 1 for name, tensor in weights}
        before = path.stat()
        _write(path, 4096, 10)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert torch.equal(torch.ones(4096, dtype=torch.uint8), copies["weight"])
    assert block.report is None


def test_a_file_replaced_after_the_last_read_does_not_fail_the_load(tmp_path: Path) -> None:
    """What was read is the old file, which nothing changed."""
    path = tmp_path / "model.safetensors"
    content = safetensors_file({"weight": ("U8", [4096], bytes(4096))})
    path.write_bytes(content)
    block = mx.deferred_weights(path)

    with block as weights:
        copies = {name: tensor + 1 for name, tensor in weights}
        other = tmp_path / "other"
        other.write_bytes(content[::-1])
        os.replace(other, path)

    assert torch.equal(torch.ones(4096, dtype=torch.uint8), copies["weight"])
    assert block.report is not None
