"""The header of a safetensors file, read strictly.

A file is: 8 bytes, the length N of the header, unsigned and little-endian; N bytes of JSON; the tensors' bytes. The
JSON is one object, ``name -> {"dtype", "shape", "data_offsets"}``, plus ``"__metadata__"``, text to text. The byte
ranges cover what follows the header without a hole and without overlapping.

Source: https://huggingface.co/docs/safetensors/index#format. What it leaves open is refused, not guessed;
docs/safetensors.md lists what the format's library reads and this module refuses. A header is untrusted input: whatever
it holds, parsing ends soon, with a result or a ``CheckpointError``, and takes memory in proportion to the header's
length, which is bounded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any, NoReturn, TypeVar

from attrs import frozen

from modelexpress_core.checkpoint.strict_json import repeated_key, shown
from modelexpress_core.errors import CheckpointError
from modelexpress_core.messages import printable

__all__ = ["DTYPE_BITS", "LENGTH_BYTES", "MAX_HEADER_BYTES", "Header", "HeaderTensor", "header_length", "parse_header"]

_R = TypeVar("_R")

#: Bytes of the header's length.
LENGTH_BYTES = 8

#: The format's own limit.
MAX_HEADER_BYTES = 100_000_000

#: More dimensions than any tensor library supports.
MAX_DIMENSIONS = 64

#: Every dtype of the format, with the bits of one element.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

_METADATA = "__metadata__"
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_FIELDS_SHOWN = "dtype, shape and data_offsets"
_LONE_SURROGATES = r"\ud800-\udfff"  # JSON can write them, UTF-8 cannot
_NOT_IN_NAMES = re.compile(rf"[\x00-\x1f\x7f{_LONE_SURROGATES}]")
_NOT_IN_TEXTS = re.compile(f"[{_LONE_SURROGATES}]")
_DIGITS_OF_U64 = 20

#: Sizes, products of sizes and positions are signed numbers of 64 bits in tensor libraries and operating systems.
_MAX_INT64 = (1 << 63) - 1
_A_LONE_ENTRY = "the header is a single tensor entry without a name"

#: What JSON allows between its parts.
_WHITE_SPACE = b" \t\r\n"

#: A list or an object that begins in a list. Members of an object are different: a name comes before them.
_INNER = re.compile(rb"[\[,][ \t\r\n]*[\[{]")
_TEXT_OR_INNER = re.compile(rb'"[^"]*"?|(?P<inner>' + _INNER.pattern + rb")")

#: One is the metadata, one may be an empty header, and a few may be wrong before parsing gives up.
_MAX_OTHERS = 100


@frozen
class HeaderTensor:
    """One entry of a header.

    Attributes:
        name: The tensor's name.
        dtype: A key of ``DTYPE_BITS``.
        shape: Sizes of its dimensions, in elements.
        begin: First byte, counted from the end of the header.
        end: One past the last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@frozen
class Header:
    """A parsed header.

    Attributes:
        tensors: In the order of their bytes in the file.
        metadata: The free text of the writer.
    """

    tensors: tuple[HeaderTensor, ...]
    metadata: Mapping[str, str]


class _Fault(Exception):  # noqa: N818 - never leaves this module
    """A rule of the format that a header breaks, without the name of the file."""


