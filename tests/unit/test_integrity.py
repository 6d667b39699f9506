"""Digests that the storage publishes: computed while bytes arrive, compared, and what happens where they differ."""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import attrs
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import modelexpress_core as mx
from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.errors import IntegrityError
from modelexpress_core.fetch.digests import CRCS, best_digest, new_hasher
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from modelexpress_core.storage.memory import MemoryStorage
from tests.support.properties import examples

PATH = "model/model.safetensors"
URI = "digests://host/model"

STATE = {
    "a": torch.arange(5000, dtype=torch.float32),
    "b": torch.arange(7000, dtype=torch.int16).view(70, 100),
    "c": torch.arange(3, dtype=torch.int64),
    "d": torch.arange(40_000, dtype=torch.int32),
}
CONTENT = save(STATE)
HEADER_BYTES = 8 + int.from_bytes(CONTENT[:8], "little")

#: Computed by other code than the product's, where there is some.
DIGESTS: Mapping[str, Callable[[bytes], str]] = {
    "crc32": lambda content: f"{zlib.crc32(content):08x}",
    "md5": lambda content: hashlib.md5(content).hexdigest(),
    "sha1": lambda content: hashlib.sha1(content).hexdigest(),
    "sha256": lambda content: hashlib.sha256(content).hexdigest(),
    "crc32c": lambda content: f"{CRCS['crc32c']().compute(memoryview(content), 0):08x}",
    "crc64nvme": lambda content: f"{CRCS['crc64nvme']().compute(memoryview(content), 0):016x}",
}


class Publishing:
    """Objects in memory whose digests are published, by ``stat`` alone, and whose bytes arrive damaged.

    Attributes:
        damage: Offset of a byte that arrives wrong -> how many reads it is still wrong in.
        spared: The same -> how many reads go well before.
    """

    def __init__(self, algorithm: str = "crc32", content: bytes = CONTENT, listed: bool = False) -> None:
        self.header_bytes = 8 + int.from_bytes(content[:8], "little")
        self.inner = MemoryStorage()
        self.inner.put(PATH, content)
        self.digests = {algorithm: DIGESTS[algorithm](content)}
        self.listed = listed
        self.damage: dict[int, int] = {}
        self.spared: Counter[int] = Counter()
        self.calls: Counter[str] = Counter()
        self.read_bytes = 0
        self.lock = threading.Lock()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for info in self.inner.list(prefix):
            yield attrs.evolve(info, digests=self.digests) if self.listed else info

    def stat(self, path: str) -> ObjectInfo:
        self.calls["stat"] += 1
        return attrs.evolve(self.inner.stat(path), digests=self.digests)

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        count = self.inner.read_into(path, offset, buffer, version=version)
        with self.lock:
            self.read_bytes += count
            for place, times in self.damage.items():
                opening = offset == 0 and place >= self.header_bytes  # reads more than the header, and drops it
                if times and offset <= place < offset + count and not opening:
                    if self.spared[place]:
                        self.spared[place] -= 1
                        continue
                    buffer[place - offset] ^= 0x10
                    self.damage[place] -= 1
        return count

    def close(self) -> None:
        pass


class Plugin:
    def __init__(self, storage: Publishing) -> None:
        self.storage = storage

    @mx.hookimpl
    def mx_register_storages(self) -> list[StorageProvider]:
        capabilities = StorageCapabilities(stat_digests=True, concurrency=4, request_cost_bytes=128)
        return [
            StorageProvider("digests", ("digests",), lambda uri, env: self.storage, capabilities=capabilities),
        ]


def using(storage: Publishing, **environ: str) -> dict[str, object]:
    """Arguments of a load from ``storage``, in small pieces."""
    plugins = mx.PluginManager.discover({})
    plugins.register(Plugin(storage), name="digests")
    return {"plugins": plugins, "environ": {"MX_CHUNK_BYTES": "4096", **environ}}


def report_of(storage: Publishing, **environ: str) -> mx.LoadReport:
    """The report of a load of everything, whose tensors are right."""
    target = {name: torch.empty_like(tensor) for name, tensor in STATE.items()}
    report = mx.load_into(target, URI, **using(storage, **environ))
    assert all(torch.equal(STATE[name], target[name]) for name in STATE)
    return report


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("crc32", "cbf43926"),
        ("crc32c", "e3069283"),
        ("crc64nvme", "ae8b14860a799888"),
        ("md5", "25f9e794323b453885f5181f1b624d0b"),
        ("sha1", "f7c3bc1d808e04732adf679965ccc34ca7ae3441"),
        ("sha256", "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225"),
    ],
)
def test_digests_have_the_values_that_their_definitions_give(algorithm: str, expected: str) -> None:
    """The check values of the catalogue of CRCs (reveng), and those of the hashes, over two parts."""
    hasher = new_hasher(algorithm)
    hasher.update(memoryview(b"12345"))
    hasher.update(memoryview(b"6789"))

    assert expected == hasher.hexdigest()


