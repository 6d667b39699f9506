"""Where the files of a version are in the directory of the cache.

The Hub's models have the Hub's own layout, so that its tools find what we wrote and we find what they wrote::

    models--ORG--NAME/blobs/ETAG                the bytes of a file
    models--ORG--NAME/refs/REVISION             the commit of a branch or tag
    models--ORG--NAME/snapshots/COMMIT/PATH     a link to the blob

All others have files by their content, and directories of links to them, below the cache's own directory::

    .mx/files/AB/ABCD...                        the bytes of a file
    .mx/models/KEY/PATH                         a link to them
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath

from attrs import frozen

from modelexpress_core.copying.local import fsync_directory
from modelexpress_core.server.cache.places import HUB
from modelexpress_core.server.cache.records import CachedFile

__all__ = ["OWN", "Layout", "layout_of"]

#: The cache's own directory.
OWN = ".mx"


@frozen
class Layout:
    """Where one version is. Paths are relative to the directory of the cache.

    Attributes:
        blobs: The directory of bytes.
        directory: The directory of names.
        refs: The directory of revisions; None if there is none.
        by_etag: Whether blobs are named by the versions of files, else by their contents.
    """

    blobs: str
    directory: str
    refs: str | None = None
    by_etag: bool = False

    def blob(self, file: CachedFile, content: str) -> str:
        """Where the bytes of a file are.

        Args:
            file: The file.
            content: A digest of its bytes, in hex.
        """
        if self.by_etag:
            return f"{self.blobs}/{_etag(file)}"
        return f"{self.blobs}/{content[:2]}/{content}"

    def known_blob(self, file: CachedFile) -> str | None:
        """Where the bytes of a file are that was not read yet; None if only its content tells."""
        return self.blob(file, "") if self.by_etag else None

    def publish(self, root: str, links: Mapping[str, str]) -> None:
        """Make the names of a version: all at once, or one by one where the directory exists already.

        Args:
            root: The directory of the cache.
            links: Path of each blob, by the name below ``directory``.
        """
        final = os.path.join(root, self.directory)
        if os.path.isdir(final):
            self._link(final, links)
            return
        begun = os.path.join(root, OWN, "begun", os.path.basename(self.directory))
        shutil.rmtree(begun, ignore_errors=True)
        os.makedirs(begun)
        self._link(begun, links)
        os.makedirs(os.path.dirname(final), exist_ok=True)
        try:
            os.rename(begun, final)
        except OSError:
            if not os.path.isdir(final):
                raise
            self._link(final, links)  # another program made it just now
            shutil.rmtree(begun, ignore_errors=True)
        fsync_directory(os.path.dirname(final))

    def _link(self, directory: str, links: Mapping[str, str]) -> None:
        made = {directory}
        for name, blob in links.items():
            path = os.path.join(directory, name)
            # The link is read from where it will be.
            parent = PurePosixPath(self.directory, name).parent
            target = os.path.relpath(blob, parent.as_posix())
            os.makedirs(os.path.dirname(path), exist_ok=True)
            made.add(os.path.dirname(path))
            with contextlib.suppress(OSError):
                if os.readlink(path) == target:
                    continue
            new = f"{path}.mx-new"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new)
            os.symlink(target, new)
            os.replace(new, path)
        for each in made:
            fsync_directory(each)

    def name_revision(self, root: str, revision: str, commit: str) -> None:
        """Note what a branch or tag points at, where the layout has a place for it."""
        if self.refs is None:
            return
        path = os.path.join(root, self.refs, revision)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        new = f"{path}.mx-new"
        with open(new, "w", encoding="ascii") as file:
            file.write(commit)
        os.replace(new, path)

    def linked_blobs(self, root: str) -> Iterator[str]:
        """The blobs that a link of this layout leads to, of whatever version and program, relative to ``root``."""
        if not self.by_etag:
            return
        snapshots = os.path.join(root, os.path.dirname(self.directory))
        for parent, _, names in os.walk(snapshots):
            for name in names:
                with contextlib.suppress(OSError):
                    target = os.path.join(parent, os.readlink(os.path.join(parent, name)))
                    yield os.path.relpath(os.path.normpath(target), root)

    def remove_names(self, root: str, names: Iterable[str]) -> None:
        """Remove the links of a version, and the directories that are empty then."""
        directory = os.path.join(root, self.directory)
        for name in names:
            path = os.path.join(directory, name)
            with contextlib.suppress(OSError):
                os.unlink(path)
            parent = os.path.dirname(path)
            while len(parent) >= len(directory):
                try:
                    os.rmdir(parent)
                except OSError:
                    break
                parent = os.path.dirname(parent)

    def tidy(self, root: str) -> None:
        """After names were removed: remove revisions that point at a version without names, and empty directories."""
        if self.refs is None or os.path.isdir(os.path.join(root, self.directory)):
            return
        commit = os.path.basename(self.directory)
        refs = os.path.join(root, self.refs)
        for parent, _, names in os.walk(refs, topdown=False):
            for name in names:
                path = os.path.join(parent, name)
                with contextlib.suppress(OSError):
                    if _beginning(path) == commit.encode():
                        os.unlink(path)
            with contextlib.suppress(OSError):
                os.rmdir(parent)
        base = os.path.dirname(refs)
        for empty in (os.path.join(root, self.blobs), os.path.join(base, "snapshots"), base):
            with contextlib.suppress(OSError):
                os.rmdir(empty)


def layout_of(place: str, version: str, key: str) -> Layout:
    """Where a version of the model at ``place`` is."""
    scheme, _, name = place.partition("/")
    if scheme == HUB:
        base = f"models--{name.replace('/', '--')}"
        return Layout(f"{base}/blobs", f"{base}/snapshots/{version}", f"{base}/refs", by_etag=True)
    return Layout(f"{OWN}/files", f"{OWN}/models/{key}")


def _etag(file: CachedFile) -> str:
    """The name of a blob as the Hub's tools have it: the SHA-256 of a large file, or git's id of a small one."""
    return (file.version or "").rpartition("/")[2]


def _beginning(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(100).strip()
