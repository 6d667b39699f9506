"""Headers of safetensors files: what was written comes back, and hostile ones end soon, with a CheckpointError."""

from __future__ import annotations

import contextlib
import json
import re
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelexpress_core.checkpoint import Checkpoint, open_files
from modelexpress_core.checkpoint.header import (
    DTYPE_BITS,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    Header,
    header_length,
    parse_header,
)
from modelexpress_core.errors import CheckpointError
from modelexpress_core.uri import ModelURI
from tests.support.checkpoints import (
    BITS,
    Stored,
    entries,
    framed,
    memory_storage,
    pattern,
    safetensors_file,
    stored_bytes,
    tensor,
)
from tests.support.properties import examples

FILE = "model.safetensors"

thorough = settings(deadline=None, max_examples=examples(300), suppress_health_check=[HealthCheck.too_slow])


def read(content: bytes) -> Header:
    """The header of a whole file."""
    end = LENGTH_BYTES + header_length(content[:LENGTH_BYTES], len(content))
    return parse_header(content[LENGTH_BYTES:end], len(content) - end, file=FILE)


def opened(content: bytes) -> Checkpoint:
    """The checkpoint of one file, on the way that a load takes."""
    return open_files(memory_storage({FILE: content}), ModelURI("memory", "tests", f"model/{FILE}"))


def found(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The tensors as we find them in a file."""
    return {
        name: (info.dtype, info.shape, content[info.offset : info.offset + info.length])
        for name, info in opened(content).tensors.items()
    }


def found_by_library(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The same by the safetensors library."""
    return {
        name: (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
        for name, info in safetensors.deserialize(content)
    }


def entry(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0,4]", more: str = "") -> str:
    """The text of one entry."""
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}'


def one(data_bytes: int = 4, **parts: str) -> bytes:
    """A file with the one tensor ``a``."""
    return framed(f'{{"a":{entry(**parts)}}}'.encode(), bytes(data_bytes))


def two(first: str, second: str, data_bytes: int, **parts: str) -> bytes:
    """A file with the tensors ``a`` and ``b`` at the offsets ``first`` and ``second``."""
    text = f'{{"a":{entry(offsets=first, **parts)},"b":{entry(offsets=second, **parts)}}}'
    return framed(text.encode(), bytes(data_bytes))


# -- what was written comes back ---------------------------------------------------------------------------------------

_names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters=[*map(chr, range(32)), "\x7f"]), max_size=12
).filter(lambda name: name != "__metadata__")
_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def stored_tensors(draw: st.DrawFn) -> Stored:
    dtype = draw(st.sampled_from(sorted(BITS)))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    if BITS[dtype] % 8:  # four elements of any kind end on a whole byte
        shape.insert(draw(st.integers(0, len(shape))), 4)
    return dtype, tuple(shape), pattern(stored_bytes(dtype, shape), draw(st.integers(0, 255)))


@st.composite
def files(draw: st.DrawFn) -> tuple[dict[str, Stored], dict[str, str], bytes]:
    """Tensors, metadata, and a file with them, laid out and spelt in one of the ways that the format allows."""
    tensors = draw(st.dictionaries(_names, stored_tensors(), max_size=6))
    metadata = draw(st.none() | st.dictionaries(_texts, _texts, max_size=4))
    order = draw(st.permutations(list(tensors)))
    described: dict[str, Any] = dict(entries(tensors, order))
    described = {name: dict(draw(st.permutations(list(fields.items())))) for name, fields in described.items()}
    if metadata is not None:
        described["__metadata__"] = metadata
    described = dict(draw(st.permutations(list(described.items()))))
    text = json.dumps(
        described,
        ensure_ascii=draw(st.booleans()),
        separators=draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t: ")])),
    )
    header = text.encode() + b" " * draw(st.integers(0, 16))
    return tensors, metadata or {}, safetensors_file(tensors, order=order, header=header)


@thorough
@given(files())
def test_round_trip(case: tuple[dict[str, Stored], dict[str, str], bytes]) -> None:
    """Whatever is written in the format, in any order and spelling, is parsed to exactly that."""
    tensors, metadata, content = case

    header = read(content)
    at = content[len(content) - sum(len(data) for _, _, data in tensors.values()) :]

    assert tensors == {t.name: (t.dtype, t.shape, at[t.begin : t.end]) for t in header.tensors}
    assert metadata == header.metadata
    assert sorted(t.begin for t in header.tensors) == [t.begin for t in header.tensors]


