"""What a model URI says: scheme, authority, path, query. Parsing only, no I/O."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from urllib.parse import parse_qsl, quote, unquote

from attrs import field, frozen

from modelexpress_core.errors import InvalidURIError

__all__ = ["SCHEME_PATTERN", "ModelURI"]

#: RFC 3986 section 3.1, lower case.
SCHEME_PATTERN = re.compile(r"[a-z][a-z0-9+.-]*")

_URI = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)"
    r"(?:\?(?P<query>[^#]*))?(?P<fragment>#.*)?"
)
_ONE_SLASH = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?!/)(?P<rest>.*)")

#: Shown as they are in a path: all but the percent sign, what ends a path, and control characters.
_PLAIN_IN_PATH = "/ :@!$&'()*+,;=~[]{}|^<>\"`\\"

#: Query values that are shown; all others may be credentials (SAS tokens, signatures) and are hidden.
_PUBLIC_QUERY = frozenset({"region", "revision", "version", "versionId"})


def _unmodifiable(query: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType(dict(query))


@frozen
class ModelURI:
    """Where a checkpoint, a directory or a single file is.

    Attributes:
        scheme: Lower-case scheme, which picks the plugin (``"s3"``).
        authority: Host, bucket or account, without user information (``"bucket"``).
        path: Path below the authority, percent-decoded. Without a leading slash where there is an
            authority (a key), absolute where there is none (a file).
        query: Decoded query parameters. Their meaning is the plugin's.
        userinfo: What stands before ``@`` in the authority; never shown.
    """

    scheme: str
    authority: str = ""
    path: str = ""
    query: Mapping[str, str] = field(factory=dict, converter=_unmodifiable, hash=False, repr=False)
    userinfo: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str | os.PathLike[str] | ModelURI) -> ModelURI:
        """The URI that ``text`` stands for; a plain path becomes a ``file`` URI.

        Percent-encoding is decoded in URIs and left alone in plain paths.
        ``~`` at the start of a plain path is the user's home.

        Raises:
            InvalidURIError: Empty, malformed, or a control character in it.
        """
        if isinstance(text, ModelURI):
            return text
        is_path = isinstance(text, os.PathLike)
        text = os.fspath(text)
        if not isinstance(text, str):
            message = f"a model URI is text, not {type(text).__name__}"
            raise InvalidURIError(message)
        if not text.strip():
            message = "the model URI is empty"
            raise InvalidURIError(message, hint="give a URI such as s3://bucket/model, or a path")
        if any(ord(c) < 32 or ord(c) == 127 for c in text):
            message = f"a control character in the model URI: {text!r}"
            raise InvalidURIError(message, hint="look for a stray newline in the variable or argument")
        match = None if is_path else _URI.fullmatch(text)
        if match is None:
            slip = None if is_path else _ONE_SLASH.match(text)
            if slip is not None and not os.path.exists(text):
                scheme, rest = slip["scheme"], slip["rest"].lstrip("/")
                start = f"{scheme}:///" if scheme.lower() == "file" else f"{scheme}://"
                message = f"one slash after the scheme: {text!r}"
                raise InvalidURIError(message, hint=f"write {start}{rest}")
            return cls("file", path=os.path.abspath(os.path.expanduser(text)))
        return cls._from_match(match)

    @classmethod
    def _from_match(cls, match: re.Match[str]) -> ModelURI:
        scheme = match["scheme"].lower()
        if match["fragment"]:
            message = f"a fragment in a {scheme} URI: {match['fragment']!r}"
            raise InvalidURIError(message, hint="if the # is part of the name, write it as %23")
        userinfo, _, authority = match["authority"].rpartition("@")
        path = unquote(match["path"])
        if scheme == "file":
            if authority not in {"", "localhost"}:
                message = f"a file URI with the host {authority!r}"
                raise InvalidURIError(
                    message,
                    cause="two slashes where three belong",
                    hint=f"write file:///{authority}{path}, or the plain path",
                )
            authority = ""
            path = os.path.normpath(path or "/")
        elif authority:
            path = path.strip("/")
        if any(ord(c) < 32 for c in path):
            message = f"an encoded control character in the path of the {scheme} URI"
            raise InvalidURIError(message)
        if scheme != "file" and any(part in {".", ".."} for part in path.split("/")):
            message = f"'.' or '..' in the path of a URI: {path!r}"
            raise InvalidURIError(message, hint="write the path out")
        query = dict(parse_qsl(match["query"] or "", keep_blank_values=True))
        return cls(scheme, unquote(authority), path, query, userinfo)

    @property
    def name(self) -> str:
        """The last part of the path, or the authority where the path is empty."""
        return self.path.rstrip("/").rpartition("/")[2] or self.authority

    def with_path(self, path: str) -> ModelURI:
        """The same place with another path."""
        return ModelURI(self.scheme, self.authority, path, self.query, self.userinfo)

    def join(self, relative: str) -> ModelURI:
        """The URI of ``relative`` below this one."""
        return self.with_path(f"{self.path.rstrip('/')}/{relative}" if self.path else relative)

    def __str__(self) -> str:
        """The URI with every possible credential hidden: safe in messages, logs and reports."""
        userinfo = "***@" if self.userinfo else ""
        slash = "/" if self.authority and self.path else ""
        path = quote(self.path, safe=_PLAIN_IN_PATH)
        query = "&".join(
            f"{quote(k)}={quote(v) if k in _PUBLIC_QUERY else '***'}" for k, v in self.query.items()
        )
        return f"{self.scheme}://{userinfo}{self.authority}{slash}{path}{'?' if query else ''}{query}"