def test_the_quickest_digest_is_compared() -> None:
    """CRCs before hashes, and what is not known is left alone."""
    digests = {"md5": "00", "sha256": "01", "crc32": "02", "crc64nvme": "0A", "blake3": "04"}

    assert best_digest(digests) == ("crc64nvme", "0a")
    assert best_digest({"md5": "00", "sha256": "01"}) == ("sha256", "01")
    assert best_digest({"blake3": "04"}) is None


@pytest.mark.parametrize("algorithm", DIGESTS)
@pytest.mark.parametrize("staging", ["0", "1"])
def test_a_load_of_everything_is_verified(algorithm: str, staging: str) -> None:
    """Whatever the digest, read straight into place or through staging buffers, with nothing read twice."""
    storage = Publishing(algorithm)

    report = report_of(storage, MX_FORCE_STAGING=staging)

    assert (report.verified["digests"], report.bytes_reread, storage.calls["stat"]) == (1, 0, 1)
    assert report.bytes_fetched == len(CONTENT) - HEADER_BYTES


def test_digests_that_are_listed_are_not_asked_for() -> None:
    """No request is spent on what is known."""
    storage = Publishing(listed=True)

    report = report_of(storage)

    assert (report.verified["digests"], storage.calls["stat"]) == (1, 0)


@pytest.mark.parametrize("algorithm", DIGESTS)
@pytest.mark.parametrize("place", [HEADER_BYTES, len(CONTENT) - 1, HEADER_BYTES + 20_000])
def test_a_byte_that_was_damaged_in_transfer_is_fetched_again(algorithm: str, place: int) -> None:
    """The tensors are right in the end, and the report says what it took."""
    storage = Publishing(algorithm)
    storage.damage[place] = 1

    report = report_of(storage)

    assert storage.damage[place] == 0
    assert (report.verified["digests"], report.bytes_reread) == (1, len(CONTENT))


@pytest.mark.parametrize("algorithm", ["crc64nvme", "sha256"])
@pytest.mark.parametrize("other", [HEADER_BYTES + 10, len(CONTENT) - 9])
def test_damage_while_reading_again_is_repaired_too(algorithm: str, other: int) -> None:
    """Whether it strikes what was right before or what was wrong before: nothing wrong stays where it was delivered."""
    storage = Publishing(algorithm)
    storage.damage[len(CONTENT) - 9] = 1
    if other in storage.damage:
        storage.damage[other] = 2
    else:
        storage.damage[other], storage.spared[other] = 1, 1

    report = report_of(storage)

    assert (report.verified["digests"], report.bytes_reread) == (1, 2 * len(CONTENT))


@pytest.mark.parametrize("algorithm", ["crc64nvme", "sha256"])
@pytest.mark.parametrize("place", [HEADER_BYTES + 20_000, 30])
def test_damage_that_stays_fails_the_load(algorithm: str, place: int) -> None:
    """Bytes that arrive wrong each time look like a damaged object: the load fails."""
    storage = Publishing(algorithm)
    storage.damage[place] = 1000
    target = {name: torch.empty_like(tensor) for name, tensor in STATE.items()}

    with pytest.raises((IntegrityError, mx.CheckpointError)) as error:
        mx.load_into(target, URI, **using(storage))

    if place >= HEADER_BYTES:
        text = str(error.value)
        assert f"digests://host/{PATH}" in text
        assert storage.digests[algorithm] in text
        assert "upload it again" in text


def test_a_header_that_was_damaged_and_is_valid_all_the_same_fails_the_load() -> None:
    """Tensors were placed by it, so that fetching again mends nothing."""
    content = save({"w1": torch.zeros(4), "w3": torch.ones(4)})
    storage = Publishing(content=content)
    storage.damage[content.index(b"w1") + 1] = 1  # "w!", another name

    with pytest.raises(IntegrityError, match="the header was damaged in transfer"):
        mx.load_state_dict(URI, **using(storage))


def test_a_header_that_cannot_be_read_is_read_again() -> None:
    """One damaged byte in it does not fail the load."""
    storage = Publishing()
    storage.damage[9] = 1

    report = report_of(storage)

    assert (storage.damage[9], report.verified["digests"], report.bytes_reread) == (0, 1, 0)


def test_bytes_that_may_have_been_used_are_not_replaced() -> None:
    """Deferred weights: code may have computed from the damaged bytes, so the load fails."""
    storage = Publishing()
    storage.damage[len(CONTENT) - 5] = 1
    target = {name: torch.empty_like(tensor) for name, tensor in STATE.items()}

    with pytest.raises(IntegrityError, match="damaged in transfer, and may have been used"):  # noqa: SIM117 - the point
        with mx.deferred_weights(URI, **using(storage)) as weights:
            for name, tensor in weights:
                target[name].copy_(tensor)


