"""Reading objects of one GCS bucket, straight into the caller's memory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from modelexpress_core.contracts.storage import Endpoint, ObjectInfo
from modelexpress_core.errors import NotFoundError, UnsupportedError
from modelexpress_core.settings import from_env, variables
from modelexpress_core.storage.http import (
    ConnectionPool,
    HttpStorage,
    ListingPage,
    Meaning,
    Origin,
    Proxies,
    RangeReader,
    check_uri,
    endpoint_of,
    hex_of_base64,
)
from modelexpress_core.storage.http.service_errors import shown_origin
from modelexpress_core.uri import ModelURI
from mx_gcs._errors import NAMES, PROVIDER, GcsFailures
from mx_gcs._requests import ENCODING_HEADERS, VERSIONS, GcsRequests
from mx_gcs.settings import GcsSettings

if TYPE_CHECKING:
    from mx_gcs._credentials import Identity

__all__ = ["GcsStorage", "open_gcs"]

#: https://cloud.google.com/storage/docs/buckets#naming: up to 63 characters, or 222 with dots.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")

#: Generations and sizes are 64-bit numbers, which the API writes as text.
_NUMBER = re.compile(r"[0-9]{1,19}")

_A_BUCKET = Meaning(NotFoundError, hint="name an object in it")
_NO_METADATA = Meaning(
    UnsupportedError,
    "the server, or a proxy before it, does not speak the API of GCS; bytes of two versions could be mixed",
    f"{NAMES.check_server}, or use another server",
)


class GcsStorage(HttpStorage):
    """Reads ranges of the objects of one bucket. An object's version is its generation, a number.

    Args:
        settings: How GCS is reached.
        uri: Any URI in the bucket.
        pool: The connections, which are closed with the storage.
        identity: Gives requests their tokens; None where they have none.
        clock: Seconds; says how long a listing takes.
    """

    def __init__(
        self,
        settings: GcsSettings,
        uri: ModelURI,
        pool: ConnectionPool,
        *,
        identity: Identity | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._identity = identity
        failures = GcsFailures(
            PROVIDER,
            uri,
            endpoint=lambda: shown_origin(settings.base_url),
            names=NAMES,
            closed=lambda: pool.closed,
        )
        self._requests = GcsRequests(
            settings.base_url,
            uri.authority,
            identity=identity,
            user_project=settings.user_project,
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
            encoding_headers=ENCODING_HEADERS,
        )
        super().__init__(reader, pool, failures, read_timeout_seconds=settings.read_timeout_seconds, clock=clock)

    def endpoint(self) -> Endpoint:
        """Where requests go."""
        return endpoint_of(Origin.of_url(self._settings.base_url), self._pool, self._failures, self._settings.ca_bundle)

    def credentials(self) -> str:
        """Whose credentials are used, and where they were found; fetches a token."""
        if self._identity is None:
            reason = "MX_GCS_ANONYMOUS" if self._settings.anonymous else "STORAGE_EMULATOR_HOST"
            return f"none: requests carry no credentials ({reason})"
        with self._explained("", "find the credentials"):
            return self._identity.describe()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects below ``prefix``, a page of a thousand at a time; names that end in a slash are directories."""
        operation = "list the objects"
        folder = f"{prefix}/" if prefix else ""
        for item in self._entries(lambda mark: self._page(folder, mark, prefix, operation), prefix, operation):
            info = self._info(item, prefix, operation)
            if not info.path.startswith(folder):
                reason = "the listing has objects of another directory"
                raise self._failures.described(_NO_METADATA, reason, prefix, operation)
            if not info.path.endswith("/"):
                yield info

    def _page(self, folder: str, mark: str | None, prefix: str, operation: str) -> ListingPage[Any]:
        page = self._requests.page(folder, mark, operation)
        items, following = page.get("items", []), page.get("nextPageToken")
        if not isinstance(items, list) or not isinstance(following, (str, type(None))):
            raise self._failures.described(_NO_METADATA, "the listing has no items", prefix, operation)
        return ListingPage(items, following)

    def stat(self, path: str) -> ObjectInfo:
        """The object at ``path``, with the digests that GCS keeps of it."""
        operation = "read the size"
        self._failures.check_open(path, operation)
        if not path:
            raise self._failures.described(_A_BUCKET, "a bucket is no object", path, operation)
        with self._explained(path, operation):
            metadata = self._requests.metadata(path, operation)
        info = self._info(metadata, path, operation)
        if info.path != path:
            raise self._failures.described(_NO_METADATA, "the answer is of another object", path, operation)
        return info

    def close(self) -> None:
        """Shut the connections down; reads that are under way in other threads fail at once."""
        super().close()
        if self._identity is not None:
            self._identity.close()

    def _info(self, metadata: Any, path: str, operation: str) -> ObjectInfo:  # noqa: ANN401 - what JSON holds
        """What the API says of an object; without a generation, its version could not be pinned."""
        fields = metadata if isinstance(metadata, dict) else {}
        name, size, generation = (
            _text(fields.get("name")),
            _number(fields.get("size")),
            _number(fields.get("generation")),
        )
        if not name or not _is_unicode(name) or size is None or generation is None:
            reason = "the server gave no name, size or generation of it"
            raise self._failures.described(_NO_METADATA, reason, path, operation)
        published = {
            "crc32c": hex_of_base64("crc32c", _text(fields.get("crc32c"))),
            "md5": hex_of_base64("md5", _text(fields.get("md5Hash"))),
        }
        digests = {algorithm: digest for algorithm, digest in published.items() if digest is not None}
        return ObjectInfo(name, int(size), generation, digests)


