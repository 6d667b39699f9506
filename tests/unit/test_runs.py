"""Many short runs in one read: columns of matrices, exactly and quickly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import modelexpress_core as mx
from modelexpress_core.errors import BackendError, SourceChangedError, UnavailableError
from modelexpress_core.fetch import RetryBudget, RetryingStorage, RetryPolicy
from modelexpress_core.storage.file import FileStorage
from tests.support.properties import examples

CONTENT = os.urandom(300_000)


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    return str(file)


def expected(offset: int, run: int, stride: int, count: int) -> bytes:
    return b"".join(CONTENT[start : start + run] for start in range(offset, offset + count * stride, stride))


@settings(max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2000), st.integers(1, 900), st.integers(1, 9000), st.integers(1, 30))
def test_runs_are_read_exactly(path: str, offset: int, run: int, gap: int, count: int) -> None:
    """Whatever the gap: read along where it is short, skipped where it is long."""
    buffer = bytearray(run * count)
    storage = FileStorage()
    version = storage.stat(path).version

    done = storage.read_runs(path, offset, run, run + gap, memoryview(buffer), version=version)

    assert done == len(buffer)
    assert bytes(buffer) == expected(offset, run, run + gap, count)
    storage.close()


@pytest.mark.parametrize("gap", [10, 9000])
def test_runs_end_where_the_file_ends(path: str, gap: int) -> None:
    """Whole runs count, a part of one does not, and nothing is written after what counts."""
    run, count = 1000, 400
    buffer = bytearray(run * count)
    storage = FileStorage()

    done = storage.read_runs(path, 0, run, run + gap, memoryview(buffer), version=None)

    whole = (len(CONTENT) - run) // (run + gap) + 1
    assert done == whole * run
    assert bytes(buffer[:done]) == expected(0, run, run + gap, whole)
    storage.close()


def test_runs_of_a_changed_file_are_refused(path: str) -> None:
    """The version counts here as it does for any read."""
    storage = FileStorage()
    version = storage.stat(path).version
    buffer = memoryview(bytearray(2000))
    storage.read_runs(path, 0, 1000, 5000, buffer, version=version)
    os.truncate(path, 200_000)

    with pytest.raises(SourceChangedError):
        storage.read_runs(path, 0, 1000, 5000, buffer, version=version)
    storage.close()


class Breaking(FileStorage):
    """Breaks off after a few runs, or before the first, as its script says."""

    def __init__(self, script: list[int | BackendError]) -> None:
        super().__init__()
        self.script = script

    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        step = self.script.pop(0) if self.script else len(buffer)
        if isinstance(step, BackendError):
            raise step
        return super().read_runs(path, offset, run_bytes, stride_bytes, buffer[:step], version=version)


def retrying(storage: FileStorage) -> RetryingStorage:
    return RetryingStorage(storage, RetryPolicy(attempts=3), RetryBudget(10), uniform=lambda _low, _high: 0.0)


def test_runs_resume_at_the_first_missing_run(path: str) -> None:
    """What arrived is kept; the next call begins with the run after it."""
    buffer = bytearray(50 * 100)
    storage = Breaking([300, UnavailableError("reset"), 1000, UnavailableError("reset")])

    retrying(storage).read_runs(path, 7, 100, 2500, memoryview(buffer), version=None)

    assert bytes(buffer) == expected(7, 100, 2500, 50)
    assert storage.script == []


def test_a_part_of_a_run_is_no_answer(path: str) -> None:
    """A storage that counts parts of runs would shift all that follows."""

    class Wrong(FileStorage):
        def read_runs(self, *_args: object, **_options: object) -> int:
            return 150

    with pytest.raises(BackendError, match="returned 150"):
        retrying(Wrong()).read_runs(path, 0, 100, 200, memoryview(bytearray(1000)), version=None)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_columns_arrive_wherever_they_go(tmp_path: Path, data: st.DataObject) -> None:
    """Column slices into contiguous, strided, transposed and other-typed destinations, at any chunk size."""
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 300))
    weight = torch.arange(rows * columns, dtype=torch.int32).reshape(rows, columns)
    save_file({"w": weight, "filler": torch.zeros(9000)}, tmp_path / "model.safetensors")
    start = data.draw(st.integers(0, columns - 1))
    width = data.draw(st.integers(1, columns - start))
    kind = data.draw(st.sampled_from(["contiguous", "strided", "transposed", "cast"]))
    destination = {
        "contiguous": lambda: torch.zeros(rows, width, dtype=torch.int32),
        "strided": lambda: torch.zeros(rows, 2 * width + 1, dtype=torch.int32)[:, 1 : 2 * width + 1 : 2],
        "transposed": lambda: torch.zeros(width, rows, dtype=torch.int32).t(),
        "cast": lambda: torch.zeros(rows, width, dtype=torch.float64),
    }[kind]()
    environ = {"MX_CHUNK_BYTES": str(data.draw(st.sampled_from([64, 1000, 8 << 20])))}

    with mx.deferred_weights(tmp_path, environ=environ) as weights:
        destination.copy_(dict(weights)["w"].narrow(1, start, width))

    assert torch.equal(weight.narrow(1, start, width), destination.to(torch.int32))
    assert weights.report is not None
    assert weights.report.bytes_needed == 4 * rows * width


def test_columns_take_few_calls_and_no_byte_too_many(tmp_path: Path) -> None:
    """A rank's eighth of a matrix by columns: its bytes alone, in a handful of calls."""
    save_file({"w": torch.randn(2048, 2048)}, tmp_path / "model.safetensors")

    with mx.deferred_weights(tmp_path, environ={}) as weights:
        part = torch.empty(2048, 256)
        part.copy_(dict(weights)["w"].narrow(1, 512, 256))

    assert weights.report is not None
    assert weights.report.bytes_fetched == weights.report.bytes_needed == part.nbytes
    assert weights.report.requests <= 4
