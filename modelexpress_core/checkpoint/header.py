"""The header of a safetensors file, read strictly.

A file is: 8 bytes, the length N of the header, unsigned and little-endian; N bytes of JSON; the tensors' bytes. The
JSON is one object, ``name -> {"dtype", "shape", "data_offsets"}``, plus ``"__metadata__"``, text to text. The byte
ranges cover what follows the header without a hole and without overlapping.

Source: https://huggingface.co/docs/safetensors/index#format. Where that leaves something open we refuse rather than
guess. A header comes from outside: whatever is in it, reading it ends soon, with a result or a ``CheckpointError``, and
takes memory in proportion to the header's length, which is bounded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from attrs import frozen

from modelexpress_core.checkpoint.strict_json import repeated_key
from modelexpress_core.errors import CheckpointError

__all__ = ["DTYPE_BITS", "LENGTH_BYTES", "MAX_HEADER_BYTES", "Header", "HeaderTensor", "header_length", "parse_header"]

#: Length of the length.
LENGTH_BYTES = 8

#: The format's own limit.
MAX_HEADER_BYTES = 100_000_000

#: More dimensions than any tensor library works with.
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
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_DIGITS_OF_U64 = 20


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
    """What a header says.

    Attributes:
        tensors: In the order of their bytes in the file.
        metadata: The free text that the writer left.
    """

    tensors: tuple[HeaderTensor, ...]
    metadata: Mapping[str, str]


class _Fault(Exception):  # noqa: N818 - never leaves this module
    """What is wrong, without the name of the file."""


class _Entry:
    """An object of the JSON text that has the fields of a tensor; checked when its name is known."""

    __slots__ = ("begin", "dtype", "end", "shape")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise _Fault(f"has the unknown dtype {_shown(dtype)}")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise _Fault(f"has the shape {_shown(shape)}, which is no list of sizes")
        if len(shape) > MAX_DIMENSIONS:
            raise _Fault(f"has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
            raise _Fault(f"has the data_offsets {_shown(offsets)}, which are no two byte positions")
        self.dtype = dtype
        self.shape = tuple(shape)
        self.begin, self.end = offsets
        self._check_length()

    def _check_length(self) -> None:
        # Sizes have at most 20 digits and there are at most 64, so the product stays a small number of words.
        bits = math.prod(self.shape) * DTYPE_BITS[self.dtype]
        if bits % 8:
            raise _Fault(f"does not end on a whole byte: shape {list(self.shape)} of {self.dtype}")
        if self.end - self.begin != bits // 8:
            raise _Fault(
                f"has {self.end - self.begin} bytes by its data_offsets [{self.begin}, {self.end}], "
                f"but {bits // 8} by its shape {list(self.shape)} of {self.dtype}"
            )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _integer(text: str) -> int:
    if len(text) > _DIGITS_OF_U64:
        raise _Fault(f"a number of {len(text)} digits")
    return int(text)


def _no_float(text: str) -> NoReturn:
    raise _Fault(f"the number {_shown(text)}, which is not a whole one")


def _json_object(pairs: list[tuple[str, Any]]) -> Any:  # noqa: ANN401 - one of three things
    """An entry, the metadata, or the whole header: inner objects come first, so wrong ones stop the parse at once."""
    twice = repeated_key(pairs)
    if twice is not None:
        raise _Fault(f"the key {_shown(twice)} stands twice in one object")
    if all(isinstance(value, str) for _, value in pairs):
        return dict(pairs)
    if len(pairs) == len(_FIELDS) and all(key in _FIELDS for key, _ in pairs):
        return _Entry(dict(pairs))
    for key, value in pairs:
        if not isinstance(value, (_Entry, dict)):
            raise _Fault(f"the entry {_shown(key)} is {_shown(value)}, which describes no tensor")
        if isinstance(value, dict) and key != _METADATA:
            raise _Fault(f"the entry {_shown(key)} has the fields {_shown(sorted(value))}, which describe no tensor")
    return pairs


def header_length(start: bytes, file_bytes: int) -> int:
    """The length of the JSON text, from the first 8 bytes of a file of ``file_bytes`` bytes.

    Raises:
        ValueError: There can be no header of that length; the text says why.
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
    """The header in ``text``, of a file with ``data_bytes`` bytes behind the header.

    Raises:
        CheckpointError: It breaks a rule of the format; the message names file, tensor and rule.
    """
    try:
        return _parse(text, data_bytes)
    except _Fault as fault:
        raise CheckpointError(
            f"{file} is no valid safetensors file: {fault}",
            uri=uri,
            file=file,
            cause="the file was cut short, damaged, or written by a faulty program",
            hint="compare its size and digest with the original and copy it again",
        ) from None


def _json(text: bytes) -> Any:  # noqa: ANN401 - whatever the text holds
    if not text.startswith(b"{"):
        raise _Fault("the header does not start with {")
    try:
        # A trailing run of spaces is padding; json takes it as white space.
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_json_object,
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
    if isinstance(parsed, _Entry):
        raise _Fault("the header is a single tensor entry without a name")
    metadata: Mapping[str, str] = {}
    tensors = []
    for name, value in parsed.items() if isinstance(parsed, dict) else parsed:
        if name == _METADATA:
            if not isinstance(value, dict):
                raise _Fault(f"{_METADATA} is not an object of texts")
            metadata = value
            continue
        if not isinstance(value, _Entry):
            raise _Fault(f"the entry {_shown(name)} describes no tensor")
        if _CONTROL.search(name) or not _is_text(name):
            raise _Fault(f"a tensor has the name {_shown(name)}, with characters that no name has")
        tensors.append(HeaderTensor(name, value.dtype, value.shape, value.begin, value.end))
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_cover(tensors, data_bytes)
    return Header(tuple(tensors), metadata)


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell but UTF-8 cannot
        return False
    return True


def _check_cover(tensors: list[HeaderTensor], data_bytes: int) -> None:
    """The byte ranges lie one after another from 0 to the end of the file."""
    position, before = 0, "the header"
    for tensor in tensors:
        if tensor.begin > position:
            raise _Fault(
                f"a hole of {tensor.begin - position} bytes between {_shown(before)} and {_shown(tensor.name)}"
            )
        if tensor.begin < position:
            raise _Fault(f"the bytes of {_shown(before)} and {_shown(tensor.name)} overlap")
        position, before = tensor.end, tensor.name
    if position != data_bytes:
        what = "is cut short" if position > data_bytes else "goes on after the last tensor"
        raise _Fault(f"the file {what}: its tensors need {position} bytes after the header, and there are {data_bytes}")
