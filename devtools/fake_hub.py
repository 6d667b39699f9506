"""A stand-in for the Hugging Face Hub on this machine, with its CDN; the library huggingface_hub works with it too.

It has the requests that listing and downloading need: revisions, trees in pages, redirects to signed URLs, tokens,
repositories that are private, gated, disabled or renamed. Each change of a file is a commit.

with FakeHub() as hub:
    uri = hub.upload("checkpoint/", "org/tiny")
    os.environ.update(hub.environ())
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from attrs import define, field, frozen

__all__ = ["FakeHub", "HubAnswer", "HubRequest", "Repository"]

#: Status, headers and content.
HubAnswer = tuple[int, Mapping[str, str], bytes]

#: Files of at least this size, and all safetensors files, are in LFS.
_LFS_BYTES = 1000

_SIGNED_SECONDS = 3600.0
_RANGE = re.compile(r"bytes=([0-9]+)-([0-9]*)")


@frozen
class HubRequest:
    """What a client sent.

    Attributes:
        server: ``"hub"`` or ``"cdn"``.
        method: ``GET``, ``HEAD`` or ``POST``.
        path: Percent-encoded, without the query.
        query: The parameters, the last of each name.
        headers: By name, in any case.
        body: All of it.
    """

    server: str
    method: str
    path: str
    query: Mapping[str, str]
    headers: Message
    body: bytes

    @property
    def token(self) -> str:
        """The token that it has; empty for none."""
        return str(self.headers.get("Authorization", "")).removeprefix("Bearer ")


@frozen
class _File:
    content: bytes = field(repr=False)
    lfs: bool

    @property
    def oid(self) -> str:
        """Id of the blob in git: of the content, or of the pointer to it."""
        content = self._pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 - as git does

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def _pointer(self) -> bytes:
        oid = hashlib.sha256(self.content).hexdigest()
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(self.content)}\n"
        return text.encode()

    def entry(self, path: str) -> dict[str, Any]:
        """As a tree lists it."""
        entry: dict[str, Any] = {"type": "file", "oid": self.oid, "size": len(self.content), "path": path}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self._pointer)}
        return entry


@define
class Repository:
    """One repository.

    Attributes:
        private: Only tokens that may read it see it.
        gated: Everybody sees its names; only tokens that may read it get files.
        disabled: Nobody gets anything.
        readers: The tokens that may read it, where that matters.
        branches: Branch or tag -> commit.
        commits: Commit -> its files by path.
    """

    private: bool = False
    gated: bool = False
    disabled: bool = False
    readers: set[str] = field(factory=set)
    branches: dict[str, str] = field(factory=dict)
    commits: dict[str, dict[str, _File]] = field(factory=dict)

    def refusal(self, name: str, token: str, *, files: bool) -> HubAnswer | None:
        """What the Hub answers to a request that it does not allow.

        Args:
            name: Of the repository.
            token: Of the request; empty for none.
            files: Whether the request is for the content of a file.
        """
        allowed = token in self.readers
        if not self.commits or (self.private and not allowed):
            return _refused(404 if token else 401, "RepoNotFound", "Repository not found")
        if self.disabled:
            return _refused(403, "", "Access to this resource is disabled.")
        if self.gated and files and not allowed:
            words = f"Access to model {name} is restricted. You must be authenticated to access it."
            return _refused(403 if token else 401, "GatedRepo", words)
        return None


_NO_REPOSITORY = Repository()


class FakeHub:
    """A stand-in, which runs during the ``with`` block.

    Args:
        own_cdn: Whether files in LFS are on another server than the Hub, as they are in the real one. If not, the
            redirects stay on the server that was asked, whatever leads to it.

    Attributes:
        repositories: By name: ``"org/name"``.
        renamed: Old name -> new name.
        tokens: All tokens that the Hub knows.
        requests: What both servers were sent.
        page_entries: The most entries of one page of a tree.
        before: Returns the answer to a request; None for the usual one.
    """

    def __init__(self, *, own_cdn: bool = True) -> None:
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}
        self.tokens: set[str] = set()
        self.requests: list[HubRequest] = []
        self.page_entries = 1000
        self.before: Callable[[HubRequest], HubAnswer | None] = lambda _: None
        self._own_cdn = own_cdn
        self._lock = threading.Lock()
        self._blobs: dict[str, bytes] = {}
        self._key = secrets.token_bytes(16)
        self._stack = contextlib.ExitStack()
        self.port = 0
        self.cdn_port = 0

    def __enter__(self) -> FakeHub:
        self.port = self._stack.enter_context(_serving("hub", self._answer))
        self.cdn_port = self._stack.enter_context(_serving("cdn", self._answer))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        """URL of the Hub."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def cdn_url(self) -> str:
        """URL of the CDN. It has another host, since huggingface_hub 1 takes another port for the same server."""
        return f"http://localhost:{self.cdn_port}"

    def environ(self) -> dict[str, str]:
        """Variables that lead to it."""
        return {"HF_ENDPOINT": self.url}

    # -- what it holds ------------------------------------------------------------------------------------------------

    def put(self, name: str, path: str, content: bytes, *, branch: str = "main", lfs: bool | None = None) -> str:
        """Commit a file to a repository, which is created if need be; returns the commit."""
        return self._commit(name, {path: content}, branch, lfs)

    def upload(self, directory: str | Path, name: str, *, branch: str = "main") -> str:
        """Commit all files of a directory; returns the URI."""
        root = Path(directory)
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        self._commit(name, {path.relative_to(root).as_posix(): path.read_bytes() for path in files}, branch)
        return f"hf://{name}"

    def digest_of(self, name: str, path: str, *, branch: str = "main") -> str:
        """SHA-256 of a file."""
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]][path].sha256

    def revoke_signatures(self) -> None:
        """Make all URLs that were signed so far as good as expired."""
        self._key = secrets.token_bytes(16)

    def _commit(self, name: str, contents: Mapping[str, bytes], branch: str, lfs: bool | None = None) -> str:
        with self._lock:
            repository = self.repositories.setdefault(name, Repository())
            files = dict(repository.commits.get(repository.branches.get(branch, ""), {}))
            for path, content in contents.items():
                large = len(content) >= _LFS_BYTES or path.endswith(".safetensors")
                files[path] = file = _File(content, large if lfs is None else lfs)
                self._blobs[file.sha256] = content
            described = json.dumps([name, len(repository.commits), sorted(files)])
            commit = hashlib.sha1(described.encode()).hexdigest()  # noqa: S324 - as git does
            repository.commits[commit] = files
            repository.branches[branch] = commit
            return commit

    # -- answers ------------------------------------------------------------------------------------------------------

    def _answer(self, request: HubRequest) -> HubAnswer | None:
        self.requests.append(request)
        given = self.before(request)
        if given is not None:
            return given
        if request.path.startswith("/cdn/"):
            return self._blob(request)
        return self._hub(request) if request.server == "hub" else (404, {}, b"")

    def _hub(self, request: HubRequest) -> HubAnswer:
        if request.token and request.token not in self.tokens:
            return _refused(401, "", "Invalid credentials in Authorization header")
        cached = request.path.removeprefix("/api/resolve-cache/models/")
        if cached != request.path:
            org, name, commit, path = cached.split("/", 3)
            return self._in_repository(request, f"{org}/{name}", "resolve-cache", commit, path)
        parts = request.path.removeprefix("/api/models").strip("/").split("/", 4)
        if request.path.startswith("/api/models/"):
            kind, revision, path = (*parts[2:], *("revision", "main", "")[len(parts) - 2 :])[:3]
            return self._in_repository(request, "/".join(parts[:2]), kind, revision, path)
        if len(parts) == 5 and parts[2] == "resolve":
            return self._in_repository(request, "/".join(parts[:2]), *parts[2:])
        return _refused(404, "", "Sorry, we can't find the page you are looking for.")

    def _in_repository(self, request: HubRequest, name: str, kind: str, revision: str, path: str) -> HubAnswer:
        if name in self.renamed:
            target = request.path.replace(name, self.renamed[name], 1)
            query = f"?{urlencode(request.query)}" if request.query else ""
            return 307, {"Location": f"{target}{query}"}, b""
        repository = self.repositories.get(name, _NO_REPOSITORY)
        refused = repository.refusal(name, request.token, files=kind.startswith("resolve"))
        if refused is not None:
            return refused
        revision, path = unquote(revision), unquote(path)
        commit = repository.branches.get(revision, revision)
        files = repository.commits.get(commit)
        if files is None:
            return _refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if kind in {"resolve", "resolve-cache"}:
            if path not in files:
                return _refused(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
            return self._resolved(request, kind, name, commit, path)
        return self._described(request, name, kind, commit, path)

    def _described(self, request: HubRequest, name: str, kind: str, commit: str, path: str) -> HubAnswer:
        files = self.repositories[name].commits[commit]
        if kind == "tree":
            return self._tree(request, files, path)
        if kind == "paths-info":
            wanted = parse_qs(request.body.decode()).get("paths", [])
            return _json([files[path].entry(path) for path in wanted if path in files])
        repository = self.repositories[name]
        gated = "manual" if repository.gated else False
        described: dict[str, Any] = {
            "_id": "1",
            "id": name,
            "sha": commit,
            "gated": gated,
            "private": repository.private,
        }
        if "expand" not in request.query:
            described["siblings"] = [{"rfilename": path} for path in files]
        return _json(described)

    def _tree(self, request: HubRequest, files: Mapping[str, _File], folder: str) -> HubAnswer:
        start = f"{folder}/" if folder else ""
        below = {path: file for path, file in files.items() if path.startswith(start)}
        if not below and folder:
            return _refused(404, "EntryNotFound", f"{folder} does not exist")
        recursive = request.query.get("recursive", "").lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(below.items()):
            names = path.removeprefix(start).split("/")
            for depth in range(1, len(names)):
                if recursive or depth == 1:
                    directory = start + "/".join(names[:depth])
                    entries[directory] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": directory}
            if recursive or len(names) == 1:
                entries[path] = file.entry(path)
        listed = list(entries.values())
        begin = int(request.query.get("cursor", 0))
        end = begin + min(self.page_entries, int(request.query.get("limit", self.page_entries)))
        headers = {}
        if end < len(listed):
            following = urlencode({**request.query, "cursor": end})
            headers["Link"] = f'<{self.url}{request.path}?{following}>; rel="next"'
        return _json(listed[begin:end], **headers)

    def _resolved(self, request: HubRequest, kind: str, name: str, commit: str, path: str) -> HubAnswer:
        file = self.repositories[name].commits[commit][path]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if kind == "resolve-cache":
            status, ranged, content = _ranged(request, file.content)
            return status, {**headers, "ETag": f'"{file.etag}"', **ranged}, content
        linked = {"X-Linked-Size": str(len(file.content)), "X-Linked-Etag": f'"{file.etag}"'}
        if not file.lfs:
            location = f"/api/resolve-cache/models/{name}/{commit}/{quote(path)}"
            return 307, {**headers, **linked, "Location": location}, b""
        deadline = str(int(time.time() + _SIGNED_SECONDS))
        target = (
            f"/cdn/{file.sha256}?{urlencode({'Expires': deadline, 'Signature': self._sign(file.sha256, deadline)})}"
        )
        location = f"{self.cdn_url}{target}" if self._own_cdn else target
        return 302, {**headers, **linked, "Location": location}, b""

    def _sign(self, digest: str, deadline: str) -> str:
        return hmac.new(self._key, f"{digest} {deadline}".encode(), "sha256").hexdigest()

    def _blob(self, request: HubRequest) -> HubAnswer:
        digest, deadline = request.path.removeprefix("/cdn/"), request.query.get("Expires", "0")
        if self._own_cdn and "Authorization" in request.headers:
            return (
                400,
                {},
                b"<Error><Code>InvalidArgument</Code><Message>Only one auth mechanism allowed</Message></Error>",
            )
        signature = request.query.get("Signature", "")
        known = hmac.compare_digest(signature, self._sign(digest, deadline))
        if not known or int(deadline) < time.time() or (self._own_cdn and request.method == "HEAD"):
            return 403, {}, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
        status, headers, content = _ranged(request, self._blobs[digest])
        return status, {"ETag": '"of-the-cdn"', **headers}, content


def _ranged(request: HubRequest, content: bytes) -> HubAnswer:
    match = _RANGE.fullmatch(request.headers.get("Range", ""))
    if match is None:
        return 200, {}, content
    begin, end = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
    if begin > end:
        return 416, {"Content-Range": f"bytes */{len(content)}"}, b""
    return 206, {"Content-Range": f"bytes {begin}-{end}/{len(content)}"}, content[begin : end + 1]


def _json(value: object, **headers: str) -> HubAnswer:
    return 200, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()


def _refused(status: int, code: str, message: str, **headers: str) -> HubAnswer:
    errors = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return status, {"Content-Type": "application/json", **errors, **headers}, json.dumps({"error": message}).encode()


@contextlib.contextmanager
def _serving(server: str, answer: Callable[[HubRequest], HubAnswer | None]) -> Iterator[int]:
    """The port of a server that gives each request the answer; None closes the connection without one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and content are two writes

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
            given = answer(HubRequest(server, self.command, parts.path, query, self.headers, body))
            if given is None:
                self.close_connection = True
                return
            status, headers, content = given
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_POST = do_GET  # noqa: N815 - the names that http.server wants

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # clients that go away are what some tests are about

    with Server(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield served.server_port
        finally:
            served.shutdown()
            thread.join()
