"""What crashes and downloads that ended early leave in the directory of the cache, and its removal."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet

from modelexpress_core.server.cache.layout import OWN
from modelexpress_core.server.cache.records import Record

__all__ = ["abandoned", "disk_bytes", "remove", "sweep"]

_log = logging.getLogger(__name__)

_BLOCK_BYTES = 512


def sweep(root: str, records: Iterable[Record]) -> None:
    """Remove what no version refers to, of the cache's own files. Downloads that ended early stay: they go on.

    Called before any download begins. The Hub's directories are left alone: other programs write to them too.
    """
    known = list(records)
    own = os.path.join(root, OWN)
    keys = {record.key for record in known}
    kept = {os.path.join(root, stored.blob) for record in known for stored in record.files}
    directories = {os.path.join(root, record.directory) for record in known}
    gone = [
        *_entries(os.path.join(own, "begun")),
        *(path for path in _entries(os.path.join(own, "manifests")) if os.path.basename(path) not in keys),
        *(path for path in _entries(os.path.join(own, "models")) if path not in directories),
        *(path for each in _entries(os.path.join(own, "files")) for path in _entries(each) if path not in kept),
        *(path for path in _entries(os.path.join(own, "records")) if path.endswith(".new")),
    ]
    for path in gone:
        remove(path)
    if gone:
        _log.info("removed %d leftovers of downloads that ended early from %s", len(gone), root)


def abandoned(root: str, active: AbstractSet[str]) -> Sequence[tuple[str, float]]:
    """The downloads that ended early: directory, and how many seconds ago it was written to; the oldest first.

    Args:
        root: The directory of the cache.
        active: Keys of the downloads under way.
    """
    now = time.time()
    ended = [path for path in _entries(os.path.join(root, OWN, "downloads")) if os.path.basename(path) not in active]
    written = {path: max((each.st_mtime for each in _facts(path)), default=now) for path in ended}
    return [(path, max(0.0, now - written[path])) for path in sorted(ended, key=lambda path: written[path])]


def disk_bytes(directory: str) -> int:
    """Bytes that the files below ``directory`` take on the disk, but those that have another name as well."""
    return sum(facts.st_blocks * _BLOCK_BYTES for facts in _facts(directory) if facts.st_nlink == 1)


def remove(path: str) -> None:
    """Remove a file, or a directory with all that is in it; what cannot be removed stays."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _entries(directory: str) -> Sequence[str]:
    try:
        return [os.path.join(directory, name) for name in os.listdir(directory)]
    except OSError:
        return []


def _facts(directory: str) -> Iterator[os.stat_result]:
    """What the system knows of each file below ``directory``."""
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                yield os.lstat(os.path.join(parent, name))