@thorough
@given(files())
def test_round_trip_agrees_with_the_library(case: tuple[dict[str, Stored], dict[str, str], bytes]) -> None:
    """An opened file has the tensors, dtypes, shapes and bytes that the safetensors library finds in it."""
    tensors, metadata, content = case

    assert found_by_library(content) == found(content) == tensors
    assert metadata == opened(content).files[0].metadata


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_every_dtype(dtype: str) -> None:
    """Every dtype of the format is known with the size of its elements, and none is forgotten."""
    content = safetensors_file({"a": tensor(dtype, [2, 8]), "b": tensor(dtype, [0, 3]), "c": tensor("U8", [])})

    assert BITS == DTYPE_BITS
    assert found_by_library(content) == found(content)


def test_empty() -> None:
    """A file without tensors is a valid one."""
    header = read(framed(b"{}"))

    assert () == header.tensors
    assert {} == header.metadata


def test_metadata_may_look_like_anything() -> None:
    """The metadata are texts, whatever they are called and say: nested lists, escapes, names of fields."""
    metadata = {
        "format": "pt",
        "config": json.dumps({"a": [[1, [2]], [{}, {}], '["\\']}),
        "dtype": "x",
        "": '[[[[{{{{\\\\" , [ {',
    }
    content = safetensors_file({"a": tensor("F32", [1])}, metadata=metadata)

    assert metadata == read(content).metadata


def test_metadata_with_exactly_the_fields_of_a_tensor() -> None:
    """Metadata with the keys of an entry are metadata all the same."""
    metadata = {"dtype": "F32", "shape": "[1]", "data_offsets": "[0,4]"}

    assert metadata == read(safetensors_file({}, metadata=metadata)).metadata


def test_names_may_look_like_anything() -> None:
    """A tensor may be called what a field is called, or have brackets, quotes and backslashes in its name."""
    names = ["dtype", "shape", "data_offsets", "[[", ", [{", 'a"b', "a\\", "", "/etc/passwd", "\U0001f600", "é"]
    content = safetensors_file({name: tensor("I16", [1], seed) for seed, name in enumerate(names)})

    assert found_by_library(content) == found(content)
    assert names == list(found(content))


def test_largest_header_of_the_format() -> None:
    """The limit is the format's own, and one byte more is refused."""
    start = MAX_HEADER_BYTES.to_bytes(8, "little")

    assert MAX_HEADER_BYTES == header_length(start, MAX_HEADER_BYTES + 8) == 100_000_000
    with pytest.raises(ValueError, match="100000001 bytes long; the format allows 100000000"):
        header_length((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), 1 << 40)


# -- damaged -----------------------------------------------------------------------------------------------------------


def check_refused_or_sound(content: bytes) -> None:
    """Either a CheckpointError that names the file, or what the library finds too."""
    with contextlib.suppress(CheckpointError):
        check_sound(content)
        return
    with pytest.raises(CheckpointError) as caught:
        opened(content)
    assert FILE in str(caught.value)
    assert FILE == caught.value.file
    assert len(str(caught.value)) < 2000


def check_sound(content: bytes) -> None:
    """The tensors cover the file, and are those that the library finds; raises what opening raises."""
    ours = opened(content)
    position = ours.files[0].header_bytes
    for info in ours.tensors.values():
        assert position == info.offset
        assert stored_bytes(info.dtype, info.shape) == info.length
        position += info.length
    assert len(content) == position
    assert found_by_library(content) == found(content)


_VALID = safetensors_file(
    {"weight": tensor("F32", [2, 1]), "bias": tensor("F4", [2]), "é": tensor("BF16", [0])},
    metadata={"format": "pt"},
    order=["bias", "weight", "é"],
    align=1,
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    content = bytearray(draw(files())[2] if draw(st.booleans()) else _VALID)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["flip", "insert", "delete", "repeat", "set", "fix"])):
            case "flip" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                content[at:at] = draw(
                    st.sampled_from(
                        [b'"', b"0", b"-", b",", b"{", b"}", b"[", b"]", b" ", b"\\", b"\x00", b"\xff", b"1e9"]
                    )
                    | st.binary(min_size=1, max_size=4)
                )
            case "delete":
                del content[at : at + draw(st.integers(1, 8))]
            case "repeat":
                content[at:at] = content[at : at + draw(st.integers(1, 64))]
            case "set" if content:
                content[at] = draw(st.sampled_from(b'0123456789-"{}[],:'))
            case "fix" if len(content) > 8:  # the length of the header follows what was done to it
                end = content.rfind(b"}") + 1
                content[:8] = max(0, end - 8).to_bytes(8, "little")
    return bytes(content)


@settings(thorough, max_examples=examples(1000))
@given(damaged())
def test_damaged_file(content: bytes) -> None:
    """A file with changed, lost or doubled bytes is refused, or is a sound file that the library reads alike."""
    check_refused_or_sound(content)


@thorough
@given(st.integers(0, 2**64 - 1) | st.integers(0, 512) | st.integers(99_999_990, 100_000_010))
def test_any_length_field(length: int) -> None:
    """Whatever the length field says, the file is refused or read like the library reads it."""
    check_refused_or_sound(length.to_bytes(8, "little") + _VALID[8:])


