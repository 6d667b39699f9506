"""The names of models in the cache: which path of an ``mx`` URI means which URI of a storage.

``org/name`` is a model of the Hub, and ``SCHEME/rest`` is ``SCHEME://rest`` where a source of that scheme is allowed.
``hf/org/name`` is always the Hub's, also where the organisation is called as a scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from attrs import frozen

from modelexpress_core.copying.selection import reason_to_refuse
from modelexpress_core.errors import AccessDeniedError, InvalidURIError
from modelexpress_core.known_schemes import KNOWN_SCHEMES
from modelexpress_core.messages import printable
from modelexpress_core.uri import ModelURI

__all__ = ["HUB", "Place", "Sources", "place_of"]

#: The scheme of places without one, whose models have the Hub's own layout on disk.
HUB = "hf"

_MAX_CHARACTERS = 2048
_MAX_REVISION_CHARACTERS = 250

#: What names a file of a model, not a model.
_FILES = (".safetensors", ".json")


@frozen
class Place:
    """A model, and what of it was asked for.

    Attributes:
        name: The canonical name of the model: ``"hf/org/name"``, ``"s3/bucket/model"``.
        asked: The path that was asked for, in which the model is ``asked[: len(asked) - len(inside)]``.
        inside: What of the model was asked for; empty for all of it.
        uri: The model in its storage.
    """

    name: str
    asked: str
    inside: str
    uri: ModelURI

    @property
    def root(self) -> str:
        """The part of the path that was asked for which names the model."""
        return self.asked[: len(self.asked) - len(self.inside)].rstrip("/")

    @property
    def shown(self) -> str:
        """The name for people: without the scheme of the Hub."""
        return self.name.removeprefix(f"{HUB}/")


@frozen
class Sources:
    """What callers may have the server download.

    Attributes:
        patterns: Schemes, and beginnings of URIs.
    """

    patterns: Sequence[str]

    @property
    def schemes(self) -> frozenset[str]:
        """The schemes of all patterns."""
        return frozenset(pattern.partition("://")[0] for pattern in self.patterns)

    def allow(self, uri: ModelURI) -> bool:
        """Whether a pattern fits ``uri`` or a directory above it."""
        text = str(ModelURI(uri.scheme, uri.authority, uri.path))
        return any(
            uri.scheme == pattern or fnmatchcase(text, pattern) or fnmatchcase(text, f"{pattern.rstrip('/')}/*")
            for pattern in self.patterns
        )

    def place(self, path: str, revision: str = "") -> Place:
        """What ``path`` names.

        Raises:
            InvalidURIError: It names no model.
            AccessDeniedError: The source is not allowed.
        """
        asked = path.strip("/")
        parts = asked.split("/")
        wrong = any(part in {"", ".", ".."} for part in parts) or not asked.isprintable() or "\\" in asked
        if wrong or len(asked) > _MAX_CHARACTERS:
            message = f"{printable(asked[:200])!r} names no model"
            raise InvalidURIError(message, hint="write org/name, or SCHEME/BUCKET/PATH")
        if revision and (len(revision) > _MAX_REVISION_CHARACTERS or reason_to_refuse(revision)):
            message = f"{printable(revision[:200])!r} is no revision"
            raise InvalidURIError(message, hint="give a branch, a tag or a commit")
        scheme, rest = HUB, parts
        if len(parts) > 1 and parts[0] in {HUB, *self.schemes}:
            scheme, rest = parts[0], parts[1:]
        elif len(parts) > 2 and parts[0] in KNOWN_SCHEMES:
            raise self._refused(parts[0], "/".join(parts[1:]))
        model = rest[:2] if scheme == HUB else rest[:-1] if rest[-1].endswith(_FILES) else rest
        if not model or (scheme == HUB and len(model) < 2):
            message = f"{asked!r} names no model"
            raise InvalidURIError(message, hint="write org/name; old names without an organisation have one now")
        inside = "/".join(rest[len(model) :])
        query = {"revision": revision} if revision else {}
        uri = (
            ModelURI("file", path=f"/{'/'.join(model)}", query=query)
            if scheme == "file"
            else ModelURI(scheme, model[0], "/".join(model[1:]), query)
        )
        if not self.allow(uri):
            raise self._refused(scheme, "/".join(model))
        return Place(f"{scheme}/{'/'.join(model)}", asked, inside, uri)

    def _refused(self, scheme: str, rest: str) -> AccessDeniedError:
        return AccessDeniedError(
            f"the server does not download from {scheme}://{rest}",
            cause="its operator allows " + (", ".join(self.patterns) or "no source"),
            hint="have the operator add it to MX_CACHE_SOURCES",
        )


def place_of(uri: ModelURI) -> str:
    """The path by which a server is asked for ``uri``."""
    return f"{uri.scheme}/{'/'.join(filter(None, (uri.authority, uri.path.strip('/'))))}"
