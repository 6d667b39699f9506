"""Indexes and the names of shards, as texts: what is taken from them, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelexpress_core.checkpoint.index import missing_shards, parse_index
from modelexpress_core.errors import CheckpointError
from tests.support.checkpoints import INDEX, index_text, shard_name
from tests.support.properties import examples

URI = "s3://bucket/model"


def refused(text: bytes) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        parse_index(text, file=INDEX, uri=URI)
    assert f"{URI}: {INDEX} is no valid index: " in str(caught.value)
    assert (INDEX, URI) == (caught.value.file, caught.value.uri)
    assert len(str(caught.value)) < 1000
    return caught.value


@settings(deadline=None)
@given(
    st.dictionaries(st.text(), st.sampled_from(["a.safetensors", "b/c d.safetensors", "é%2e.safetensors"]), min_size=1)
)
def test_round_trip(weight_map: dict[str, str]) -> None:
    """The files of tensors are returned unchanged; other parts of an index are ignored."""
    assert weight_map == parse_index(index_text(weight_map, other=[1, {"x": None}]), file=INDEX)


@pytest.mark.parametrize("number", ["1e400", "NaN", "-0", "9" * 10_000, "-" + "9" * 10_000, "0." + "9" * 10_000])
def test_numbers_are_of_no_use(number: str) -> None:
    """A number in the metadata is ignored, even a long one."""
    text = f'{{"metadata":{{"total_size":{number}}},"weight_map":{{"a":"a.safetensors"}}}}'

    assert {"a": "a.safetensors"} == parse_index(text.encode(), file=INDEX)


HOSTILE: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "Expecting value"),
    "not JSON": (b"<html>", "Expecting value"),
    "cut short": (index_text({"a": "a.safetensors"})[:-3], "Unterminated"),
    "not UTF-8": (b'{"weight_map":{"\xff":"a.safetensors"}}', "utf-8"),
    "byte order mark": (b"\xef\xbb\xbf" + index_text({"a": "a.safetensors"}), "BOM"),
    "array": (b"[]", "no weight_map"),
    "text": (b'"weight_map"', "no weight_map"),
    "number": (b"1", "no weight_map"),
    "null": (b"null", "no weight_map"),
    "no weight_map": (b'{"metadata":{}}', "no weight_map"),
    "weight_map is null": (b'{"weight_map":null}', "no weight_map"),
    "weight_map is a list": (b'{"weight_map":[["a","a.safetensors"]]}', "no weight_map"),
    "weight_map is empty": (b'{"weight_map":{}}', "no weight_map"),
    "weight_map twice": (b'{"weight_map":{},"weight_map":{"a":"a.safetensors"}}', "'weight_map' appears twice"),
    "tensor twice": (b'{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}', "the key 'a' appears twice"),
    "tensor twice, escaped": (b'{"weight_map":{"a":"a.safetensors","\\u0061":"b.safetensors"}}', "appears twice"),
    "metadata key twice": (b'{"metadata":{"x":1,"x":2},"weight_map":{"a":"a.safetensors"}}', "key 'x' appears twice"),
    "file is a number": (b'{"weight_map":{"a":1}}', "the tensor 'a' is in"),
    "file is null": (b'{"weight_map":{"a":null}}', "the tensor 'a' is in None"),
    "file is a list": (b'{"weight_map":{"a":["a.safetensors"]}}', "no .safetensors file"),
    "100,000 brackets": (b'{"weight_map":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "100,000 objects": (b'{"weight_map":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "long name of a tensor": (index_text({"x" * 1_000_000: "a.bin"}), "no .safetensors file"),
    "long name of a file": (index_text({"a": "x" * 1_000_000}), "no .safetensors file"),
    "long key twice": (b'{"%b":1,"%b":2}' % (b"x" * 1_000_000, b"x" * 1_000_000), "appears twice"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("text", "words"), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_index(text: bytes, words: str) -> None:
    """What is no index is refused, with a message that is short and names it."""
    assert words in str(refused(text))


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "../../../../etc/x.safetensors",
        "sub/../../x.safetensors",
        "sub/../x.safetensors",
        "./x.safetensors",
        "sub/./x.safetensors",
        "/etc/x.safetensors",
        "//host/x.safetensors",
        "/.safetensors",
        "sub//x.safetensors",
        "..\\x.safetensors",
        "sub\\x.safetensors",
        "C:\\x.safetensors",
        "\\\\host\\x.safetensors",
    ],
)
def test_names_that_lead_elsewhere(name: str) -> None:
    """An index cannot make us read a file outside its own directory."""
    error = refused(index_text({"weight": name}))

    assert "the tensor 'weight' is in" in str(error)
    assert "outside the checkpoint" in str(error)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "", "model.safetensors.bin", "model.SAFETENSORS", "model.safetensors/", "config.json"]
)
def test_files_of_another_format(name: str) -> None:
    """An index that names anything but safetensors files is refused with that name."""
    assert f"is in {name!r}, which is no .safetensors file" in str(refused(index_text({"weight": name})))


@pytest.mark.parametrize("name", ["a\x00.safetensors", "a\n.safetensors", "\x7f.safetensors", "\ud800.safetensors"])
def test_names_that_no_file_has(name: str) -> None:
    """Characters that a file system would choke on are refused before it is asked."""
    assert "which is no valid file name" in str(refused(index_text({"weight": name})))


@settings(deadline=None, max_examples=examples(500))
@given(
    st.binary(max_size=40)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=2) | st.just("weight_map"), inner, max_size=3)
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_text(text: bytes) -> None:
    """Any text is an index or a CheckpointError."""
    try:
        weight_map = parse_index(text, file=INDEX, uri=URI)
    except CheckpointError:
        refused(text)
    else:
        assert all(name.endswith(".safetensors") for name in weight_map.values())


#: Each of 8 MB, and how many times its length may be allocated.
LARGE: Mapping[str, tuple[Callable[[], bytes], int]] = {
    "one name": (lambda: index_text({"x" * 8_000_000: "a.bin"}), 12),
    "digits": (lambda: b'{"metadata":' + b"9" * 8_000_000 + b"}", 12),
    "digits of a fraction": (lambda: b'{"metadata":0.' + b"9" * 8_000_000 + b"}", 12),
    "brackets": (lambda: b"[" * 8_000_000, 12),
    "objects": (lambda: b'{"":' * 2_000_000, 12),
    "files": (lambda: index_text({f"{i:08d}": "../x.safetensors" for i in range(250_000)}), 14),
}


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("text", "times"), LARGE.values(), ids=list(LARGE))
def test_large_hostile_index(text: Callable[[], bytes], times: int) -> None:
    """Megabytes of nonsense are refused in seconds, and with memory in proportion to them."""
    content = text()

    tracemalloc.start()
    try:
        refused(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < times * len(content), f"{peak / len(content):.1f} times the index"


# -- names of shards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ([], []),
        (["model.safetensors"], []),
        (["consolidated.safetensors", "adapter_model.safetensors"], []),
        ([shard_name(1, 1)], []),
        ([shard_name(n, 3) for n in (1, 2, 3)], []),
        ([shard_name(n, 3) for n in (1, 3)], [shard_name(2, 3)]),
        ([shard_name(1, 3)], [shard_name(2, 3), shard_name(3, 3)]),
        ([shard_name(n, 3) for n in (0, 1, 2)], []),
        ([shard_name(n, 3) for n in (0, 2)], [shard_name(1, 3)]),
        ([shard_name(7, 3)], [shard_name(n, 3) for n in (1, 2, 3)]),
        ([shard_name(1, 2, "model.fp16"), shard_name(2, 2)], [shard_name(1, 2)]),
        (["model-000001-of-000002.safetensors"], ["model-000002-of-000002.safetensors"]),
        (["model-1-of-3.safetensors"], []),
        (["model-00001-of-00003.safetensors.part"], []),
        (["model-00001-of-00003-extra.safetensors"], []),
        ([f"model-{'0' * 400}1-of-{'9' * 400}.safetensors"], []),
        (["model-٠٠٠٠١-of-٠٠٠٠٣.safetensors"], []),  # noqa: RUF001 - digits, but no writer's
    ],
)
def test_missing_shards(files: list[str], missing: list[str]) -> None:
    """The names of shards say how many there are and which are missing; other names promise nothing."""
    assert missing == list(missing_shards(files))


def test_missing_shards_of_one_of_two_series() -> None:
    """Of two series in one directory, the incomplete one is named."""
    whole, part = [shard_name(n, 2, "a") for n in (1, 2)], [shard_name(1, 2, "b")]

    assert (shard_name(2, 2, "b"),) == missing_shards(whole + part)


@pytest.mark.timeout(20)
def test_many_promises() -> None:
    """Names that promise a thousand million shards take neither minutes nor gigabytes."""
    files = [shard_name(1, 99_999, f"model{n}") for n in range(10_000)]

    tracemalloc.start()
    try:
        missing = missing_shards(files)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert 99_998 == len(missing)
    assert peak < 100_000_000