def _number(value: object) -> str | None:
    return value if isinstance(value, str) and _NUMBER.fullmatch(value) else None


def _is_unicode(text: str) -> bool:
    """Whether ``text`` can be written in UTF-8; JSON can hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def open_gcs(uri: ModelURI, settings: Mapping[str, str], *, clock: Callable[[], float] = time.monotonic) -> GcsStorage:
    """The storage for ``gs`` URIs. Connects to nothing yet, and looks for no credentials.

    Raises:
        InvalidURIError: The URI has no bucket, or holds credentials or parameters.
        SettingsError: A variable has a value that cannot be used.
    """
    check_uri(
        uri,
        service="GCS",
        place="bucket",
        pattern=_BUCKET,
        parameters=(),
        credentials_hint="remove them, and set GOOGLE_APPLICATION_CREDENTIALS",
        name_hint="an endpoint goes into MX_GCS_ENDPOINT, the project that pays into MX_GCS_USER_PROJECT",
    )
    values = from_env(GcsSettings, _with_environment(settings))
    proxies = Proxies.from_environ(settings, os.environ)
    pool = ConnectionPool(
        connect_timeout_seconds=values.connect_timeout_seconds, proxies=proxies, ca_bundle=values.ca_bundle
    )
    identity = None if values.without_credentials else _identity(values, proxies, clock)
    return GcsStorage(values, uri, pool, identity=identity, clock=clock)


def _with_environment(settings: Mapping[str, str]) -> Mapping[str, str]:
    """``settings``, and the variables of Google's tools in the process's environment that they do not name."""
    shared = [name for name in variables(GcsSettings) if not name.startswith("MX_")]
    return {**{name: os.environ[name] for name in shared if name in os.environ}, **settings}


def _identity(settings: GcsSettings, proxies: Proxies, clock: Callable[[], float]) -> Identity:
    from mx_gcs._credentials import Identity
    from mx_gcs._tokens import METADATA_HOST, TokenRequests

    requests = TokenRequests(
        connect_timeout_seconds=settings.connect_timeout_seconds,
        read_timeout_seconds=settings.read_timeout_seconds,
        proxies=proxies,
        ca_bundle=settings.ca_bundle,
        metadata_host=settings.metadata_host or METADATA_HOST,
    )
    return Identity(settings, requests, clock)