@thorough
@given(st.binary(max_size=64))
def test_any_bytes(content: bytes) -> None:
    """Any bytes are refused, or read like the library reads them."""
    check_refused_or_sound(content)


_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\d+|\s+|.')
_WORDS = [
    *[
        "-0",
        "00",
        "0",
        "1",
        "2",
        "4",
        "8",
        "-1",
        "1.0",
        "1e0",
        "NaN",
        "true",
        "null",
        "18446744073709551616",
        " ",
        "\v",
    ],
    *[
        '"\\ud800"',
        '"\\ud83d\\ude00"',
        '"\\u0000"',
        '"\t"',
        '"a"',
        '"dtype"',
        '"shape"',
        '"__metadata__"',
        '"F64"',
        '""',
    ],
    *["[]", "{}", "[0]", "[0,0]", '{"a":"b"}', "{", "}", "[", "]", ",", ":", '"', entry('"U8"', "[0]", "[0,0]")],
]


@settings(thorough, max_examples=examples(800))
@given(st.data())
def test_wrong_words(data: st.DataObject) -> None:
    """A sound header in which a word or two are other ones is refused, or read like the library reads it."""
    content = data.draw(files())[2] if data.draw(st.booleans()) else _VALID
    end = 8 + int.from_bytes(content[:8], "little")
    words = _WORD.findall(content[8:end].decode())
    for at in data.draw(st.lists(st.integers(0, len(words) - 1), min_size=1, max_size=2)):
        words[at] = data.draw(st.sampled_from(_WORDS))

    check_refused_or_sound(framed("".join(words).encode(), content[end:]))


_keys = st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a", "b", ""])
_leaves = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, 2, 4, 8, -1, -0.0, 1.0, 2**31, 2**63, 2**64 - 1, 2**64, 10**19, 10**20])
    | st.sampled_from(["F32", "U8", "F4", "", "f32", "\ud800", "\x00"])
    | st.floats()
)
_values = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=4), max_leaves=12
)
_shapes = st.lists(st.sampled_from([0, 1, 2, 4, 2**32, 2**61, 2**63, 2**64 - 1, 2**64, 10**20 - 1]), max_size=4)
_offsets = st.lists(st.sampled_from([0, 1, 2, 4, 8, 2**64 - 1, 2**64, -1, True, 4.0]), min_size=1, max_size=3)
_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F33"]) | _values,
        "shape": _shapes | _values,
        "data_offsets": st.just([0, 4]) | st.just([0, 0]) | _offsets | _values,
    },
    optional={"more": _values},
)
_headers = st.dictionaries(_keys, _entries | _values, max_size=4)


@settings(thorough, max_examples=examples(500))
@given(_values | _headers, st.sampled_from([0, 1, 4, 8]), st.booleans())
def test_any_json(value: object, data_bytes: int, ascii_only: bool) -> None:
    """A header of any JSON is refused, or read like the library reads it."""
    text = json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass")

    check_refused_or_sound(framed(text, bytes(data_bytes)))


@thorough
@given(
    st.lists(
        st.sampled_from(
            [
                *["{", "}", "[", "]", ",", ":", " ", "\t", "0", "1", "-0", "01", "1.", "1e0", "NaN", "true", "null"],
                *['"a"', '"a":', '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"U8"', '"\\u0000"'],
                *['"\\ud800"', '"\\', '{"a":{}}', '"b":{"x":"y"},', entry('"U8"', "[0]", "[0,0]")],
                '"a":' + entry('"U8"', "[0]", "[0,0]"),
            ]
        ),
        max_size=12,
    )
)
def test_any_tokens(tokens: list[str]) -> None:
    """A header of the right words in any order is refused, or read like the library reads it."""
    check_refused_or_sound(framed(f"{{{''.join(tokens)}}}".encode()))


@pytest.mark.parametrize("before", [b" ", b"\n", b"\r\n", b"\t\n ", b" " * 100], ids=repr)
@pytest.mark.parametrize("after", [b"", b"\r ", b"\n\t"], ids=repr)
def test_white_space_around_the_header_is_allowed(before: bytes, after: bytes) -> None:
    """As in the format's own test of a header that is padded at its start, though its text says otherwise."""
    content = framed(before + f'{{"a":{entry()}}}'.encode() + after, bytes(4))

    assert {"a": ("F32", (1,), bytes(4))} == found(content) == found_by_library(content)


_MORE = ',"scale":[1]'

