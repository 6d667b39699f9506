"""What huggingface_hub downloaded before: read in place of the Hub where no requests may be sent."""

from __future__ import annotations

import os

from modelexpress_core.uri import ModelURI
from mx_hf._repositories import Place, PlaceError
from mx_hf._requests import COMMIT
from mx_hf.settings import HfSettings

__all__ = ["copy_of", "downloaded"]

#: A reference holds a commit; a longer file is none.
_MAX_REFERENCE_BYTES = 100


def downloaded(uri: ModelURI, settings: HfSettings) -> ModelURI | None:
    """The ``file`` URI of the copy of what an ``hf`` URI names; None if there is none."""
    try:
        place = Place.of(uri.authority, uri.path, uri.query.get("revision"))
    except PlaceError:  # opening the storage says what is wrong with the URI
        return None
    copy = copy_of(place, settings.cache_directory)
    return None if copy is None else ModelURI("file", path=os.path.join(copy, place.inside).rstrip("/"))


def copy_of(place: Place, cache_directory: str) -> str | None:
    """The directory with the files of a revision, as huggingface_hub made it; None if there is none."""
    directory = os.path.join(cache_directory, f"models--{place.repository.replace('/', '--')}")
    commit = place.revision
    if not COMMIT.fullmatch(commit):
        try:
            with open(os.path.join(directory, "refs", commit), encoding="ascii") as file:
                commit = file.read(_MAX_REFERENCE_BYTES).strip()
        except (OSError, ValueError):
            return None
    copy = os.path.join(directory, "snapshots", commit)
    return copy if COMMIT.fullmatch(commit) and os.path.isdir(copy) else None
