"""Comparing the files of a version with their digests, and describing files that nobody has digests of."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable, Sequence

from attrs import frozen

from modelexpress_core.checkpoint.manifest import ManifestFile, chunk_digest
from modelexpress_core.copying.local import digest_of, local_errors
from modelexpress_core.copying.selection import WEIGHT_SUFFIXES, reason_to_refuse
from modelexpress_core.errors import CheckpointError, IntegrityError, ModelExpressError, SourceChangedError
from modelexpress_core.fetch.digests import best_digest
from modelexpress_core.server.cache.chunk_tables import chunks_of, pieces
from modelexpress_core.server.cache.places import HUB, Place
from modelexpress_core.server.cache.records import COMMIT_DIGITS, CachedFile, is_commit
from modelexpress_core.server.cache.snapshots import Snapshot

__all__ = ["Damage", "described", "validate"]

_TABLE = "blake3"
_ROW_BYTES = 32

#: The Hub keeps files of at least so many bytes by their SHA-256, and smaller ones by the id that git gives them.
_LARGE_BYTES = 10_000_000

#: What the Hub calls the content of a file: git's id, or the SHA-256 of a large one.
_ID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

_MAX_NOTE_CHARACTERS = 1000


@frozen
class Damage:
    """A file that is not what was downloaded.

    Attributes:
        path: Its path below the model.
        reason: What is wrong: a clause whose subject is the file.
    """

    path: str
    reason: str


def validate(snapshot: Snapshot, on_progress: Callable[[int], None]) -> Sequence[Damage]:
    """The damaged files of a complete version. ``on_progress`` gets the bytes that were compared so far."""
    manifest, tables = snapshot.manifest()
    damaged: list[Damage] = []
    compared = 0
    with local_errors(tables[_TABLE], "read"), open(tables[_TABLE], "rb") as table:
        if digest_of(table.fileno(), "sha256", threading.Event()) != manifest.tables[_TABLE]:
            message = f"the chunk manifest of {snapshot.place} at {snapshot.version[:12]} is damaged"
            raise CheckpointError(message, hint="remove this version from the cache: it is downloaded again")
        for entry in manifest.files:
            table.seek(entry.first * _ROW_BYTES)
            rows = table.read(entry.chunks * _ROW_BYTES)

            def progress(nbytes: int, before: int = compared) -> None:
                on_progress(before + nbytes)

            reason = _damage(snapshot, entry, rows, progress)
            if reason:
                damaged.append(Damage(entry.path, reason))
            compared += entry.size
            on_progress(compared)
    return damaged


def _damage(snapshot: Snapshot, entry: ManifestFile, rows: bytes, on_progress: Callable[[int], None]) -> str:
    """What is wrong with a file; empty if nothing is."""
    try:
        with snapshot.open(entry.path) as reader, local_errors(entry.path, "read"):
            chunks, header_bytes = chunks_of(reader.descriptor, entry.path, reader.size)
            if (chunks.count, header_bytes) != (entry.chunks, entry.header_bytes):
                return "has another header than the chunk manifest says"
            for offset, content in pieces(reader.descriptor, chunks):
                for number in chunks.within(offset, offset + len(content)):
                    start, end = chunks.bounds(number)
                    row = chunk_digest(_TABLE, content[start - offset : end - offset])
                    if row != rows[number * _ROW_BYTES : (number + 1) * _ROW_BYTES]:
                        return f"has other bytes in {start}-{end - 1}"
                on_progress(offset + len(content))
            published = best_digest(snapshot.files[entry.path].digests)
            if published is not None:
                actual = digest_of(reader.descriptor, published[0], threading.Event())
                if actual != published[1]:
                    return f"has the {published[0]} {actual}, and its storage publishes {published[1]}"
    except SourceChangedError as exc:
        return exc.message.partition("' ")[2] or exc.message
    return ""


def described(directory: str, place: Place, revision: str | None) -> tuple[Sequence[CachedFile], str]:
    """The files of a directory as the storage of ``place`` would describe them, and their version.

    Raises:
        IntegrityError: A file is not the one that the Hub published, as far as huggingface_hub noted that.
        ModelExpressError: It cannot be read, or it is unknown which commit of the Hub it has.
    """
    paths = _paths(directory)
    if not paths:
        message = f"there is no file to import below {directory}"
        raise ModelExpressError(message, hint="give the directory with the files of the model")
    digests = {path: _sha256(os.path.join(directory, path)) for path in paths}
    sizes = {path: os.path.getsize(os.path.join(directory, path)) for path in paths}
    if not place.name.startswith(f"{HUB}/"):
        text = "\0".join(f"{path}\0{sizes[path]}\0{digests[path]}" for path in paths)
        version = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return [CachedFile(path, sizes[path], digests[path], {"sha256": digests[path]}) for path in paths], version
    noted = {path: _noted_by_the_library(directory, path) for path in paths}
    commits = {commit for commit, _ in noted.values() if commit}
    commit = revision or (commits.pop() if len(commits) == 1 else os.path.basename(directory))
    if not is_commit(commit):
        raise ModelExpressError(
            f"it is unknown which commit of {place.shown} is in {directory}",
            cause="huggingface_hub noted none there, the name of the directory is none, and --revision gives none",
            hint="give the commit with --revision, 40 digits as the page of the repository shows it",
        )
    files = []
    for path in paths:
        etag = noted[path][1]
        actual = digests[path]
        if len(etag) == COMMIT_DIGITS or (not etag and not _is_large(path, sizes[path])):
            actual = _git_id(os.path.join(directory, path))
        if etag not in {"", actual}:
            raise IntegrityError(
                f"{path!r} in {directory} has the digest {actual}, and the Hub published {etag}",
                cause="it was changed or damaged since it was downloaded",
                hint="download it again, then import the directory",
            )
        files.append(CachedFile(path, sizes[path], f"{commit}/{actual}", {"sha256": digests[path]}))
    return files, commit


def _noted_by_the_library(directory: str, path: str) -> tuple[str, str]:
    """Commit and id of a file as huggingface_hub noted them, each empty if it did not.

    In its cache, a file is a link to a blob with that id as its name. Beside files of a local directory it has notes.
    """
    with contextlib.suppress(OSError):
        target = os.readlink(os.path.join(directory, path))
        if os.path.basename(os.path.dirname(target)) == "blobs" and _ID.fullmatch(os.path.basename(target)):
            return "", os.path.basename(target)
    note = os.path.join(directory, ".cache", "huggingface", "download", f"{path}.metadata")
    with contextlib.suppress(OSError, ValueError), open(note, encoding="ascii") as file:
        commit, _, rest = file.read(_MAX_NOTE_CHARACTERS).partition("\n")
        etag = rest.partition("\n")[0]
        if is_commit(commit) and _ID.fullmatch(etag):
            return commit, etag
    return "", ""


def _paths(directory: str) -> Sequence[str]:
    """The files below a directory but hidden ones, in order."""
    found = []
    with local_errors(directory, "read the directory"):
        for parent, below, names in os.walk(directory, onerror=_raise):
            below[:] = [name for name in below if not name.startswith(".")]
            for name in names:
                path = os.path.relpath(os.path.join(parent, name), directory)
                if not name.startswith(".") and not reason_to_refuse(path):
                    found.append(path)
    return sorted(found)


def _raise(exc: OSError) -> None:
    raise exc


def _sha256(path: str) -> str:
    with local_errors(path, "read"), open(path, "rb") as file:
        return digest_of(file.fileno(), "sha256", threading.Event())


def _is_large(path: str, size: int) -> bool:
    return size >= _LARGE_BYTES or path.lower().endswith(WEIGHT_SUFFIXES)


def _git_id(path: str) -> str:
    with local_errors(path, "read"), open(path, "rb") as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