#: What the library reads and we refuse, by the row of docs/safetensors.md.
BEYOND_THE_FORMAT: Mapping[str, tuple[bytes, str]] = {
    "two tensors with one name": (framed(f'{{"a":{entry()},"a":{entry()}}}'.encode(), bytes(4)), "appears twice"),
    "two texts with one key in `__metadata__`": (framed(b'{"__metadata__":{"a":"b","a":"c"}}'), "appears twice"),
    "a tensor with another field besides `dtype`, `shape` and `data_offsets`": (
        framed(f'{{"a":{entry(more=_MORE)}}}'.encode(), bytes(4)),
        "has the fields",
    ),
    "a tensor that is a list, not an object": (framed(b'{"a":["F32",[1],[0,4]]}', bytes(4)), "nested too deeply"),
    "`__metadata__` that is `null`": (framed(b'{"__metadata__":null}'), "describes no tensor"),
    "a control character in the name of a tensor": (framed(f'{{"a\\n":{entry()}}}'.encode(), bytes(4)), "not allowed"),
    "more than 64 dimensions": (
        framed(f'{{"a":{entry(shape=str([1] * 65))}}}'.encode(), bytes(4)),
        "has 65 dimensions",
    ),
}


@pytest.mark.parametrize("row", BEYOND_THE_FORMAT)
def test_what_is_refused_beyond_the_format_is_in_the_docs(row: str) -> None:
    """The library reads it, we refuse it, and docs/safetensors.md gives the reason."""
    content, words = BEYOND_THE_FORMAT[row]
    page = (Path(__file__).parents[2] / "docs" / "safetensors.md").read_text()

    assert safetensors.deserialize(content) is not None
    with pytest.raises(CheckpointError, match=words):
        opened(content)
    assert re.search(rf"^\| {re.escape(row)} \| .+ \|$", page, re.MULTILINE)


def test_the_docs_list_nothing_that_is_read() -> None:
    """Each row of the page is tested above."""
    page = (Path(__file__).parents[2] / "docs" / "safetensors.md").read_text()
    rows = re.findall(r"^\| (.+?) \| .+ \|$", page, re.MULTILINE)

    assert ["refused", *BEYOND_THE_FORMAT] == rows


# -- hostile -----------------------------------------------------------------------------------------------------------

_HUGE = "9" * 5000

