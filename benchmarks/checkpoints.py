"""Generated checkpoints, their layout in one destination buffer, and their digest."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

if TYPE_CHECKING:
    import torch

__all__ = ["Destination", "Section", "digest_of", "digest_of_directory", "generated", "pieces", "sections"]

_ALIGNMENT = 64


@frozen
class Section:
    """The tensors of one file: their position in the file and in the destination.

    Attributes:
        name: The file's name.
        start: First byte of the tensors in the file.
        length: Bytes of the tensors.
        there: Offset of the first byte in the destination.
    """

    name: str
    start: int
    length: int
    there: int


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        return 8 + length, json.loads(opened.read(length))


def sections(directory: Path) -> list[Section]:
    """Return the sections of all safetensors files in ``directory``, one after another in the destination."""
    found = []
    there = 0
    for file in sorted(directory.glob("*.safetensors")):
        start, _ = _header(file)
        length = file.stat().st_size - start
        found.append(Section(file.name, start, length, there))
        there += -(-length // _ALIGNMENT) * _ALIGNMENT
    return found


def pieces(parts: Sequence[Section], piece_bytes: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield ``(file, offset in it, length, offset in the destination)``, each of at most ``piece_bytes``."""
    for part in parts:
        for done in range(0, part.length, piece_bytes):
            yield part.name, part.start + done, min(piece_bytes, part.length - done), part.there + done


class Destination:
    """Memory for a whole checkpoint, already touched, and its tensors as views of it.

    Attributes:
        memory: The whole memory.
        tensors: The tensors by name.
    """

    def __init__(self, directory: Path) -> None:
        import torch

        dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
        parts = sections(directory)
        last = parts[-1]
        whole = torch.full((last.there + last.length,), 0xAA, dtype=torch.uint8)
        self.memory = memoryview(whole.numpy())
        self.tensors: dict[str, torch.Tensor] = {}
        for part in parts:
            _, entries = _header(directory / part.name)
            for name, entry in entries.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    raw = whole[part.there + begin : part.there + end]
                    self.tensors[name] = raw.view(dtypes[entry["dtype"]]).view(entry["shape"])


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of names and bytes."""
    import torch

    value = 0
    for name in sorted(tensors):
        content = tensors[name].contiguous().flatten().view(torch.uint8).numpy()
        value = zlib.crc32(content, zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def digest_of_directory(directory: Path) -> str:
    """Return the digest of the tensors that the safetensors library reads from the files of ``directory``."""
    from safetensors.torch import load_file

    files = sorted(directory.glob("*.safetensors"))
    return digest_of({name: tensor for file in files for name, tensor in load_file(file).items()})


def generated(scratch: Path, *, quick: bool) -> Path:
    """Return the directory of a checkpoint of 1.1 GB in four files (10 MB in quick mode); create it if missing."""
    from devtools.models import generate_sharded

    directory = scratch / ("small" if quick else "large")
    if not directory.exists():
        layers, hidden = (2, 384) if quick else (11, 2048)
        made = generate_sharded(scratch / f"{directory.name}.incomplete", shards=4, layers=layers, hidden=hidden)
        made.rename(directory)
    return directory
