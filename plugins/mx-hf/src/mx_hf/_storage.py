"""Reading files of the repositories of one organisation on the Hub, straight into the caller's memory."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from modelexpress_core.contracts.storage import Endpoint, ObjectInfo
from modelexpress_core.errors import InvalidURIError, NotFoundError, UnavailableError, UnsupportedError
from modelexpress_core.storage.http import (
    ConnectionPool,
    HttpStorage,
    Meaning,
    Origin,
    Proxies,
    RangeReader,
    check_uri,
    endpoint_of,
)
from modelexpress_core.uri import ModelURI
from mx_hf._errors import NAMES, PROVIDER, HfFailures
from mx_hf._offline import copy_of
from mx_hf._repositories import ORGANISATION, RESERVED, Place, PlaceError
from mx_hf._requests import COMMIT, VERSIONS, HubRequests, Version
from mx_hf._tokens import Identity
from mx_hf.settings import HfSettings, hf_settings

__all__ = ["HfStorage", "open_hf"]

#: A load fails for what is wrong with these files, and for no others.
_NEEDED = (".safetensors", ".safetensors.index.json")

#: Files whose metadata is kept; core lists no more for one checkpoint.
_MAX_KNOWN_FILES = 100_000

#: Sizes are 64-bit numbers.
_MAX_FILE_BYTES = (1 << 63) - 1

_SHA256 = re.compile(r"[0-9a-f]{64}")

_NO_PLACE = Meaning(NotFoundError, hint="write hf://org/name, or hf://org/name/directory")
_NOT_THERE = Meaning(
    NotFoundError,
    "the name is misspelt, or this revision does not have the file",
    "check the files of the repository at this revision",
)
_A_DIRECTORY = Meaning(NotFoundError, hint="name a file in it")
_NO_METADATA = Meaning(
    UnsupportedError,
    "the server, or a proxy before it, does not speak the API of the Hub; bytes of two versions could be mixed",
    f"{NAMES.check_server}, or use another server",
)
_OFFLINE = Meaning(
    UnavailableError,
    "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, and huggingface_hub has downloaded no such revision",
    retryable=False,
)


class HfStorage(HttpStorage):
    """Reads ranges of files of one organisation's repositories.

    A revision is resolved to its commit once, at the first request: all listings and reads of a storage are of one
    commit, also where a branch moves meanwhile. A file's version names that commit, and the content.

    Args:
        settings: How the Hub is reached.
        uri: Any URI of the organisation; its ``revision`` counts for all.
        pool: The connections, which are closed with the storage.
        clock: Seconds; says how long a listing takes.
    """

    def __init__(
        self, settings: HfSettings, uri: ModelURI, pool: ConnectionPool, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._organisation = uri.authority
        self._revision = uri.query.get("revision")
        self._identity = Identity(settings)
        self._lock = threading.Lock()
        self._listing = threading.Lock()
        self._commits: dict[tuple[str, str], str] = {}
        self._known: dict[tuple[str, str], ObjectInfo] = {}
        self._listed: set[tuple[str, str, bool]] = set()
        failures = HfFailures(
            PROVIDER,
            uri,
            endpoint=lambda: str(self._requests.latest),
            names=NAMES,
            closed=lambda: pool.closed,
        )
        failures.hub = Origin.of_url(settings.endpoint)
        self._requests = HubRequests(
            settings.endpoint,
            self._organisation,
            identity=self._identity,
            pool=pool,
            failures=failures,
            read_timeout_seconds=settings.read_timeout_seconds,
        )
        reader = RangeReader(
            pool,
            self._requests,
            failures,
            read_timeout_seconds=settings.read_timeout_seconds,
            versions=VERSIONS,
        )
        super().__init__(reader, pool, failures, read_timeout_seconds=settings.read_timeout_seconds, clock=clock)

    def endpoint(self) -> Endpoint:
        """Where requests go first; the Hub names the server of the bytes."""
        origin = Origin.of_url(self._settings.endpoint)
        return endpoint_of(origin, self._pool, self._failures, self._settings.ca_bundle)

    def credentials(self) -> str:
        """Which token requests carry, by the place where it was found."""
        with self._explained("", "find the token"):
            return self._identity.describe()

    def is_restricted(self, path: str) -> bool:
        """Whether the repository is private or gated."""
        operation = "ask who may read it"
        place = self._place(path, operation)
        self._failures.check_open(path, operation)
        if self._settings.offline:
            raise self._offline(place, path, operation)
        with self._explained(path, operation):
            return self._requests.is_restricted(place, path, operation)

    def resolve_again(self) -> None:
        """Forget the commits of revisions, so that the next request asks for them.

        No load does that: each opens a storage of its own, and stays with its commit.
        """
        with self._lock:
            self._commits.clear()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The files below ``prefix``, a page of a thousand entries at a time."""
        operation = "list the files"
        place = self._place(prefix, operation)
        commit = self._commit(place, prefix, operation)
        yield from self._files(place, commit, prefix, operation, recursive=True)

    def stat(self, path: str) -> ObjectInfo:
        """The file at ``path``; metadata of files that were listed takes no request."""
        operation = "read the size"
        place = self._place(path, operation)
        if not place.inside:
            raise self._failures.described(_A_DIRECTORY, "a repository is no file", path, operation)
        commit = self._commit(place, path, operation)
        with self._listing:  # so that threads which ask for several files of a directory list it once
            info = self._known.get((commit, path))
            if info is None and not self._is_listed(place, commit):
                for each in self._files(place.at(place.folder), commit, path, operation, recursive=False):
                    info = each if each.path == path else info
        if info is None:
            reason = f"there is no such file in {place.repository} at the commit {commit}"
            raise self._failures.described(_NOT_THERE, reason, path, operation)
        return info

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        """Read into ``buffer`` with one GET of the range, of the commit in ``version``, or of the storage's."""
        operation = "find the content"
        place = self._place(path, operation)
        if version is None or "/" not in version:  # a version of another plugin is compared as the content's
            version = str(Version(self._commit(place, path, operation), version or ""))
        elif self._settings.offline:
            raise self._offline(place, path, operation)
        return super().read_into(path, offset, buffer, version=version)

    # -- revisions ----------------------------------------------------------------------------------------------------

    def _place(self, path: str, operation: str) -> Place:
        try:
            return Place.of(self._organisation, path, self._revision)
        except PlaceError as exc:
            raise self._failures.described(_NO_PLACE, str(exc), path, operation) from None

    def _commit(self, place: Place, path: str, operation: str) -> str:
        """The commit of the revision, resolved once."""
        self._failures.check_open(path, operation)
        if self._settings.offline:
            raise self._offline(place, path, operation)
        if COMMIT.fullmatch(place.revision):
            return place.revision
        key = place.repository, place.revision
        with self._lock:
            if key not in self._commits:
                with self._explained(path, operation):
                    self._commits[key] = self._requests.commit(place, path, operation)
            return self._commits[key]

    def _offline(self, place: Place, path: str, operation: str) -> Exception:
        """The error for a request that may not be sent; names the downloaded copy, if there is one."""
        cache = self._settings.cache_directory
        copy = copy_of(place, cache)
        hint = f"unset it, or download {place.repository} into {cache} where there is a network"
        if copy is not None:
            hint = f"load the downloaded copy: {os.path.join(copy, place.inside)}"
        return self._failures.described(_OFFLINE, "no request was sent", path, operation, hint=hint)

    # -- trees --------------------------------------------------------------------------------------------------------

    def _files(self, place: Place, commit: str, path: str, operation: str, *, recursive: bool) -> Iterator[ObjectInfo]:
        """The files of a directory of the repository; their metadata is kept."""
        folder = f"{place.inside}/" if place.inside else ""
        entries = self._entries(
            lambda cursor: self._requests.tree(
                place, commit, cursor, recursive=recursive, path=path, operation=operation
            ),
            path,
            operation,
            things="files",
        )
        complete = True
        for entry in entries:
            info = self._info(entry, place, commit, path, operation)
            if info is None or info.path == place.path_of(place.inside):
                continue
            if not info.path.startswith(place.path_of(folder)):
                reason = "the listing has files of another directory"
                raise self._failures.described(_NO_METADATA, reason, path, operation)
            if len(self._known) < _MAX_KNOWN_FILES:
                self._known[commit, info.path] = info
            else:
                complete = False
            yield info
        if complete:
            self._listed.add((commit, place.path_of(place.inside), recursive))

    def _is_listed(self, place: Place, commit: str) -> bool:
        """Whether a complete listing would have had the file."""
        folder = place.folder
        if (commit, place.path_of(folder), False) in self._listed:
            return True
        while (commit, place.path_of(folder), True) not in self._listed:
            if not folder:
                return False
            folder = folder.rpartition("/")[0]
        return True

    def _info(
        self,
        entry: object,
        place: Place,
        commit: str,
        path: str,
        operation: str,
    ) -> ObjectInfo | None:
        """What a tree says of a file; None for a directory, and for a file that no load needs and that is unusable."""
        fields = _object(entry)
        name, kind = _text(fields.get("path")), fields.get("type")
        if kind not in {"file", None}:
            return None
        lfs = _object(fields.get("lfs"))
        digest = _text(lfs.get("oid")).removeprefix("sha256:").lower()
        etag = digest or _text(fields.get("oid"))
        size = lfs.get("size", fields.get("size"))
        if (
            _is_path(name)
            and type(size) is int
            and 0 <= size <= _MAX_FILE_BYTES
            and COMMIT.fullmatch(etag)
            and (not digest or _SHA256.fullmatch(digest))
        ):
            digests = {"sha256": digest} if digest else {}
            return ObjectInfo(place.path_of(name), size, str(Version(commit, etag)), digests)
        if name and not name.endswith(_NEEDED):
            return None
        reason = "the server gave no usable name, size or version of a file"
        raise self._failures.described(_NO_METADATA, reason, path, operation)


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _is_path(text: str) -> bool:
    """Whether ``text`` is a relative path of a file, as git has them: without control characters, in Unicode."""
    return text.isprintable() and all(part not in {"", ".", ".."} for part in text.split("/"))