HOSTILE: Mapping[str, tuple[bytes, str]] = {
    # The length.
    "empty file": (b"", "has 0 bytes, too few"),
    "7 bytes": (b"\x02\0\0\0\0\0\0", "has 7 bytes, too few"),
    "length 0": (framed(b""), "does not start with {"),
    "length 0 before data": (framed(b"", b"{}"), "does not start with {"),
    "length 1": (framed(b"{"), "not JSON"),
    "length 2**63": (framed(b"{}", length=2**63), "9223372036854775808 bytes long; the format allows 100000000"),
    "length 2**64-1": (framed(b"{}", length=2**64 - 1), "18446744073709551615 bytes long"),
    "length above the limit": (framed(b"{}", length=100_000_001), "the format allows 100000000"),
    "length at the limit, in a small file": (framed(b"{}", length=100_000_000), "but the file has only 10 bytes"),
    "length one above the file": (framed(b"{}", length=3), "3 bytes long, but the file has only 10 bytes"),
    "length one below the header": (framed(b"{ }", length=2), "not JSON"),
    # The text.
    "only spaces": (framed(b" " * 64), "does not start with {"),
    "a form feed first": (framed(b"\x0c{}"), "does not start with {"),
    "byte order mark": (framed(b"\xef\xbb\xbf{}"), "does not start with {"),
    "UTF-16": (framed("{}".encode("utf-16-le")), "not JSON"),
    "not JSON": (framed(b"{'a': 1}"), "not JSON"),
    "comment": (framed(b"{}//"), "not JSON"),
    "NUL padding": (framed(b"{}\0\0"), "not JSON"),
    "two objects": (framed(b"{}{}"), "not JSON"),
    "trailing comma": (framed(f'{{"a":{entry()},}}'.encode(), bytes(4)), "not JSON"),
    "JSON array": (framed(b"[]"), "does not start with {"),
    "JSON text": (framed(b'"a"'), "does not start with {"),
    "JSON null": (framed(b"null"), "does not start with {"),
    "100,000 brackets": (framed(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "100,000 brackets, spaced": (framed(b'{"a":' + b"[ \n" * 100_000), "nested too deeply"),
    "100,000 closed brackets": (framed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    "100,000 objects": (framed(b'{"a":' * 100_000), "nested too deeply"),
    "100,000 closed objects": (framed(b'{"a":' * 100_000 + b"{}" + b"}" * 100_000), "nested too deeply"),
    "100,000 objects in a list": (framed(b'{"a":[' * 100_000), "nested too deeply"),
    "an object in an object": (framed(f'{{"a":{{"b":{entry()}}}}}'.encode(), bytes(4)), "tensor 'a'"),
    "invalid UTF-8 in a name": (framed(b'{"\xff":' + entry().encode() + b"}", bytes(4)), "not UTF-8 at byte 2"),
    "overlong UTF-8": (framed(b'{"\xc0\xaf":' + entry().encode() + b"}", bytes(4)), "not UTF-8 at byte 2"),
    "surrogate in UTF-8": (framed(b'{"\xed\xa0\x80":' + entry().encode() + b"}", bytes(4)), "not UTF-8"),
    "lone surrogate in a name": (framed(f'{{"\\ud800":{entry()}}}'.encode(), bytes(4)), r"'\ud800', with characters"),
    "NUL in a name": (framed(f'{{"a\\u0000":{entry()}}}'.encode(), bytes(4)), r"'a\x00', with characters"),
    "newline in a name": (framed(f'{{"a\\nb":{entry()}}}'.encode(), bytes(4)), r"'a\nb', with characters"),
    "raw control character": (framed(f'{{"a\1":{entry()}}}'.encode(), bytes(4)), "not JSON"),
    # Numbers.
    "5000 digits in a shape": (one(shape=f"[{_HUGE}]"), "number of 5000 digits"),
    "5000 digits in an offset": (one(offsets=f"[0,{_HUGE}]"), "number of 5000 digits"),
    "-5000 digits": (one(offsets=f"[0,-{_HUGE}]"), "number of 5001 digits"),
    "5000 digits of a fraction": (one(offsets=f"[0,4.{_HUGE}]"), "not a whole one"),
    "float size": (one(shape="[1.0]"), "'1.0', which is not a whole one"),
    "float offset": (one(offsets="[0,4.0]"), "'4.0', which is not a whole one"),
    "exponent": (one(offsets="[0,4e0]"), "'4e0', which is not a whole one"),
    "1e400": (one(shape="[1e400]"), "'1e400', which is not a whole one"),
    "1e999999999": (one(shape="[1e999999999]"), "not a whole one"),
    "NaN": (one(shape="[NaN]"), "'NaN', which is not a whole one"),
    "Infinity": (one(shape="[Infinity]"), "'Infinity', which is not a whole one"),
    "-Infinity": (one(offsets="[-Infinity,4]"), "'-Infinity', which is not a whole one"),
    "minus zero": (one(offsets="[-0,4]"), "-0"),
    "leading zero": (one(offsets="[00,4]"), "not JSON"),
    # Shapes.
    "negative size": (one(shape="[-1]"), "tensor 'a' has the shape [-1], which is no list of sizes"),
    "two negative sizes": (one(shape="[-1,-1]"), "no list of sizes"),
    "bool size": (one(shape="[true]"), "no list of sizes"),
    "text size": (one(shape='["1"]'), "no list of sizes"),
    "null shape": (one(shape="null"), "no list of sizes"),
    "number for a shape": (one(shape="1"), "no list of sizes"),
    "object for a shape": (one(shape='{"0":1}'), "no list of sizes"),
    "list in a shape": (one(shape="[[1]]"), "nested too deeply"),
    "product that wraps to 4 bytes": (one(shape="[4294967296,4294967296,1]"), "more bytes than 63 bits can count"),
    "product that wraps to 1": (one(shape="[9223372036854775809,2]"), "more bytes than 63 bits can count"),
    "bits that wrap to none": (
        one(0, dtype='"F64"', shape="[288230376151711744]", offsets="[0,0]"),
        "but 2305843009213693952 by",
    ),
    "overflow beside a zero": (one(0, shape="[9223372036854775808,4,0]", offsets="[0,0]"), "63 bits"),
    "overflow behind a zero": (one(0, shape="[0,9223372036854775808,4]", offsets="[0,0]"), "63 bits"),
    "size beyond 64 bits beside a zero": (one(0, shape="[0,18446744073709551616]", offsets="[0,0]"), "63 bits"),
    "size beyond 63 bits": (one(shape="[9223372036854775808]", dtype='"U8"'), "63 bits"),
    "size beyond 63 bits beside a zero": (one(0, shape="[0,9223372036854775808]", offsets="[0,0]"), "63 bits"),
    "size beyond 63 bits of four bits": (one(0, shape="[0,9223372036854775808]", dtype='"F4"'), "63 bits"),
    "bytes beyond 63 bits beside a zero": (one(0, shape="[4611686018427387904,0]", offsets="[0,0]"), "63 bits"),
    "65 dimensions": (one(shape=f"[{','.join('1' * 65)}]"), "tensor 'a' has 65 dimensions, more than 64"),
    "a million dimensions": (one(shape=f"[{','.join('1' * 1_000_000)}]"), "has 1000000 dimensions"),
    "shape larger than offsets": (one(shape="[2]"), "has 4 bytes by its data_offsets [0, 4], but 8 by its shape [2]"),
    "shape smaller than offsets": (one(8, offsets="[0,8]"), "has 8 bytes by its data_offsets [0, 8], but 4"),
    "zero-size tensor with bytes": (one(shape="[0]"), "but 0 by its shape [0] of F32"),
    # Offsets.
    "negative offset": (one(offsets="[-4,0]"), "tensor 'a' has the data_offsets [-4, 0], which are no two byte"),
    "bool offsets": (one(1, dtype='"U8"', offsets="[false,true]"), "[False, True], which are no two byte positions"),
    "text offsets": (one(offsets='["0","4"]'), "no two byte positions"),
    "reversed offsets": (one(offsets="[4,0]"), "has -4 bytes by its data_offsets [4, 0]"),
    "one offset": (one(offsets="[4]"), "no two byte positions"),
    "three offsets": (one(offsets="[0,4,4]"), "no two byte positions"),
    "no offsets": (one(offsets="[]"), "no two byte positions"),
    "null offsets": (one(offsets="null"), "no two byte positions"),
    "offset of 2**64": (one(shape="[4611686018427387904]", offsets="[0,18446744073709551616]"), "63 bits"),
    "offsets that wrap": (one(offsets="[18446744073709551612,18446744073709551616]"), "a hole of 184467440737095516"),
    "same bytes twice": (two("[0,4]", "[0,4]", 4), "the bytes of 'a' and 'b' overlap"),
    "partial overlap": (two("[0,4]", "[2,6]", 6), "the bytes of 'a' and 'b' overlap"),
    "overlap, later first": (two("[2,6]", "[0,4]", 6), "the bytes of 'b' and 'a' overlap"),
    "hole": (two("[0,4]", "[6,10]", 10), "a hole of 2 bytes between 'a' and 'b'"),
    "hole at the start": (one(8, offsets="[4,8]"), "a hole of 4 bytes between the header and 'a'"),
    "empty tensor in a hole": (one(0, shape="[0]", offsets="[2,2]"), "a hole of 2 bytes"),
    "data beyond the end": (one(3), "cut short: its tensors need 4 bytes after the header, and there are 3"),
    "no data": (one(0), "need 4 bytes after the header, and there are 0"),
    "trailing data": (one(5), "goes on after the last tensor: its tensors need 4 bytes"),
    "data without tensors": (framed(b"{}", b"x"), "goes on after the last tensor"),
    # Keys.
    "duplicate name": (framed(f'{{"a":{entry()},"a":{entry()}}}'.encode(), bytes(4)), "key 'a' appears twice"),
    "duplicate name, spelt differently": (
        framed(f'{{"a":{entry()},"\\u0061":{entry()}}}'.encode(), bytes(4)),
        "key 'a' appears twice",
    ),
    "duplicate __metadata__": (framed(b'{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' appears twice"),
    "duplicate key in the metadata": (framed(b'{"__metadata__":{"x":"1","x":"2"}}'), "key 'x' appears twice"),
    "duplicate dtype": (one(more=',"dtype":"F32"'), "key 'dtype' appears twice"),
    "duplicate data_offsets": (one(more=',"data_offsets":[0,4]'), "key 'data_offsets' appears twice"),
    "unknown field": (one(more=',"strides":[1]'), "tensor 'a' has the fields ['dtype', 'shape', 'data_offsets', "),
    "unknown field of text": (one(more=',"x":"y"'), "tensor 'a' has the fields"),
    "unknown field for a known one": (
        framed(b'{"a":{"dtype":"F32","shape":[1],"offsets":[0,4]}}', bytes(4)),
        "tensor 'a' has the fields ['dtype', 'shape', 'offsets'], and a tensor has dtype, shape and data_offsets",
    ),
    "no dtype": (framed(b'{"a":{"shape":[1],"data_offsets":[0,4]}}', bytes(4)), "tensor 'a' has the fields"),
    "no shape": (framed(b'{"a":{"dtype":"F32","data_offsets":[0,4]}}', bytes(4)), "tensor 'a' has the fields"),
    "no data_offsets": (framed(b'{"a":{"dtype":"F32","shape":[1]}}'), "tensor 'a' has the fields"),
    "no fields": (framed(b'{"a":{}}'), "tensor 'a' has the fields []"),
    "all fields texts": (one(shape='"[1]"', offsets='"[0,4]"'), "tensor 'a'"),
    "entry is a list": (framed(b'{"a":["F32",[1],[0,4]]}', bytes(4)), "nested too deeply"),
    "entry is a number": (framed(b'{"a":1}'), "the entry 'a' is 1, which describes no tensor"),
    "entry is null": (framed(b'{"a":null}'), "the entry 'a' is None, which describes no tensor"),
    "entry is a text": (framed(b'{"a":"F32"}'), "the entry 'a' is 'F32', which describes no tensor"),
    "good entry before a bad one": (framed(f'{{"a":{entry()},"b":[]}}'.encode(), bytes(4)), "the entry 'b' is []"),
    "an entry is the header": (framed(entry().encode(), bytes(4)), "a single tensor entry without a name"),
    # Metadata.
    "metadata is null": (framed(b'{"__metadata__":null}'), "'__metadata__' is None"),
    "metadata is a text": (framed(b'{"__metadata__":"pt"}'), "'__metadata__' is 'pt'"),
    "metadata is a tensor": (framed(f'{{"__metadata__":{entry()}}}'.encode(), bytes(4)), "__metadata__ is not an obj"),
    "metadata with a number": (framed(b'{"__metadata__":{"step":1}}'), "__metadata__ is not an object of texts"),
    "metadata with null": (framed(b'{"__metadata__":{"step":null}}'), "__metadata__ is not an object of texts"),
    "metadata with an object": (framed(b'{"__metadata__":{"x":{"y":"z"}}}'), "'x'"),
    "metadata with a list": (framed(b'{"__metadata__":{"x":["y"]}}'), "__metadata__ is not an object of texts"),
    "lone surrogate in metadata": (framed(b'{"__metadata__":{"x":"\\udfff"}}'), "a lone surrogate"),
    "lone surrogate in a key": (framed(b'{"__metadata__":{"\\ud800x":""}}'), "a lone surrogate"),
    # Dtypes.
    "unknown dtype": (one(dtype='"F33"'), "tensor 'a' has the unknown dtype 'F33'"),
    "lower-case dtype": (one(dtype='"f32"'), "tensor 'a' has the unknown dtype 'f32'"),
    "torch's word": (one(dtype='"torch.float32"'), "unknown dtype 'torch.float32'"),
    "empty dtype": (one(dtype='""'), "unknown dtype ''"),
    "null dtype": (one(dtype="null"), "unknown dtype None"),
    "number for a dtype": (one(dtype="32"), "unknown dtype 32"),
    "list for a dtype": (one(dtype='["F32"]'), "unknown dtype ['F32']"),
    "object for a dtype": (one(dtype='{"F":32}'), "unknown dtype {...}"),
    "F4 with an odd number of elements": (one(2, dtype='"F4"', shape="[3]", offsets="[0,2]"), "end on a whole byte"),
    "F4 rounded down": (one(1, dtype='"F4"', shape="[3]", offsets="[0,1]"), "does not end on a whole byte"),
    "F6 not on a whole byte": (one(2, dtype='"F6_E2M3"', shape="[2]", offsets="[0,2]"), "end on a whole byte"),
    "F6 taken for a byte": (one(4, dtype='"F6_E3M2"', shape="[4]", offsets="[0,4]"), "but 3 by its shape [4]"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("content", "words"), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_file(content: bytes, words: str) -> None:
    """A file that breaks a rule is refused soon; the message names checkpoint, file and rule, and is short."""
    with pytest.raises(CheckpointError) as caught:
        opened(content)

    assert words in str(caught.value)
    assert f"memory://tests/model/{FILE}: {FILE} is no valid safetensors file: " in str(caught.value)
    assert type(caught.value) is CheckpointError
    assert (FILE, f"memory://tests/model/{FILE}") == (caught.value.file, caught.value.uri)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        '{"%s":1}',
        '{"%s":{}}',
        '{"a":{"%s":1}}',
        '{"a":{"dtype":"%s","shape":[],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"F32","shape":["%s"],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"F32","shape":[],"data_offsets":["%s"]}}',
        '{"a":"%s"}',
        '{"%s":{},"%s":{}}',
        '{"__metadata__":{"%s":"\\ud800"}}',
        f'{{"%s":{entry()}}}',
        f'{{"%s":{entry()},"%s2":{entry()}}}',
    ],
)
def test_long_words_are_cut_in_messages(text: str) -> None:
    """A name of a megabyte does not make a message of a megabyte."""
    content = framed(text.replace("%s", "x" * 1_000_000).encode())

    with pytest.raises(CheckpointError) as caught:
        opened(content)

    assert len(str(caught.value)) < 1000


def _repeated(start: bytes, part: bytes, end: bytes, length: int = 20_000_000) -> bytes:
    return start + part * (length // len(part)) + end


def _numbered(start: bytes, part: bytes, end: bytes, length: int) -> bytes:
    size = len(part % 1_000_000)
    return start + b",".join(part % (1_000_000 + i) for i in range(length // size)) + end


#: Header, what may be said of it, and how many times its length may be allocated.
LARGE: Mapping[str, tuple[Callable[[], bytes], str, float]] = {
    "empty entries": (lambda: _numbered(b"{", b'"%d":{}', b"}", 20_000_000), "describe no tensor", 12),
    "wrong entries": (lambda: _numbered(b"{", b'"%d":{"x":1}', b"}", 20_000_000), "describe no tensor", 12),
    "nested empty entries": (lambda: _numbered(b'{"a":{', b'"%d":{}', b"}}", 20_000_000), "describe no tensor", 12),
    "empty objects in a list": (lambda: _repeated(b'{"a":[{}', b",{}", b"]}"), "nested too deeply", 12),
    "empty lists in a list": (lambda: _repeated(b'{"a":[[]', b",[]", b"]}"), "nested too deeply", 12),
    "opening brackets": (lambda: _repeated(b'{"a":', b"[", b""), "nested too deeply", 12),
    "opening objects": (lambda: _repeated(b"", b'{"":', b""), "nested too deeply", 12),
    "sizes": (
        lambda: _repeated(b'{"a":{"dtype":"U8","shape":[1', b",1", b'],"data_offsets":[0,1]}}', 4_000_000),
        "dimens",
        12,
    ),
    "zeros": (
        lambda: _repeated(b'{"a":{"dtype":"U8","data_offsets":[0', b",0", b'],"shape":[]}}', 4_000_000),
        "no two byte",
        12,
    ),
    "texts in a list": (lambda: _repeated(b'{"a":["xy"', b',"xy"', b"]}", 8_000_000), "the entry 'a' is ['xy'", 18),
    "one number": (lambda: _repeated(b'{"a":{"shape":[1', b"0", b"]}}"), "digits", 12),
    "one name": (lambda: _repeated(b'{"', b"x", b'":1}'), "the entry 'xxx", 12),
    "one escaped name": (lambda: _repeated(b'{"', b"\\n", b'":{}}'), "the tensor '\\n", 12),
    "open quotes after a nested list": (lambda: _repeated(b'{"a":[[],', b'"', b""), "nested too deeply", 12),
    "escaped quotes": (lambda: _repeated(b'{"[[":"', b'\\"', b""), "not JSON", 12),
    "backslashes": (lambda: _repeated(b'{"[[":"', b"\\", b""), "not JSON", 12),
    "quoted brackets": (lambda: _repeated(b'{"', b"[[", b'":0}'), "the entry '[[", 12),
    "spaces": (lambda: _repeated(b"{", b" ", b""), "not JSON", 12),
    "spaces after commas": (lambda: _repeated(b'{"a":[0,', b" ", b"0]}"), "the entry 'a' is [0, 0]", 12),
    "commas": (lambda: _repeated(b'{"a":[', b",", b"]}"), "not JSON", 12),
    "not UTF-8": (lambda: _repeated(b'{"', b"\xff", b'":0}'), "not UTF-8", 12),
    "good entries that overlap": (
        lambda: _numbered(b"{", b'"%d":{"dtype":"U8","shape":[],"data_offsets":[0,1]}', b"}", 4_000_000),
        "overlap",
        12,
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("header", "words", "times"), LARGE.values(), ids=list(LARGE))
def test_large_hostile_header(header: Callable[[], bytes], words: str, times: float) -> None:
    """Megabytes of nonsense are refused in seconds, and with memory in proportion to them."""
    text = header()

    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            parse_header(text, 1, file=FILE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert peak < times * len(text), f"{peak / len(text):.1f} times the header"


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_many_tensors() -> None:
    """A real checkpoint of many experts is read with memory in proportion to its header."""
    described = {
        f"model.layers.{i // 100}.mlp.experts.{i % 100}.up_proj.weight": {
            "dtype": "BF16",
            "shape": [2, 4],
            "data_offsets": [16 * i, 16 * (i + 1)],
        }
        for i in range(30_000)
    }
    text = json.dumps(described, separators=(",", ":")).encode()

    tracemalloc.start()
    try:
        header = parse_header(text, 16 * 30_000, file=FILE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert list(described) == [t.name for t in header.tensors]
    assert peak < 12 * len(text), f"{peak / len(text):.1f} times the header"


def test_deep_nesting_near_the_recursion_limit() -> None:
    """Nesting of any depth is an error of the checkpoint, also where it is only just too deep."""
    for depth in range(1, 1200, 7):
        text = b'{"a":' * depth + b"{}" + b"}" * depth
        with pytest.raises(CheckpointError):
            parse_header(text, 0, file=FILE)


@pytest.mark.parametrize("kind", ["duplicate name", "unknown field", "NUL in a name", "overflow behind a zero"])
def test_stricter_than_the_library(kind: str) -> None:
    """What the library lets pass, keeping one of two tensors or ignoring a field, is refused all the same."""
    content = HOSTILE[kind][0]

    assert safetensors.deserialize(content)
    with pytest.raises(CheckpointError):
        opened(content)
