"""Requests to the Hub: its API for revisions and trees, and the URLs from which the bytes of files are read.

The API is described at https://huggingface.co/docs/hub/api. For the bytes, ``GET /org/name/resolve/<commit>/<file>``
redirects to a signed URL of a CDN (or of the bridge to Xet), or within the Hub. That URL is found once for each file,
and used for its ranges until it is refused. A token goes to the Hub alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urljoin, urlsplit

from attrs import define, field, frozen

from modelexpress_core.errors import SourceChangedError, UnavailableError, UnsupportedError
from modelexpress_core.storage.http import (
    ConnectionPool,
    ListingPage,
    Meaning,
    Origin,
    Refusal,
    Request,
    VersionHeaders,
    WholeAnswer,
    exchange,
)
from mx_hf._errors import ENTRY_NOT_FOUND, NAMES, HfFailures, RedirectError, error_code
from mx_hf._repositories import Place
from mx_hf._tokens import Identity

__all__ = ["COMMIT", "VERSIONS", "HubRequests", "Version"]

_log = logging.getLogger(__name__)

#: The version is no header of the Hub's: it tells ``HubRequests`` which commit to read, and which content to expect.
VERSIONS = VersionHeaders(condition="X-Version", answered=None)

#: A commit, and the ETag of a file: a SHA-1, or a SHA-256.
COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

_REDIRECTS = frozenset({301, 302, 303, 307, 308})

#: A renamed repository is one redirect, the Hub's cache of small files another.
_MAX_REDIRECTS = 5

#: Signed URLs have one or two KiB.
_MAX_LOCATION_CHARACTERS = 16 << 10

#: A page has at most a thousand entries, with paths of some KiB at most.
_MAX_CONTENT_BYTES = 8 << 20

#: With these statuses a CDN refuses a signature that ran out, or content that was moved.
_EXPIRED = frozenset({400, 401, 403, 404, 410})

#: Firewalls of web servers refuse requests without it.
_USER_AGENT = (("User-Agent", f"mx-hf/{importlib.metadata.version('mx-hf')}"),)

_NEXT_PAGE = re.compile(r'<([^<>]{1,16384})>\s*;\s*rel="?next"?')

_NOT_JSON = Meaning(
    UnavailableError,
    "something in front of the Hub answers, or the answer was cut",
    "check HF_ENDPOINT and HTTPS_PROXY",
)
_NO_COMMIT = Meaning(
    UnsupportedError,
    "the server, or a proxy before it, does not speak the API of the Hub; bytes of two versions could be mixed",
    f"{NAMES.check_server}, or use another server",
)
_CHANGED = Meaning(
    SourceChangedError,
    "a mirror serves another version than it lists, or something replaced the file",
    f"start the load again; if it stays, {NAMES.check_server}",
)


@frozen
class Version:
    """The version of a file: it is the same for every reader on every machine.

    Attributes:
        commit: Of the repository.
        etag: SHA-256 of a file in LFS, or id of its blob in git; empty if any is expected.
    """

    commit: str
    etag: str = ""

    def __str__(self) -> str:
        return f"{self.commit}/{self.etag}"

    @classmethod
    def parse(cls, text: str) -> Version:
        """The version that ``str`` wrote."""
        commit, _, etag = text.partition("/")
        return cls(commit, etag)


@define
class _Location:
    """Where the bytes of one file in one version are, once that is known.

    Attributes:
        lock: Held while it is looked for.
        request: A GET without its range; None while the URL is unknown.
    """

    lock: threading.Lock = field(factory=threading.Lock)
    request: Request | None = None


class HubRequests:
    """Prepares the downloads of files (a ``Signer``), and asks the API. Thread-safe.

    Args:
        endpoint: URL of the Hub.
        organisation: The authority of the URI.
        identity: The token.
        pool: The connections.
        failures: Explains what goes wrong.
        read_timeout_seconds: How long requests other than downloads wait for the next bytes.
    """

    def __init__(
        self,
        endpoint: str,
        organisation: str,
        *,
        identity: Identity,
        pool: ConnectionPool,
        failures: HfFailures,
        read_timeout_seconds: float,
    ) -> None:
        self._endpoint = endpoint
        self._origin = Origin.of_url(endpoint)
        self._organisation = organisation
        self._identity = identity
        self._pool = pool
        self._failures = failures
        self._read_timeout_seconds = read_timeout_seconds
        self._lock = threading.Lock()
        self._locations: dict[tuple[str, str], _Location] = {}
        self._of_thread = threading.local()

    @property
    def latest(self) -> Origin:
        """The server of the latest request of this thread: the Hub, or a server that it named."""
        origin: Origin = getattr(self._of_thread, "origin", self._origin)
        return origin

    # -- the downloads of ranges --------------------------------------------------------------------------------------

    def request(self, path: str, headers: Mapping[str, str]) -> Request:
        """A download of the file ``path``, from the URL that the Hub names; found once for each file."""
        location = self._location(path, headers)
        with location.lock:
            if location.request is None:
                location.request = self._located(path, Version.parse(headers[VERSIONS.condition]))
            request = location.request
        return self._ranged(request, headers)

    def renewed(self, path: str, headers: Mapping[str, str], refusals: Sequence[Refusal]) -> Request | None:
        """The same from another URL: after a redirect, or where a signed URL has run out, or a token."""
        last = refusals[-1]
        location = self._location(path, headers)
        if last.status in _REDIRECTS:
            target = self._target(_url_of(last.request), last.headers)
            request = self._prepared("GET", target)
            with location.lock:
                location.request = request
            return self._ranged(request, headers)
        if last.status not in _EXPIRED or any(each.status in _EXPIRED for each in refusals[:-1]):
            return None
        if last.request.origin == self._origin and not self._may_renew(last):
            return None
        with location.lock:
            known = location.request
            if known is not None and (known.origin, known.target) == (last.request.origin, last.request.target):
                location.request = None
        return self.request(path, headers)

    def _may_renew(self, refusal: Refusal) -> bool:
        """Whether another request to the Hub can help: signed URLs of the Hub itself run out, and tokens do."""
        signed = "?" in refusal.request.target
        return signed or (refusal.status == 401 and self._identity.renew(_authorization(refusal.request)))

    def _location(self, path: str, headers: Mapping[str, str]) -> _Location:
        with self._lock:
            return self._locations.setdefault((path, headers[VERSIONS.condition]), _Location())

    def _located(self, path: str, version: Version) -> Request:
        """Ask the Hub where the file is, and whether it is the one that is expected there."""
        operation = "find the content"
        place = Place.of(self._organisation, path)
        url = f"{self._endpoint}/{place.repository}/resolve/{version.commit}/{quote(place.inside)}"
        request, answer, passed = self._followed("HEAD", url)
        if answer.status != 200 and answer.status not in _REDIRECTS:
            raise self._failures.of_answer(answer.as_refusal(request), path, operation)
        # The Hub's own redirect has them; where a mirror serves the bytes itself, the last answer may have others.
        heads = [*passed, answer.headers]
        etag = (_first("x-linked-etag", heads) or answer.headers.get("etag", "")).removeprefix("W/").strip('"')
        commit = _first("x-repo-commit", heads) or version.commit
        if not etag:
            reason = "the server does not tell the version of the file: its answer has no ETag"
            raise self._failures.described(_NO_COMMIT, reason, path, operation)
        if commit != version.commit or (version.etag and etag != version.etag):
            reason = f"the server has another version of it: {etag[:80]} in the commit {commit[:80]}"
            raise self._failures.described(_CHANGED, reason, path, operation)
        if answer.status in _REDIRECTS:
            return self._prepared("GET", self._target(_url_of(request), answer.headers))
        return Request("GET", request.origin, request.target, request.headers)

    def _ranged(self, request: Request, headers: Mapping[str, str]) -> Request:
        self._of_thread.origin = request.origin
        return request.with_headers({"Range": headers["Range"]})

    # -- the API ------------------------------------------------------------------------------------------------------

    def commit(self, place: Place, path: str, operation: str) -> str:
        """The commit that the revision of ``place`` is now.

        Args:
            place: The repository and its revision.
            path: The object in question, for errors.
            operation: For errors.
        """
        revision = quote(place.revision, safe="")
        url = f"{self._endpoint}/api/models/{place.repository}/revision/{revision}?expand=sha"
        request, answer, _ = self._followed("GET", url)
        described = self._content(request, answer, path, operation)
        commit = described.get("sha") if isinstance(described, dict) else None
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise self._failures.described(_NO_COMMIT, "the server gave no commit of the revision", path, operation)
        name = described.get("id")
        if isinstance(name, str) and name != place.repository and _url_of(request) != url:
            _log.warning("hf://%s has another name now: hf://%s", place.repository, name[:200])
        return commit

    def is_restricted(self, place: Place, path: str, operation: str) -> bool:
        """Whether the repository of ``place`` is private or gated, or the server does not say that it is neither.

        Args:
            place: The repository.
            path: The object in question, for errors.
            operation: For errors.
        """
        revision = quote(place.revision, safe="")
        url = f"{self._endpoint}/api/models/{place.repository}/revision/{revision}?expand=gated&expand=private"
        request, answer, _ = self._followed("GET", url)
        described = self._content(request, answer, path, operation)
        is_open = isinstance(described, dict) and described.get("gated") is False and described.get("private") is False
        return not is_open

    def tree(
        self, place: Place, commit: str, cursor: str | None, *, recursive: bool, path: str, operation: str
    ) -> ListingPage[Any]:
        """A page of the tree of a directory; an empty one where the commit has no such directory.

        Args:
            place: The directory.
            commit: Of the repository.
            cursor: Of the page; None for the first.
            recursive: Whether directories below it are listed, too.
            path: The object in question, for errors.
            operation: For errors.
        """
        folder = f"/{quote(place.inside)}" if place.inside else ""
        query = {
            "recursive": str(recursive).lower(),
            "expand": "false",
            **({} if cursor is None else {"cursor": cursor}),
        }
        url = f"{self._endpoint}/api/models/{place.repository}/tree/{commit}{folder}?{urlencode(query)}"
        request, answer, _ = self._followed("GET", url)
        if answer.status == 404 and error_code(answer.headers) == ENTRY_NOT_FOUND:
            return ListingPage((), None)
        entries = self._content(request, answer, path, operation)
        if not isinstance(entries, list):
            raise self._failures.described(_NO_COMMIT, "the server gave no entries of the tree", path, operation)
        return ListingPage(entries, self._following(answer.headers, path, operation))

    def _following(self, headers: Mapping[str, str], path: str, operation: str) -> str | None:
        """The cursor of the next page. Nothing else of its URL counts: requests with the token go to the endpoint."""
        match = _NEXT_PAGE.search(headers.get("link", ""))
        if match is None:
            return None
        try:
            cursors = parse_qs(urlsplit(match[1]).query).get("cursor", [])
        except ValueError:
            cursors = []
        if len(cursors) != 1:
            reason = "the listing does not tell where its next page begins"
            raise self._failures.described(_NO_COMMIT, reason, path, operation)
        return cursors[0]

    def _content(self, request: Request, answer: WholeAnswer, path: str, operation: str) -> Any:  # noqa: ANN401 - JSON
        if answer.status != 200:
            if answer.status in _REDIRECTS:
                target = Origin.of_url(self._target(_url_of(request), answer.headers))
                raise RedirectError(f"the API redirects to another server, {target}")
            raise self._failures.of_answer(answer.as_refusal(request), path, operation)
        try:
            return json.loads(answer.content)
        except (ValueError, RecursionError):
            raise self._failures.described(
                _NOT_JSON, "the answer is not of the API of the Hub", path, operation
            ) from None

    # -- redirects ----------------------------------------------------------------------------------------------------

    def _followed(self, method: str, url: str) -> tuple[Request, WholeAnswer, Sequence[Mapping[str, str]]]:
        """The first answer that is no redirect within the Hub: its request, itself, the headers of those before it.

        Raises:
            RedirectError: There are too many, or one that must not be followed.
            TokenError: There is a token that cannot be used.
            OSError: As for ``exchange``.
        """
        refused = False
        passed: list[Mapping[str, str]] = []
        for _ in range(_MAX_REDIRECTS + 2):  # besides the redirects: the answer, and once a token that was refused
            request = self._prepared(method, url)
            self._of_thread.origin = request.origin
            answer = exchange(
                self._pool, request, read_timeout_seconds=self._read_timeout_seconds, max_bytes=_MAX_CONTENT_BYTES
            )
            if answer.status == 401 and not refused and self._identity.renew(_authorization(request)):
                refused = True
                continue
            if answer.status not in _REDIRECTS:
                return request, answer, passed
            target = self._target(url, answer.headers)
            if Origin.of_url(target) != self._origin:
                return request, answer, passed
            passed.append(answer.headers)
            url = target
        raise RedirectError(f"more than {_MAX_REDIRECTS} redirects follow each other")

    def _prepared(self, method: str, url: str) -> Request:
        """A request to ``url``, with the token if that is the Hub's."""
        try:
            origin = Origin.of_url(url)
            headers = self._identity.headers() if origin == self._origin else ()
            return Request.to_url(method, url, (*headers, *_USER_AGENT))
        except ValueError:
            raise RedirectError("a redirect leads to what is no URL") from None

    def _target(self, url: str, headers: Mapping[str, str]) -> str:
        """The URL to which an answer redirects: on a server that keeps what is sent private.

        Raises:
            RedirectError: There is none, or it leads from TLS to plain text, or to a server of this machine.
        """
        location = headers.get("location", "")
        if not location or len(location) > _MAX_LOCATION_CHARACTERS:
            raise RedirectError("a redirect names no URL, or a very long one")
        try:
            target = urljoin(url, location)
            origin = Origin.of_url(target)
        except ValueError:
            raise RedirectError("a redirect leads to what is no URL") from None
        local = self._origin.is_loopback and not self._origin.tls and origin.is_loopback
        if origin != self._origin and not origin.tls and not local:
            raise RedirectError(f"a redirect leads to a server without TLS, {origin}")
        return target


def _first(name: str, heads: Iterable[Mapping[str, str]]) -> str:
    """The value of a header in the first head that has it; empty if none has."""
    return next((head[name] for head in heads if name in head), "")


def _url_of(request: Request) -> str:
    return f"{request.origin}{request.target}"


def _authorization(request: Request) -> str:
    return dict(request.headers).get("Authorization", "")
