"""FaultyStorage does what its policy says, the same way each time, and a load gets through what can be got through."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest

import modelexpress_core as mx
from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.errors import (
    BackendError,
    DeadlineError,
    SourceChangedError,
    ThrottledError,
    UnavailableError,
)
from modelexpress_core.fetch import RetryBudget, RetryingStorage, RetryPolicy
from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from modelexpress_core.storage.file import FileStorage
from modelexpress_core.storage.memory import MemoryStorage
from modelexpress_core.testing import FaultPolicy, FaultyStorage
from modelexpress_core.uri import ModelURI
from tests.support.checkpoints import safetensors_file, tensor

_CONTENT = bytes(range(256)) * 40


def faulty(**policy: Any) -> FaultyStorage:
    inner = MemoryStorage()
    inner.put("a", _CONTENT)
    return FaultyStorage(inner, FaultPolicy(**policy))


def read(storage: Any, offset: int = 0, length: int = len(_CONTENT), version: str | None = None) -> bytes:
    buffer = bytearray(length)
    count = storage.read_into("a", offset, memoryview(buffer), version=version)
    return bytes(buffer[:count])


def test_a_reset_is_a_short_read_and_then_an_error() -> None:
    """The bytes before it are right; the read that goes on fails once, retryably, and the next one works."""
    storage = faulty(first=["reset"])

    before = read(storage)

    assert 0 < len(before) < len(_CONTENT)
    assert _CONTENT[: len(before)] == before
    with pytest.raises(UnavailableError, match="reset") as caught:
        read(storage, len(before), 100)
    assert caught.value.retryable
    assert _CONTENT[len(before) : len(before) + 100] == read(storage, len(before), 100)
    assert Counter(reset=1) == storage.injected
    assert Counter(read_into=2) == storage.calls


def test_a_reset_before_the_first_byte_is_an_error() -> None:
    """One byte leaves nothing that could have come before."""
    with pytest.raises(UnavailableError, match="reset"):
        read(faulty(reset=1), 0, 1)


def test_a_truncation_is_a_short_read_and_nothing_else() -> None:
    """The next read goes on."""
    storage = faulty(first=["truncation"])

    before = read(storage)

    assert len(before) < len(_CONTENT)
    assert _CONTENT == before + read(storage, len(before))


@pytest.mark.parametrize(
    ("fault", "kind", "says", "after"),
    [("unavailable", UnavailableError, "503", None), ("throttled", ThrottledError, "429", 1.5)],
)
def test_a_server_that_refuses(fault: str, kind: type[BackendError], says: str, after: float | None) -> None:
    """503 and 429; the latter with what the server asks for, and as a complaint that lowers concurrency."""
    storage = faulty(first=[fault], retry_after_seconds=1.5)

    with pytest.raises(UnavailableError, match=says) as caught:
        read(storage)

    assert kind is type(caught.value)
    assert caught.value.retryable
    assert after == caught.value.retry_after_seconds
    assert _CONTENT == read(storage)


def test_a_stall_lasts_as_long_as_it_is_said_to() -> None:
    """And then the bytes come."""
    begun = time.monotonic()

    content = read(faulty(first=["stall"], stall_seconds=0.1))

    assert _CONTENT == content
    assert time.monotonic() - begun >= 0.1


def test_closing_ends_a_stall() -> None:
    """With an error that is not retryable."""
    storage = faulty(stall=1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(read, storage)
        time.sleep(0.05)

        assert not waiting.done()
        storage.close()
        with pytest.raises(BackendError, match="closed") as caught:
            waiting.result(5)
    assert not caught.value.retryable


@pytest.mark.parametrize("silence", [{"stall": 1}, {"stall": 1, "stall_seconds": 60}, {"latency_seconds": 60}])
def test_patience_ends_silence(silence: dict[str, float]) -> None:
    """With a retryable DeadlineError, as it was set last; of calls that read nothing it says nothing."""
    storage = faulty(**silence)
    assert math.inf == storage.patience_seconds
    storage.patience_seconds = 0.1
    begun = time.monotonic()

    with pytest.raises(DeadlineError, match=r"no answer for 0\.1 s") as caught:
        read(storage)

    assert 0.1 <= time.monotonic() - begun < 5
    assert caught.value.retryable


def test_a_stall_that_is_shorter_than_the_patience_ends_in_bytes() -> None:
    """It was slow, and no more."""
    storage = faulty(first=["stall"], stall_seconds=0.05)
    storage.patience_seconds = 5.0

    assert _CONTENT == read(storage)


def test_patience_reaches_the_inner_storage() -> None:
    """A storage that is patient itself stays so behind faults, and what it begins with is told."""
    inner = faulty()
    inner.patience_seconds = 30.0
    outer = FaultyStorage(inner, FaultPolicy())

    begins_with = outer.patience_seconds
    outer.patience_seconds = 3.0

    assert 30.0 == begins_with
    assert 3.0 == inner.patience_seconds


def test_one_bit_is_flipped() -> None:
    """Exactly one, and nothing tells of it."""
    content = read(faulty(first=["flipped_bit"]))

    difference = int.from_bytes(content, "big") ^ int.from_bytes(_CONTENT, "big")
    assert 1 == difference.bit_count()
    assert len(_CONTENT) == len(content)


def test_a_changed_object_is_another_version_with_other_bytes() -> None:
    """Reads of the old version fail; of the new one, or of any, they bring the new bytes: as a real storage's would."""
    storage = faulty(first=[None, "changed"])
    old = storage.stat("a")
    assert _CONTENT == read(storage, version=old.version)

    with pytest.raises(SourceChangedError) as caught:
        read(storage, version=old.version)

    new = storage.stat("a")
    assert not caught.value.retryable
    assert old.version != new.version
    assert old.size == new.size
    assert bytes(255 - byte for byte in _CONTENT) == read(storage, version=new.version) == read(storage)
    assert [new] == list(storage.list(""))
    storage.replace("a")
    with pytest.raises(SourceChangedError):
        read(storage, version=new.version)


