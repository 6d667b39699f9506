"""What the path of an ``hf`` URI names: a repository, a revision of it, and a file or directory in that.

- ``hf://org/name``, with the branch ``main``
- ``hf://org/name/directory``, ``hf://org/name/file``
- ``hf://org/name?revision=REVISION``: a branch, a tag, a commit, or a reference such as ``refs/pr/1``
- ``hf://org/name@REVISION/directory``, as huggingface_hub writes it: a revision without a slash, or such a reference
"""

from __future__ import annotations

import re

from attrs import evolve, frozen

__all__ = ["DEFAULT_REVISION", "ORGANISATION", "RESERVED", "Place", "PlaceError"]

DEFAULT_REVISION = "main"

#: https://huggingface.co/docs/huggingface_hub: names of users, organisations and repositories have up to 96 characters.
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
ORGANISATION = re.compile(_NAME)
_REPOSITORY = re.compile(_NAME)

#: What the Hub's own URLs and those of huggingface_hub begin with for other things than models of an organisation.
RESERVED = frozenset({"buckets", "datasets", "kernels", "models", "spaces"})

#: Names of references in git have none of these characters; the length is bounded.
_REVISION = re.compile(r"[^\x00-\x20\x7f~^:?*\[\\]{1,255}")

#: References that huggingface_hub knows by their beginning, since they have slashes.
_REFERENCES = ("pr", "convert")


class PlaceError(ValueError):
    """The path names no repository. The text says why."""


@frozen
class Place:
    """What a path below an organisation names.

    Attributes:
        repository: ``"org/name"``.
        head: The part of the path that names repository and revision, as the user wrote it.
        revision: A branch, a tag, a commit or a reference.
        inside: Path in the repository; empty for the whole of it.
    """

    repository: str
    head: str
    revision: str
    inside: str

    @classmethod
    def of(cls, organisation: str, path: str, revision: str | None = None) -> Place:
        """What ``path`` names.

        Args:
            organisation: The authority of the URI.
            path: Below the authority.
            revision: Of the query; None if there is none.

        Raises:
            PlaceError: It names no repository, or two revisions.
        """
        head, _, inside = path.partition("/")
        name, at, written = head.partition("@")
        if at and written == "refs":
            kind, _, rest = inside.partition("/")
            number, _, inside = rest.partition("/")
            if kind not in _REFERENCES or not number:
                raise PlaceError("the revision after the @ is no reference such as refs/pr/1")
            written = f"refs/{kind}/{number}"
            head = f"{name}@{written}"
        if not name:
            raise PlaceError("it names no repository")
        if not _REPOSITORY.fullmatch(name) or ".." in name:
            raise PlaceError("no repository can have this name")
        if at and revision is not None and written != revision:
            raise PlaceError("it names two revisions, after the @ and as ?revision=")
        chosen = written if at else DEFAULT_REVISION if revision is None else revision
        if not _REVISION.fullmatch(chosen) or ".." in chosen or chosen.startswith(("/", "-")) or chosen.endswith("/"):
            raise PlaceError("no revision can have this name")
        return cls(f"{organisation}/{name}", head, chosen, inside)

    @property
    def folder(self) -> str:
        """The directory in the repository that holds the object; empty for the root."""
        return self.inside.rpartition("/")[0]

    def path_of(self, inside: str) -> str:
        """The path below the organisation of a file of the repository."""
        return f"{self.head}/{inside}"

    def at(self, inside: str) -> Place:
        """Another place in the same revision."""
        return evolve(self, inside=inside)
