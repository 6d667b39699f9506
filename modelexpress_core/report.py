"""What a load or a pull did, in figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
from attrs import frozen

__all__ = ["LoadReport", "PullReport", "PulledFile", "format_bytes", "format_files"]


@frozen
class LoadReport:
    """The account of one load.

    Attributes:
        uri: Redacted URI of the checkpoint.
        storage: Plugin that read it: ``{"plugin": distribution, "version": ...}``.
        tensors: Tensors of the checkpoint of which anything was used.
        tensors_in_checkpoint: Tensors in the checkpoint.
        files: Files read from.
        bytes_needed: Bytes of the tensors (or parts of tensors) asked for, each counted once per use.
        bytes_fetched: Weight bytes read from the storage, gaps between merged reads included.
        bytes_reread: Bytes read once more, because a digest was wrong, to find and mend what was damaged on its way.
        bytes_materialised: Bytes turned into plain tensors because code computed with them.
        header_bytes: Bytes read to open the checkpoint.
        seconds: From opening to the last byte in place.
        phase_seconds: The same, by phase: ``open``, ``load``.
        goodput_bytes_per_second: ``bytes_needed`` over ``seconds``.
        requests: Reads sent to the storage, headers not included.
        retries: Reads sent again.
        concurrency: Most reads in flight at once.
        verified: Files of which was checked: ``versions``, ``sizes``, ``digests`` (published ones, of files that were
            read as a whole).
        materialised_operations: Operations that made bytes into plain tensors, and how often.
        meta_destinations: Copies onto the meta device, which has no memory: nothing moved for them.
        peak_rss_bytes: Largest resident memory of the process so far.
    """

    uri: str
    storage: Mapping[str, str]
    tensors: int
    tensors_in_checkpoint: int
    files: int
    bytes_needed: int
    bytes_fetched: int
    bytes_reread: int
    bytes_materialised: int
    header_bytes: int
    seconds: float
    phase_seconds: Mapping[str, float]
    goodput_bytes_per_second: float
    requests: int
    retries: int
    concurrency: int
    verified: Mapping[str, int]
    materialised_operations: Mapping[str, int]
    meta_destinations: int
    peak_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return attrs.asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.tensors} tensors from {self.uri}: {format_bytes(self.bytes_needed)} needed, "
            f"{format_bytes(self.bytes_fetched)} fetched in {self.requests} reads, {self.seconds:.2f} s, "
            f"{format_bytes(self.goodput_bytes_per_second)}/s, {self.retries} retries"
        )


@frozen
class PulledFile:
    """One file of a pull.

    Attributes:
        name: Path below the directory.
        size: Length in bytes.
        version: Version of the object; None where the storage has nothing of the kind.
        status: ``"copied"``, ``"resumed"`` (bytes of an earlier pull were used), or ``"skipped"`` (it was there).
        digest: Algorithm and value that its bytes were compared with, in this pull or when it was put in place; None
            where the storage publishes none.
    """

    name: str
    size: int
    version: str | None
    status: Literal["copied", "resumed", "skipped"]
    digest: tuple[str, str] | None


@frozen
class PullReport:
    """The account of one pull.

    Attributes:
        uri: Redacted URI of what was copied.
        directory: Where to.
        storage: Plugin that read it: ``{"plugin": distribution, "version": ...}``.
        files: Files that are in place now.
        bytes: Bytes of all of them.
        bytes_copied: Bytes read from the storage; those that had to be read again count each time.
        bytes_skipped: Bytes of files that were there already.
        bytes_resumed: Bytes that an earlier pull, which did not end, had left.
        left_out: Objects that were not copied, and how many: ``hidden``, ``weights``.
        seconds: From opening the storage to the last file in place.
        bytes_per_second: ``bytes_copied`` over ``seconds``.
        requests: Reads sent to the storage, listing not included.
        retries: Reads sent again.
        concurrency: Most reads in flight at once.
        verified_digests: Files whose bytes were compared with a published digest in this pull, by algorithm.
        file_list: Each file, sorted by name.
    """

    uri: str
    directory: str
    storage: Mapping[str, str]
    files: int
    bytes: int
    bytes_copied: int
    bytes_skipped: int
    bytes_resumed: int
    left_out: Mapping[str, int]
    seconds: float
    bytes_per_second: float
    requests: int
    retries: int
    concurrency: int
    verified_digests: Mapping[str, int]
    file_list: Sequence[PulledFile]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return attrs.asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.files} files from {self.uri} in {self.directory}: {format_bytes(self.bytes_copied)} copied, "
            f"{format_bytes(self.bytes_resumed)} resumed, {format_bytes(self.bytes_skipped)} skipped, "
            f"{self.seconds:.2f} s, {format_bytes(self.bytes_per_second)}/s, {self.retries} retries"
        )


def format_files(count: int) -> str:
    """``count`` files for people: ``"1 file"``."""
    return "1 file" if count == 1 else f"{count} files"


def format_bytes(count: float) -> str:
    """``count`` bytes for people, in powers of 1000: ``"1.23 GB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