def open_hf(uri: ModelURI, settings: Mapping[str, str], *, clock: Callable[[], float] = time.monotonic) -> HfStorage:
    """The storage for ``hf`` URIs. Connects to nothing yet, and looks for no token.

    Raises:
        InvalidURIError: The URI names no repository, or holds credentials or other parameters than ``revision``.
        SettingsError: A variable has a value that cannot be used.
    """
    check_uri(
        uri,
        service="Hugging Face Hub",
        place="org",
        pattern=ORGANISATION,
        parameters=("revision",),
        credentials_hint="remove them, and set HF_TOKEN",
        name_hint="write hf://org/name?revision=REVISION, and a Hub of your own into HF_ENDPOINT",
    )
    if uri.authority in RESERVED:
        raise InvalidURIError(
            f"{uri} does not begin with the name of an organisation or user",
            cause="hf:// means models",
            hint="write hf://org/name",
        )
    try:
        Place.of(uri.authority, uri.path, uri.query.get("revision"))
    except PlaceError as exc:
        raise InvalidURIError(
            f"the Hugging Face URI {uri} cannot be used: {exc}",
            hint="write hf://org/name, hf://org/name/directory or hf://org/name?revision=REVISION; old names without "
            "an organisation have one now: gpt2 is openai-community/gpt2",
        ) from None
    values = hf_settings(settings)
    proxies = Proxies.from_environ(settings, os.environ)
    pool = ConnectionPool(
        connect_timeout_seconds=values.connect_timeout_seconds, proxies=proxies, ca_bundle=values.ca_bundle
    )
    return HfStorage(values, uri, pool, clock=clock)
