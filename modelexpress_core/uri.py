"""The parts of a model URI: scheme, authority, path, query. Parses only, without I/O."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from attrs import field, frozen

from modelexpress_core.errors import InvalidURIError
from modelexpress_core.immutable import unmodifiable
from modelexpress_core.messages import PUBLIC_QUERY, without_credentials

__all__ = ["SCHEME_PATTERN", "ModelURI", "host_and_port", "redacted", "worker_endpoint"]

#: RFC 3986 section 3.1, lower case.
SCHEME_PATTERN = re.compile(r"[a-z][a-z0-9+.-]*")

_URI = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)"
    r"(?:\?(?P<query>[^#]*))?(?P<fragment>#.*)?"
)
_ONE_SLASH = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?:/(?!/)|(?=[^/]+/))(?P<rest>.*)")

#: Shown as they are in a path: all but the percent sign, the characters that end a path, and control characters.
_PLAIN_IN_PATH = "/ :@!$&'()*+,;=~[]{}|^<>\"`\\"

#: The same for an authority, where an at sign, a slash or a question mark would end it.
_PLAIN_IN_AUTHORITY = "!$&'()*+,;=~[]:"


def _is_unsafe(text: str) -> bool:
    """Whether ``text`` has characters that could forge a line of a log."""
    return any(ord(c) < 32 or ord(c) == 127 for c in text)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


@frozen
class ModelURI:
    """The address of a checkpoint, a directory or a file.

    Attributes:
        scheme: Lower-case scheme, which selects the plugin (``"s3"``).
        authority: Host, bucket or account, without user information (``"bucket"``).
        path: Path below the authority, percent-decoded. With an authority it has no leading slash (a key); without
            one it is absolute (a file).
        query: Decoded query parameters. The plugin defines their meaning.
        userinfo: The part before ``@`` in the authority; never shown.
    """

    scheme: str
    authority: str = ""
    path: str = ""
    query: Mapping[str, str] = field(factory=dict, converter=unmodifiable, hash=False, repr=False)
    userinfo: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str | os.PathLike[str] | ModelURI) -> ModelURI:
        """The URI in ``text``. A plain path becomes a ``file`` URI.

        Percent-encoding is decoded in URIs, but not in plain paths.
        ``~`` at the start of a plain path is the user's home.

        Raises:
            InvalidURIError: ``text`` is no text, empty or malformed, or has a control character.
        """
        if isinstance(text, ModelURI):
            return text
        is_path = isinstance(text, os.PathLike)
        if is_path:
            text = os.fspath(text)
        if not isinstance(text, str):
            message = f"a model URI is text or a path, not {type(text).__name__}"
            raise InvalidURIError(message, hint="give a URI such as s3://bucket/model, or a path")
        if not text.strip():
            message = "the model URI is empty"
            raise InvalidURIError(message, hint="give a URI such as s3://bucket/model, or a path")
        if _is_unsafe(text):
            message = f"the model URI has a control character: {without_credentials(text)!r}"
            raise InvalidURIError(message, hint="look for a stray newline in the variable or argument")
        try:
            os.fsencode(text)
        except UnicodeEncodeError:
            message = f"the model URI cannot be encoded: {without_credentials(text)!r}"
            hint = "look for a truncated character in the variable or argument"
            raise InvalidURIError(message, hint=hint) from None  # the cause contains the whole text
        match = None if is_path else _URI.fullmatch(text)
        if match is not None:
            return cls._from_match(match)
        if not os.path.exists(text):
            _refuse_slips(text)
        return cls("file", path=os.path.abspath(os.path.expanduser(text)))

    @classmethod
    def _from_match(cls, match: re.Match[str]) -> ModelURI:
        scheme = match["scheme"].lower()
        if match["fragment"]:
            message = f"the {scheme} URI has a fragment (the part after #)"
            raise InvalidURIError(message, hint="if the # is part of the name, write it as %23")
        userinfo, _, authority = match["authority"].rpartition("@")
        authority = unquote(authority, errors="surrogateescape")
        path = unquote(match["path"], errors="surrogateescape")
        if scheme == "file":
            if authority not in {"", "localhost"}:
                message = f"the file URI has the host {authority!r}"
                raise InvalidURIError(
                    message,
                    cause="it has two slashes in place of three",
                    hint=f"write file:///{authority}{path}, or the plain path",
                )
            authority = ""
            path = os.path.normpath(path or "/")
        elif authority:
            path = path.strip("/")
        if _is_unsafe(authority + path):
            message = f"the {scheme} URI has an encoded control character"
            raise InvalidURIError(message, hint="look for %0A, %0D or %00")
        # Names of files may have any bytes.
        if not _is_unicode(authority + (match["query"] or "") + ("" if scheme == "file" else path)):
            message = f"the {scheme} URI is not UTF-8"
            raise InvalidURIError(message, hint="percent-encode names as UTF-8")
        if scheme != "file" and any(part in {".", ".."} for part in path.split("/")):
            message = f"the path of the URI has '.' or '..': {path!r}"
            raise InvalidURIError(message, hint="write the path without them")
        query = dict(parse_qsl(match["query"] or "", keep_blank_values=True))
        return cls(scheme, authority, path, query, userinfo)

    @property
    def name(self) -> str:
        """The last part of the path, or the authority if the path is empty."""
        return self.path.rstrip("/").rpartition("/")[2] or self.authority

    def with_path(self, path: str) -> ModelURI:
        """The same URI with another path."""
        return ModelURI(self.scheme, self.authority, path, self.query, self.userinfo)

    def join(self, relative: str) -> ModelURI:
        """The URI of ``relative`` below this one."""
        start = f"{self.path.rstrip('/')}/" if self.path or not self.authority else ""
        return self.with_path(f"{start}{relative}")

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only mapping cannot be pickled or copied as it is.
        return ModelURI, (self.scheme, self.authority, self.path, dict(self.query), self.userinfo)

    def __str__(self) -> str:
        """The URI with every possible credential hidden: safe in messages, logs and reports."""
        userinfo = "***@" if self.userinfo else ""
        authority = quote(self.authority, safe=_PLAIN_IN_AUTHORITY)
        slash = "/" if self.path and (authority or not self.path.startswith("/")) else ""
        path = quote(self.path, safe=_PLAIN_IN_PATH, errors="surrogateescape")
        query = "&".join(f"{quote(k)}={quote(v) if k in PUBLIC_QUERY else '***'}" for k, v in self.query.items())
        return f"{self.scheme}://{userinfo}{authority}{slash}{path}{'?' if query else ''}{query}"


def redacted(text: str) -> str:
    """``text`` as a URI with every possible credential hidden.

    ``"***"`` if it is no URI, or if it has an at sign and no authority: for example a URI without its slashes, which
    would be parsed as a path.
    """
    try:
        uri = ModelURI.parse(text)
    except InvalidURIError:
        return "***"
    is_path = text.startswith(("/", "./", "../", "~/")) and not text.startswith("//") and ":" not in text
    return "***" if "@" in text and not uri.authority and not is_path else str(uri)


def host_and_port(host: str, port: int) -> str:
    """``host:port``, with brackets if the host has colons and no brackets yet."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _refuse_slips(text: str) -> None:
    """Raise for a misspelt URI that would be parsed as the path of a missing file."""
    slip = _ONE_SLASH.match(text)
    if slip is not None:
        scheme, rest = slip["scheme"], slip["rest"]
        start = f"{scheme}:///" if scheme.lower() == "file" else f"{scheme}://"
        message = f"the URI has fewer than two slashes after its scheme: {without_credentials(text)!r}"
        raise InvalidURIError(message, hint=f"write {start}{without_credentials(rest)}")
    if "://" in text:
        message = f"the text is neither a URI nor a file: {without_credentials(text)!r}"
        cause = "a URI starts with its scheme: a letter, then letters, digits, + . -"
        raise InvalidURIError(message, cause=cause, hint="look for quotes, spaces or a misspelt scheme before ://")


def worker_endpoint(uri: ModelURI) -> str:
    """Address of the worker that ``<transport>://<host>:<port>/...`` names: with ``?tls=1``, one that speaks TLS."""
    scheme = "https" if uri.query.get("tls") == "1" else "http"
    return f"{scheme}://{uri.authority}"