def test_latency_and_bandwidth_take_their_time() -> None:
    """Each read takes at least what they say."""
    begun = time.monotonic()

    read(faulty(latency_seconds=0.05))
    read(faulty(bytes_per_second=len(_CONTENT) * 10))

    assert time.monotonic() - begun >= 0.15


@pytest.mark.slow
def test_reads_share_a_line() -> None:
    """Four reads at once take as long as one after another, where each alone would be as fast as all together."""
    whole = 4 * len(_CONTENT)

    def seconds(**policy: Any) -> float:
        storage = faulty(**policy)
        begun = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            assert [_CONTENT] * 4 == list(pool.map(lambda _: read(storage), range(4)))
        return time.monotonic() - begun

    together = seconds(total_bytes_per_second=whole / 0.8)

    assert 0.8 <= together
    assert seconds(bytes_per_second=whole / 0.8) < together
    assert 0.3 <= seconds(total_bytes_per_second=whole / 0.1, bytes_per_second=len(_CONTENT) / 0.3)


def test_a_line_that_was_idle_gives_nothing_back() -> None:
    """What was not sent while nobody asked is not sent faster later."""
    storage = faulty(total_bytes_per_second=len(_CONTENT) / 0.1)
    read(storage)
    time.sleep(0.15)
    begun = time.monotonic()

    read(storage)

    assert time.monotonic() - begun >= 0.1


