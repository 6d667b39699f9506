"""How safetensors files and sharded checkpoints look, byte by byte; written without the library under comparison."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelexpress_core.storage.memory import MemoryStorage

#: ``(dtype, shape, bytes)`` of one tensor.
Stored = tuple[str, Sequence[int], bytes]

INDEX = "model.safetensors.index.json"

#: Bits of one element, written down from the format's documentation and not taken from the code under test.
BITS = {
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


def stored_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes in a file."""
    bits = math.prod(shape) * BITS[dtype]
    assert bits % 8 == 0, f"{dtype} {list(shape)} does not end on a whole byte"
    return bits // 8


def pattern(length: int, seed: int = 0) -> bytes:
    """``length`` bytes that differ from place to place and from seed to seed."""
    return bytes((seed * 37 + i * 7 + (i >> 8)) & 0xFF for i in range(length))


def tensor(dtype: str, shape: Sequence[int], seed: int = 0) -> Stored:
    """A tensor with made-up bytes."""
    return dtype, tuple(shape), pattern(stored_bytes(dtype, shape), seed)


def entries(tensors: Mapping[str, Stored], order: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """The header's entries for ``tensors``, whose bytes lie in ``order`` (by default that of the mapping)."""
    positions = {}
    position = 0
    for name in order or list(tensors):
        content = tensors[name][2]
        positions[name] = [position, position + len(content)]
        position += len(content)
    return {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": positions[name]}
        for name, (dtype, shape, _) in tensors.items()
    }


def framed(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file: the length of the header (or another one), the header as it is, the data."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def safetensors_file(
    tensors: Mapping[str, Stored],
    *,
    metadata: Mapping[str, str] | None = None,
    order: Sequence[str] | None = None,
    align: int = 8,
    header: bytes | None = None,
) -> bytes:
    """A safetensors file.

    Args:
        tensors: By name, in the order of the header's keys.
        metadata: Free text for the header.
        order: Names in the order of their bytes; by default that of the keys.
        align: The header is padded with spaces so that the data begin at a multiple of this.
        header: The header's text as it is, instead of the right one.
    """
    order = list(tensors) if order is None else list(order)
    if header is None:
        described: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
        described |= entries(tensors, order)
        header = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
        header += b" " * (-(8 + len(header)) % align)
    return framed(header, b"".join(tensors[name][2] for name in order))


def index_text(weight_map: Mapping[str, str], **others: Any) -> bytes:
    """An index."""
    return json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(weight_map), **others}).encode()


def sharded(
    shards: Mapping[str, Mapping[str, Stored]],
    *,
    index: str | None = INDEX,
    weight_map: Mapping[str, str] | None = None,
) -> dict[str, bytes]:
    """The files of a sharded checkpoint, by name.

    Args:
        shards: ``file name -> tensors``.
        index: Name of the index; None for none.
        weight_map: What the index says, instead of the truth.
    """
    files = {name: safetensors_file(tensors) for name, tensors in shards.items()}
    if index is not None:
        truth = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        files[index] = index_text(truth if weight_map is None else weight_map)
    return files


def shard_name(number: int, count: int, stem: str = "model") -> str:
    """``model-00001-of-00003.safetensors``."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def write_files(directory: Path, files: Mapping[str, bytes]) -> Path:
    """Write ``files`` below ``directory``, making directories as needed."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return directory


def memory_storage(files: Mapping[str, bytes], *, below: str = "model") -> MemoryStorage:
    """A storage of its own with ``files`` at ``below``."""
    storage = MemoryStorage("tests")
    for name, content in files.items():
        storage.put(f"{below}/{name}" if below else name, content)
    return storage