@pytest.mark.parametrize("algorithm", ["crc32", "sha256"])
def test_deferred_weights_that_are_used_wholly_are_verified(algorithm: str) -> None:
    """Small ones that were fetched ahead included, and what code does to its parameters later changes nothing."""
    storage = Publishing(algorithm)
    target = {name: torch.empty_like(tensor) for name, tensor in STATE.items()}

    with mx.deferred_weights(URI, model=target, **using(storage)) as weights:
        for name, tensor in weights:
            target[name].copy_(tensor)
            target[name].mul_(2)

    assert weights.report is not None
    assert weights.report.verified["digests"] == 1
    assert all(torch.equal(STATE[name] * 2, target[name]) for name in STATE)


def test_a_file_of_which_only_a_part_is_read_is_not_verified() -> None:
    """A digest speaks of the whole; the report does not claim what was not checked."""
    storage = Publishing()
    reports: list[mx.LoadReport] = []

    class Watch:
        @mx.hookimpl
        def mx_load_finished(self, event: mx.LoadFinished) -> None:
            reports.append(event.report)

    arguments = using(storage)
    arguments["plugins"].register(Watch(), name="watch")

    mx.load_state_dict(URI, names=["a"], **arguments)

    assert [report.verified["digests"] for report in reports] == [0]


def test_digests_are_not_compared_where_the_user_says_so() -> None:
    """Nor asked for: a damaged object is loaded as it is."""
    storage = Publishing()
    storage.digests = {"crc32": "00000000"}

    report = report_of(storage, MX_VERIFY_DIGESTS="0")

    assert (report.verified["digests"], storage.calls["stat"]) == (0, 0)


def test_damage_in_the_store_is_distinguished_from_damage_in_transfer() -> None:
    """Read again, its digest is wrong again: the hint is to upload it again."""
    storage = Publishing()
    storage.digests = {"crc32": "00000000"}

    with pytest.raises(IntegrityError, match="read again 2 times, its digest was wrong each time") as error:
        mx.load_state_dict(URI, **using(storage))

    assert "upload it again" in str(error.value)


def test_tensors_that_share_memory_are_not_repaired_in_the_wrong_order() -> None:
    """The first of two tied tensors arrives damaged and is then overwritten: its bytes must not come back."""
    content = save({"a": torch.arange(100), "b": torch.arange(100) + 1})
    storage = Publishing(content=content)
    storage.damage[len(content) - 1600 + 8] = 1
    shared = torch.empty(100, dtype=torch.int64)

    with pytest.raises(IntegrityError, match="may have been used"):
        mx.load_into({"a": shared, "b": shared}, URI, **using(storage))


def test_tied_tensors_are_verified() -> None:
    """In whatever order their bytes are digested."""
    content = save({"a": torch.arange(100), "b": torch.arange(100) + 1})
    storage = Publishing("sha256", content)
    shared = torch.empty(100, dtype=torch.int64)

    report = mx.load_into({"a": shared, "b": shared}, URI, **using(storage))

    assert report.verified["digests"] == 1
    assert torch.equal(torch.arange(100) + 1, shared)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    algorithm=st.sampled_from(sorted(DIGESTS)),
    chunk=st.sampled_from([256, 1000, 4096, 1 << 20]),
    concurrency=st.integers(1, 8),
    cuts=st.lists(st.integers(0, 4999), max_size=6),
    damage=st.dictionaries(st.integers(HEADER_BYTES, len(CONTENT) - 1), st.integers(1, 2), max_size=3),
    whole=st.booleans(),
)
@example("md5", 1000, 1, [1], {5288: 1}, True)  # damaged in the second of two readings with other borders
def test_damaged_bytes_are_never_delivered(
    algorithm: str, chunk: int, concurrency: int, cuts: list[int], damage: dict[int, int], whole: bool
) -> None:
    """However tensors are cut into pieces, and pieces read twice: what a load delivers is right, or it raises."""
    storage = Publishing(algorithm)
    storage.damage = dict(damage)
    arguments = using(storage, MX_CHUNK_BYTES=str(chunk), MX_CONCURRENCY=str(concurrency))
    target = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    borders = [0, *sorted(cuts), 5000]
    extra = torch.zeros(5000)

    try:
        with mx.deferred_weights(URI, **arguments) as weights:
            for name, tensor in weights:
                if name != "a" or whole:
                    target[name].copy_(tensor)
                if name == "a":
                    for start, end in pairwise(borders):
                        (extra if whole else target["a"])[start:end].copy_(tensor[start:end])
    except IntegrityError:
        assert damage
        return

    assert weights.report is not None
    assert weights.report.verified["digests"] == 1
    assert all(torch.equal(STATE[name], target[name]) for name in STATE)
    assert not whole or torch.equal(STATE["a"], extra)