class _Object:
    """An object of the JSON text that is not text to text. Inner objects are parsed before their name is known."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "{...}"


class _Entry(_Object):
    """An object that has the fields of a tensor."""

    __slots__ = ("begin", "dtype", "end", "shape")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise _Fault(f"has the unknown dtype {shown(dtype)}")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise _Fault(f"has the shape {shown(shape)}, which is no list of sizes")
        if len(shape) > MAX_DIMENSIONS:
            raise _Fault(f"has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
            raise _Fault(f"has the data_offsets {shown(offsets)}, which are no two byte positions")
        self.dtype = dtype
        self.shape = tuple(shape)
        self.begin, self.end = offsets
        self._check_length()

    def _check_length(self) -> None:
        # There are at most 64 sizes of at most 20 digits, so the product stays small.
        bits = math.prod(self.shape) * DTYPE_BITS[self.dtype]
        # Strides are products of sizes too, so the other sizes must not overflow even if one is zero.
        spanned = math.prod(filter(None, self.shape))
        if spanned > _MAX_INT64 or spanned * DTYPE_BITS[self.dtype] // 8 > _MAX_INT64:
            raise _Fault(f"has the shape {shown(list(self.shape))}, more bytes than 63 bits can count")
        if bits % 8:
            raise _Fault(f"does not end on a whole byte: shape {shown(list(self.shape))} of {self.dtype}")
        if self.end - self.begin != bits // 8:
            raise _Fault(
                f"has {self.end - self.begin} bytes by its data_offsets [{self.begin}, {self.end}], "
                f"but {bits // 8} by its shape {shown(list(self.shape))} of {self.dtype}"
            )


class _Entries(_Object):
    """An object of tensors, perhaps with metadata: the header, or an invalid part of one."""

    __slots__ = ("members",)

    def __init__(self, members: list[tuple[str, Any]]) -> None:
        self.members = members


class _Wrong(_Object):
    """An object that is no part of a header.

    Attributes:
        as_tensor: What is wrong with it as a tensor; the text follows the tensor's name.
        as_header: What is wrong with it as the header.
    """

    __slots__ = ("as_header", "as_tensor")

    def __init__(self, as_tensor: str, as_header: str) -> None:
        self.as_tensor = as_tensor
        self.as_header = as_header


class _Objects:
    """Turns each object of the JSON text into a part of the header, so that only what is needed is kept."""

    def __init__(self) -> None:
        self._others = 0

    def __call__(self, pairs: list[tuple[str, Any]]) -> Any:  # noqa: ANN401 - an _Object, or the metadata
        twice = repeated_key(pairs)
        if twice is not None:
            raise _Fault(f"the key {shown(twice)} appears twice in one object")
        if len(pairs) == len(_FIELDS) and all(key in _FIELDS for key, _ in pairs):
            fields = dict(pairs)
            try:
                return _Entry(fields)
            except _Fault as fault:
                if not _are_texts(pairs):  # metadata may look like this
                    return self._other(_Wrong(str(fault), _A_LONE_ENTRY))
        if _are_texts(pairs):
            return self._other(dict(pairs))
        for key, value in pairs:
            if isinstance(value, (_Object, dict)):
                self._check_member(key, value)
            else:
                names = shown([name for name, _ in pairs[:9]])
                return self._other(
                    _Wrong(
                        f"has the fields {names}, and a tensor has {_FIELDS_SHOWN}",
                        f"the entry {shown(key)} is {shown(value)}, which describes no tensor",
                    )
                )
        return _Entries(pairs)

    def _other(self, made: _R) -> _R:
        # One object of texts is the metadata; the others are kept until their name is known, for the message.
        self._others += 1
        if self._others > _MAX_OTHERS:
            raise _Fault(f"more than {_MAX_OTHERS} entries describe no tensor")
        return made

    @staticmethod
    def _check_member(name: str, value: object) -> None:
        """Raise unless ``value`` is valid in a header under ``name``."""
        if name == _METADATA:
            if not isinstance(value, dict):
                raise _Fault(f"{_METADATA} is not an object of texts")
        elif isinstance(value, dict):
            if value.keys() == _FIELDS:
                raise _Fault(f"the tensor {shown(name)} has texts instead of a shape and byte positions")
            names = shown([*islice(value, 9)])
            raise _Fault(f"the tensor {shown(name)} has the fields {names}, and a tensor has {_FIELDS_SHOWN}")
        elif isinstance(value, _Wrong):
            raise _Fault(f"the tensor {shown(name)} {value.as_tensor}")
        elif not isinstance(value, _Entry):
            raise _Fault(f"the tensor {shown(name)} is an object of objects, and a tensor has {_FIELDS_SHOWN}")


def _are_texts(pairs: list[tuple[str, Any]]) -> bool:
    return all(isinstance(value, str) for _, value in pairs)


def _integer(text: str) -> int:
    if len(text) > _DIGITS_OF_U64:
        raise _Fault(f"a number of {len(text)} digits")
    if text == "-0":
        raise _Fault("the number -0, which is no size or position")
    return int(text)


def _no_float(text: str) -> NoReturn:
    raise _Fault(f"the number {shown(text)}, which is not a whole one")


def _has_inner_list(text: bytes) -> bool:
    """Whether a list contains a list or an object. No header needs that, and millions would take much memory."""
    if _INNER.search(text) is None:
        return False
    # The match may be inside a text. Without escapes, each quote begins or ends one.
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"")
    return any(found.lastgroup == "inner" for found in _TEXT_OR_INNER.finditer(plain))


def header_length(start: bytes, file_bytes: int) -> int:
    """The length of the JSON text, from the first 8 bytes of a file of ``file_bytes`` bytes.

    Raises:
        ValueError: No header has that length; the text says why.
    """
    if file_bytes < LENGTH_BYTES or len(start) < LENGTH_BYTES:
        message = f"the file has {file_bytes} bytes, too few for a safetensors file"
        raise ValueError(message)
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        message = f"the header would be {length} bytes long; the format allows {MAX_HEADER_BYTES}"
        raise ValueError(message)
    if length > file_bytes - LENGTH_BYTES:
        message = f"the header would be {length} bytes long, but the file has only {file_bytes} bytes"
        raise ValueError(message)
    return length


def parse_header(text: bytes, data_bytes: int, *, file: str, uri: str = "") -> Header:
    """Parse the header ``text`` of a file with ``data_bytes`` bytes after the header.

    Raises:
        CheckpointError: It breaks a rule of the format; the message names file, tensor and rule.
    """
    try:
        return _parse(text, data_bytes)
    except _Fault as fault:
        where = f"could not open {uri}: {printable(file)}" if uri else printable(file)
        raise CheckpointError(
            f"{where} is no valid safetensors file: {fault}",
            uri=uri,
            file=file,
            cause="the file was cut short, damaged, or written by a faulty program",
            hint="compare its size and digest with the original and copy it again",
        ) from None


def _json(text: bytes) -> Any:  # noqa: ANN401 - of any type
    # The format's text wants { first, but its own tests and library allow white space before it.
    if not text.lstrip(_WHITE_SPACE).startswith(b"{"):
        raise _Fault("the header does not start with {")
    if _has_inner_list(text):
        raise _Fault("the header is nested too deeply: a list contains a list or an object")
    try:
        # White space after the object is padding; json takes it as such.
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_Objects(),
            parse_int=_integer,
            parse_float=_no_float,
            parse_constant=_no_float,
        )
    except UnicodeDecodeError as exc:
        raise _Fault(f"the header is not UTF-8 at byte {exc.start}") from None
    except RecursionError:
        raise _Fault("the header is nested too deeply") from None
    except json.JSONDecodeError as exc:
        raise _Fault(f"the header is not JSON: {exc.msg} at character {exc.pos}") from None


def _parse(text: bytes, data_bytes: int) -> Header:
    parsed = _json(text)
    if isinstance(parsed, _Wrong):
        raise _Fault(parsed.as_header)
    if isinstance(parsed, _Entry):
        raise _Fault(_A_LONE_ENTRY)
    if isinstance(parsed, dict) and parsed:
        name, value = next(iter(parsed.items()))
        raise _Fault(f"the entry {shown(name)} is {shown(value)}, which describes no tensor")
    metadata: Mapping[str, str] = {}
    tensors = []
    for name, value in parsed.members if isinstance(parsed, _Entries) else ():
        if name == _METADATA:
            metadata = value
            continue
        if _NOT_IN_NAMES.search(name):
            raise _Fault(f"a tensor has the name {shown(name)}, with characters that are not allowed in names")
        tensors.append(HeaderTensor(name, value.dtype, value.shape, value.begin, value.end))
    for key, value in metadata.items():
        if _NOT_IN_TEXTS.search(key) or _NOT_IN_TEXTS.search(value):
            raise _Fault(f"{_METADATA} has a lone surrogate in {shown(key)}")
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_cover(tensors, data_bytes)
    return Header(tuple(tensors), metadata)


def _check_cover(tensors: list[HeaderTensor], data_bytes: int) -> None:
    """Raise unless the byte ranges follow one another from 0 to the end of the file."""
    position, before = 0, "the header"
    for tensor in tensors:
        if tensor.begin > position:
            raise _Fault(f"a hole of {tensor.begin - position} bytes between {before} and {shown(tensor.name)}")
        if tensor.begin < position:
            raise _Fault(f"the bytes of {before} and {shown(tensor.name)} overlap")
        position, before = tensor.end, shown(tensor.name)
    if position != data_bytes:
        what = "is cut short" if position > data_bytes else "goes on after the last tensor"
        raise _Fault(f"the file {what}: its tensors need {position} bytes after the header, and there are {data_bytes}")