def test_runs_are_read_where_the_inner_storage_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With faults of their own; what is short is so by whole runs, and goes on at the next one."""
    monkeypatch.chdir(tmp_path)
    path = "a"  # the same in each run, since what is short depends on it
    Path(path).write_bytes(_CONTENT)
    expected = b"".join(_CONTENT[start : start + 10] for start in range(0, 5000, 25))

    def runs(storage: Any, done: int = 0) -> bytes:
        buffer = bytearray(len(expected) - done)
        offset = done // 10 * 25
        return bytes(buffer[: storage.read_runs(path, offset, 10, 25, memoryview(buffer), version=None)])

    def wrapped(**policy: Any) -> FaultyStorage:
        return FaultyStorage(FileStorage(), FaultPolicy(**policy))

    short = wrapped(first=["truncation"])
    begin = runs(short)
    assert len(begin) < len(expected)
    assert 0 == len(begin) % 10
    assert expected == begin + runs(short, len(begin))

    broken = wrapped(first=["reset"], seed=2)
    begin = runs(broken)
    assert 0 < len(begin) < len(expected)
    with pytest.raises(UnavailableError, match="reset"):
        runs(broken, len(begin))
    assert expected == begin + runs(broken, len(begin))

    flipped = int.from_bytes(runs(wrapped(first=["flipped_bit"])), "big") ^ int.from_bytes(expected, "big")
    assert 1 == flipped.bit_count()
    with pytest.raises(ThrottledError):
        runs(wrapped(throttled=1))
    assert expected == runs(wrapped(throttled=1, operations=["read_into"]))
    assert bytes(255 - byte for byte in expected) == runs(wrapped(first=["changed"]))
    assert {"read_runs": 2} == broken.calls
    assert not hasattr(faulty(), "read_runs")


class Publishing(MemoryStorage):
    """Tells the SHA-256 of what it holds."""

    def stat(self, path: str) -> ObjectInfo:
        content = self._get(path, "read")[1]
        return attrs.evolve(super().stat(path), digests={"sha256": hashlib.sha256(content).hexdigest()})


def test_digests_are_told_until_the_object_is_another() -> None:
    """Those of the inner storage are right as long as the bytes are its own."""
    inner = Publishing()
    inner.put("a", _CONTENT)
    storage = FaultyStorage(inner, FaultPolicy())

    assert {"sha256": hashlib.sha256(_CONTENT).hexdigest()} == storage.stat("a").digests
    storage.replace("a")
    assert {} == storage.stat("a").digests


def test_listings_break_after_some_objects() -> None:
    """What came before is right, and the next listing is whole."""
    inner = MemoryStorage()
    for number in range(20):
        inner.put(f"model/{number:02}", b"x")
    storage = FaultyStorage(inner, FaultPolicy(first=["reset"], operations=["list"]))
    seen = []

    with pytest.raises(UnavailableError, match="reset"):
        seen += [info.path for info in storage.list("model")]
    listed = [info.path for info in storage.list("model")]

    assert [] == seen
    assert 20 == len(listed)


def test_only_the_named_operations_have_faults() -> None:
    """By default those are reads."""
    storage = faulty(unavailable=1)
    with pytest.raises(UnavailableError):
        read(storage)

    assert len(_CONTENT) == storage.stat("a").size
    with pytest.raises(UnavailableError):
        faulty(unavailable=1, operations=["stat"]).stat("a")


def test_faults_do_not_depend_on_the_order_of_calls() -> None:
    """The same reads meet the same faults, in any order and from any thread; another seed gives others."""
    offsets = range(0, len(_CONTENT), 64)

    def lengths(order: Any, **policy: Any) -> Mapping[int, int]:
        storage = faulty(truncation=0.3, **policy)
        with ThreadPoolExecutor(4) as pool:
            return dict(pool.map(lambda offset: (offset, len(read(storage, offset, 64))), order))

    first = lengths(offsets)

    assert first == lengths(reversed(offsets))
    assert first != lengths(offsets, seed=1)
    assert 0.15 < sum(length < 64 for length in first.values()) / len(first) < 0.45


def test_there_are_no_more_faults_than_were_asked_for() -> None:
    """After the last one everything works."""
    storage = faulty(unavailable=1, most=3)

    for _ in range(3):
        with pytest.raises(UnavailableError):
            read(storage)

    assert _CONTENT == read(storage)
    assert Counter(unavailable=3) == storage.injected


def test_counts_are_right_from_many_threads() -> None:
    """None is lost."""
    storage = faulty(truncation=1)
    threads = [threading.Thread(target=lambda: [read(storage, 0, 9) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert Counter(truncation=400) == storage.injected


@pytest.mark.parametrize(
    "policy",
    [
        {"reset": 1.5},
        {"reset": -0.1},
        {"reset": 0.6, "stall": 0.6},
        {"first": ["explosion"]},
        {"operations": ["write"]},
        {"total_bytes_per_second": 0},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(policy: dict[str, Any]) -> None:
    """When it is made."""
    with pytest.raises(ValueError, match=r"."):
        FaultPolicy(**policy)


def test_retries_get_through_all_that_passes() -> None:
    """Resets, truncations, 503 and 429 together: every byte arrives, in its place."""
    storage = faulty(reset=0.2, truncation=0.2, unavailable=0.2, throttled=0.1, retry_after_seconds=0.001)
    policy = RetryPolicy(attempts=50, base_seconds=0.0001, cap_seconds=0.0001)

    buffer = bytearray(len(_CONTENT))
    for offset in range(0, len(_CONTENT), 1024):
        retrying = RetryingStorage(storage, policy, RetryBudget(60))
        retrying.read_into("a", offset, memoryview(buffer)[offset : offset + 1024], version=storage.stat("a").version)

    assert _CONTENT == buffer
    assert {"reset", "truncation", "unavailable"} <= storage.injected.keys()


class _Plugin:
    """Offers ``faulty://`` in one process."""

    def __init__(self, storage: FaultyStorage) -> None:
        self._storage = storage

    @hookimpl
    def mx_register_storages(self) -> list[StorageProvider]:
        can = StorageCapabilities(patience=True, stat_digests=True)
        return [StorageProvider("faulty", ("faulty",), lambda _uri, _settings: self._storage, capabilities=can)]


def load(**policy: Any) -> tuple[dict[str, bytes], FaultyStorage]:
    """What a load brings through the faults of a policy, from a storage that tells digests."""
    tensors = {f"t{number}": tensor("F32", [64, 64], number) for number in range(8)}
    inner = Publishing()
    inner.put("model/model.safetensors", safetensors_file(tensors))
    storage = FaultyStorage(inner, FaultPolicy(**policy))
    plugins = mx.PluginManager()
    plugins.register(_Plugin(storage), name="faulty")
    environ = {"MX_CHUNK_BYTES": "4096", "MX_STALL_SECONDS": "0.5"}
    state = mx.load_state_dict(ModelURI.parse("faulty://here/model"), plugins=plugins, environ=environ)
    assert {name: content for name, (_, _, content) in tensors.items()} == {
        name: value.numpy().tobytes() for name, value in state.items()
    }
    return {name: value.numpy().tobytes() for name, value in state.items()}, storage


def test_a_load_gets_through_faults() -> None:
    """Every byte of it, through the whole engine."""
    _, storage = load(reset=0.1, truncation=0.1, unavailable=0.02, most=20)

    assert storage.injected["reset"] + storage.injected["truncation"] > 0


def test_a_load_gets_through_flipped_bits_and_silence() -> None:
    """Digests find the one, and patience the other."""
    _, storage = load(first=[*[None] * 6, "flipped_bit", "stall", None, "flipped_bit"])

    assert Counter(flipped_bit=2, stall=1) == storage.injected


def test_a_load_of_an_object_that_changes_fails() -> None:
    """At once, with the reason."""
    with pytest.raises(SourceChangedError):
        load(first=[None, None, None, None, "changed"])
