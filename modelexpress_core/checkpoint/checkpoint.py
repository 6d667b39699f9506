"""A checkpoint that was opened: its files, their versions, and the byte range of every tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property

from attrs import define, evolve, field, frozen

from modelexpress_core.immutable import unmodifiable
from modelexpress_core.uri import ModelURI

__all__ = ["Checkpoint", "CheckpointFile", "TensorInfo"]

#: Nobody may find other content with the same version.
_VERSION_DIGITS = 64


@frozen
class CheckpointFile:
    """One safetensors file.

    Attributes:
        path: Path below the storage's authority.
        name: Path below the checkpoint, for messages and reports.
        size: Length in bytes.
        version: Pins its content; None if the storage has no versions.
        header_bytes: Bytes before those of the tensors.
        digests: Digests that the storage publishes, by algorithm, in hex.
        metadata: Free text of the writer, from the header.
        header: The bytes before those of the tensors, kept if there are digests to compare.
        origin: As in ``ObjectInfo``.
    """

    path: str
    name: str
    size: int
    version: str | None
    header_bytes: int
    digests: Mapping[str, str] = field(factory=dict, converter=unmodifiable, hash=False)
    metadata: Mapping[str, str] = field(factory=dict, converter=unmodifiable, hash=False)
    header: bytes = field(default=b"", repr=False, eq=False)
    origin: tuple[str, str] | None = None


@define(frozen=True, slots=True, eq=False)
class TensorInfo:
    """One stored tensor.

    Attributes:
        name: Its name.
        dtype: Its dtype in the safetensors format (``"BF16"``).
        shape: Sizes in elements; scalars have none.
        file: Its file.
        offset: First byte, counted from the start of the file.
        length: Bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: CheckpointFile
    offset: int
    length: int


@define(frozen=True, slots=False, eq=False)
class Checkpoint:
    """Files, versions and tensors; no weight byte has moved.

    Attributes:
        uri: The checkpoint.
        provider: Name of the storage plugin that opened it.
        files: In order of name.
        tensors: By name, in the order of files and of bytes in them.
        opened_bytes: Bytes read to open it.
    """

    uri: ModelURI
    provider: str
    files: tuple[CheckpointFile, ...]
    tensors: Mapping[str, TensorInfo]
    opened_bytes: int

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.length for tensor in self.tensors.values())

    @cached_property
    def content_version(self) -> str | None:
        """Differs for other content: a digest of the URIs, sizes and versions of all files; None if one has no version.

        The query of the URI is not part of it: a branch and the commit that it points at have the same content.
        Whether it is the same on other machines depends on the storage: see ``StorageCapabilities.global_versions``.
        """
        place = evolve(self.uri, query={})
        named = ((file, file.origin or (str(place.with_path(file.path)), file.version)) for file in self.files)
        described = [[uri, file.size, version] for file, (uri, version) in named]
        if any(file.version is None for file in self.files):
            return None
        text = json.dumps(sorted(described), separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_VERSION_DIGITS]

    def __repr__(self) -> str:
        return f"<Checkpoint {self.uri}: {len(self.tensors)} tensors in {len(self.files)} files>"
