"""Figures of a load or a pull."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
from attrs import frozen

__all__ = ["LoadReport", "PullReport", "PulledFile", "SourceReport", "format_bytes", "format_compared", "format_files"]


@frozen
class SourceReport:
    """What one worker delivered to a load.

    Attributes:
        uri: Redacted URI of the worker; its scheme is the transport.
        bytes: Bytes that it delivered and that were used.
        seconds: Time from its first read to its last byte.
        error: Class of the error because of which the load went on without it; empty if there was none.
        channel: The way of the bytes, where the transport has several, and why it is not a faster one; else empty.
    """

    uri: str
    bytes: int
    seconds: float
    error: str = ""
    channel: str = ""


@frozen
class LoadReport:
    """Figures of one load.

    Attributes:
        uri: Redacted URI of the checkpoint, or of the worker that delivered most.
        storage: Plugin that read it: ``{"plugin": distribution, "version": ...}``.
        tensors: Tensors of the checkpoint that were used, in whole or in part.
        tensors_in_checkpoint: Tensors in the checkpoint.
        files: Files that were read.
        bytes_needed: Bytes of the requested tensors or parts of tensors, counted once per use.
        bytes_fetched: Weight bytes read from the storage, gaps between merged reads included.
        bytes_reread: Bytes read again after a wrong digest, to find and replace bytes that were damaged in transit.
        bytes_materialised: Bytes that became plain tensors because code computed with them.
        header_bytes: Bytes read to open the checkpoint.
        seconds: Time from opening to the last byte in place.
        phase_seconds: This time by phase: ``open``, ``load``.
        goodput_bytes_per_second: ``bytes_needed`` over ``seconds``.
        requests: Reads sent to the storage, without headers.
        retries: Reads sent again.
        concurrency: Most reads in flight at once.
        verified: Number of files whose ``versions``, ``sizes`` and ``digests`` were checked (digests: those that the
            storage publishes, of files that were read as a whole).
        materialised_operations: Operations that turned bytes into plain tensors, and how often.
        meta_destinations: Copies to the meta device, which has no memory: no byte moved for them.
        peak_rss_bytes: Largest resident memory of the process so far.
        content_version: The same for every load of the same content, on any machine; empty where the storage cannot
            tell it, as for local files. ``own_identity`` takes it.
        sources: Each worker that the load read from; empty for a checkpoint.
        bytes_compared: Bytes that were compared with digests of pieces of the files, as a chunk manifest has them.
        bytes_compared_by_server: Bytes that the server compared in place of this reader: they make up no whole pieces.
        channel: The way of the bytes, where the storage has several, and why it is not a faster one; else empty.
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
    content_version: str = ""
    sources: Sequence[SourceReport] = ()
    bytes_compared: int = 0
    bytes_compared_by_server: int = 0
    channel: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return attrs.asdict(self)

    def __str__(self) -> str:
        others = len(self.sources) - 1
        return (
            f"{self.tensors} tensors from {self.uri}{f' and {others} more' if others > 0 else ''}: "
            f"{format_bytes(self.bytes_needed)} needed, "
            f"{format_bytes(self.bytes_fetched)} fetched in {self.requests} reads, {self.seconds:.2f} s, "
            f"{format_bytes(self.goodput_bytes_per_second)}/s, {self.retries} retries"
            f"{format_compared(self.bytes_compared, self.bytes_compared_by_server, before=', ')}"
        )


@frozen
class PulledFile:
    """One file of a pull.

    Attributes:
        name: Path below the directory.
        size: Length in bytes.
        version: Version of the object; None if the storage has no versions.
        status: ``"copied"``, ``"resumed"`` (bytes of an earlier pull were used), or ``"skipped"`` (it was in place).
        digest: Algorithm and value of the digest that its bytes were compared with, in this pull or an earlier one;
            None if the storage publishes none.
    """

    name: str
    size: int
    version: str | None
    status: Literal["copied", "resumed", "skipped"]
    digest: tuple[str, str] | None


@frozen
class PullReport:
    """Figures of one pull.

    Attributes:
        uri: Redacted URI of the copied files.
        directory: Directory of the copies.
        storage: Plugin that read it: ``{"plugin": distribution, "version": ...}``.
        files: Files that are in place now.
        bytes: Bytes of all of them.
        bytes_copied: Bytes read from the storage; bytes that were read again count each time.
        bytes_skipped: Bytes of files that were already in place.
        bytes_resumed: Bytes that an unfinished earlier pull had copied.
        left_out: Number of objects that were not copied, by reason: ``hidden``, ``weights``.
        seconds: Time from opening the storage to the last file in place.
        bytes_per_second: ``bytes_copied`` over ``seconds``.
        requests: Reads sent to the storage, without listings.
        retries: Reads sent again.
        concurrency: Most reads in flight at once.
        verified_digests: Number of files whose bytes were compared with a published digest in this pull, by algorithm.
        file_list: Each file, sorted by name.
        bytes_compared: As in ``LoadReport``.
        bytes_compared_by_server: As in ``LoadReport``.
        channel: As in ``LoadReport``.
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
    bytes_compared: int = 0
    bytes_compared_by_server: int = 0
    channel: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return attrs.asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.files} files from {self.uri} in {self.directory}: {format_bytes(self.bytes_copied)} copied, "
            f"{format_bytes(self.bytes_resumed)} resumed, {format_bytes(self.bytes_skipped)} skipped, "
            f"{self.seconds:.2f} s, {format_bytes(self.bytes_per_second)}/s, {self.retries} retries"
            f"{format_compared(self.bytes_compared, self.bytes_compared_by_server, before=', ')}"
        )


def format_compared(here: int, by_server: int, *, before: str = "") -> str:
    """What was compared with a chunk manifest, as text: ``"1.20 GB compared here, 3.00 MB by the server"``.

    Args:
        here: Bytes that the reader compared.
        by_server: Bytes that the server compared for it.
        before: Put before a text that is not empty.
    """
    parts = [f"{format_bytes(here)} compared here"] if here or by_server else []
    parts += [f"{format_bytes(by_server)} by the server"] if by_server else []
    return before * bool(parts) + ", ".join(parts)


def format_files(count: int) -> str:
    """``count`` files as text: ``"1 file"``."""
    return "1 file" if count == 1 else f"{count} files"


def format_bytes(count: float) -> str:
    """``count`` bytes as text, in powers of 1000: ``"1.23 GB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
