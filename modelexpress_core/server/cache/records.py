"""What the cache knows of a version: a record on disk, written once all its files are there and verified."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
from attrs import field, frozen
from attrs.validators import deep_mapping, ge, instance_of, optional

from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.copying.selection import reason_to_refuse
from modelexpress_core.immutable import unmodifiable

__all__ = ["COMMIT_DIGITS", "CachedFile", "Record", "StoredFile", "is_commit", "key_of", "version_of"]

#: The number of the format: a record of another one is not read.
_FORMAT = 1

_MAX_RECORD_BYTES = 64 << 20

#: Hex digits of a commit.
COMMIT_DIGITS = 40

_COMMIT = re.compile(rf"[0-9a-f]{{{COMMIT_DIGITS}}}")


@frozen
class CachedFile:
    """A file of a model, as its storage describes it.

    Attributes:
        path: Path below the model.
        size: Length in bytes.
        version: Version in the storage; None if that has none.
        digests: Digests that the storage publishes, by algorithm, in hex.
    """

    path: str = field(validator=instance_of(str))
    size: int = field(validator=[instance_of(int), ge(0)])
    version: str | None = field(default=None, validator=optional(instance_of(str)))
    digests: Mapping[str, str] = field(
        factory=dict, converter=unmodifiable, hash=False, validator=deep_mapping(instance_of(str), instance_of(str))
    )

    def __attrs_post_init__(self) -> None:
        reason = reason_to_refuse(self.path)
        if reason:
            message = f"{self.path!r} {reason}"
            raise ValueError(message)


@frozen
class StoredFile:
    """Where a file of a model is, and how it looked when it was verified.

    Attributes:
        file: The file.
        blob: Path of its bytes, relative to the directory of the cache.
        inode: Its inode.
        mtime_ns: Its modification time.
    """

    file: CachedFile
    blob: str = field(validator=instance_of(str))
    inode: int = field(validator=instance_of(int))
    mtime_ns: int = field(validator=instance_of(int))

    def is_unchanged(self, stat: os.stat_result) -> bool:
        """Whether the file with these facts is the one that was verified."""
        return (stat.st_size, stat.st_ino, stat.st_mtime_ns) == (self.file.size, self.inode, self.mtime_ns)


@frozen
class Record:
    """A version that is complete.

    Attributes:
        place: Canonical name of the model.
        source: Redacted URI that it was downloaded from.
        version: The version.
        revision: The revision that was asked for; empty for the default.
        weights: Whether files of weights are part of it.
        files: The files, in the order of their paths.
        directory: The directory with the files under their names, relative to that of the cache.
        manifest_digest: Digest of its chunk manifest.
        restricted: Whether its storage gives it to some readers alone.
        owner: Who had it downloaded.
    """

    place: str = field(validator=instance_of(str))
    source: str = field(validator=instance_of(str))
    version: str = field(validator=instance_of(str))
    revision: str = field(validator=instance_of(str))
    weights: bool = field(validator=instance_of(bool))
    files: tuple[StoredFile, ...] = field(repr=False)
    directory: str = field(validator=instance_of(str))
    manifest_digest: str = field(validator=instance_of(str))
    restricted: bool = field(default=False, validator=instance_of(bool))
    owner: str = field(default="", validator=instance_of(str))

    @property
    def key(self) -> str:
        """Names its files on disk."""
        return key_of(self.place, self.version, weights=self.weights)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(stored.file.size for stored in self.files)

    @property
    def text(self) -> bytes:
        """Its form on disk."""
        fields = attrs.asdict(self, value_serializer=lambda _inst, _field, value: _plain(value))
        return json.dumps({"format": _FORMAT, **fields}, sort_keys=True).encode()

    @classmethod
    def parse(cls, text: bytes) -> Record:
        """The record whose form on disk ``text`` is.

        Raises:
            ValueError: It is none of this format.
        """
        try:
            data: Any = json.loads(text) if len(text) <= _MAX_RECORD_BYTES else None
            if data.pop("format") != _FORMAT:
                message = "it has another format"
                raise ValueError(message)  # noqa: TRY301 - one message for all that is wrong
            files = tuple(
                StoredFile(**{**stored, "file": CachedFile(**stored["file"])}) for stored in data.pop("files")
            )
            return cls(files=files, **data)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as exc:
            message = f"no record of a version: {exc}"
            raise ValueError(message) from exc


def _plain(value: Any) -> Any:  # noqa: ANN401 - any field
    return dict(value) if isinstance(value, Mapping) else value


def key_of(place: str, version: str, *, weights: bool) -> str:
    """A name for the files of a version on disk."""
    text = json.dumps([place, version, weights])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_commit(text: str) -> bool:
    """Whether ``text`` is the name of a commit, as git has them."""
    return _COMMIT.fullmatch(text) is not None


def version_of(files: Iterable[ObjectInfo]) -> str:
    """The version of a model with these files.

    A storage whose versions are of a commit writes it first: ``"<40 hex digits>/..."``. It is the version, then. Else
    the version is a digest of all paths, sizes, versions and digests. Files without a version and digests have the
    version of this moment: what is downloaded again is another version.
    """
    listed = list(files)
    begun = {version.partition("/")[0] if "/" in (version := info.version or "") else "" for info in listed}
    commits = {commit if is_commit(commit) else "" for commit in begun}
    if len(commits) == 1 and (commit := commits.pop()):
        return commit
    facts = [
        [info.path, info.size, info.version, sorted(info.digests.items())]
        for info in sorted(listed, key=lambda info: info.path)
    ]
    if any(info.version is None and not info.digests for info in listed):
        facts.append(["", time.time_ns(), None, []])
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogatepass")).hexdigest()
