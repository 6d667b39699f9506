"""Requests to the JSON API of GCS: reads of ranges, which core sends, and metadata and listings.

The API is described at https://cloud.google.com/storage/docs/json_api/v1. Two of its methods are all that is needed
besides downloads, so requests are made here, and google-auth gives them their tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from attrs import frozen

from modelexpress_core.errors import UnavailableError
from modelexpress_core.storage.http import ConnectionPool, Meaning, Refusal, Request, VersionHeaders, exchange
from mx_gcs._errors import GcsFailures

if TYPE_CHECKING:
    from mx_gcs._credentials import Identity

__all__ = ["ENCODING_HEADERS", "VERSIONS", "GcsRequests"]

#: Of the version that is expected (a parameter of the API; ``GcsRequests`` puts it there), and that is answered.
VERSIONS = VersionHeaders(condition="ifGenerationMatch", answered="x-goog-generation")

#: GCS decompresses an object that is stored with ``Content-Encoding: gzip`` for clients that accept no encoding. The
#: answer has another length than the object then, and no Content-Encoding.
ENCODING_HEADERS = ("content-encoding", "x-goog-stored-content-encoding")

#: A page of a listing has at most 1000 names of 1024 bytes.
_MAX_CONTENT_BYTES = 8 << 20

#: What is needed of an object.
_FIELDS = "name,size,generation,crc32c,md5Hash"

_NOT_JSON = Meaning(
    UnavailableError,
    "something in front of GCS answers, or the answer was cut",
    "check MX_GCS_ENDPOINT and HTTPS_PROXY",
)


@frozen
class _Prepared:
    """A download of one object in one version, without its range.

    Attributes:
        headers: The credentials that it has.
        request: The request.
    """

    headers: tuple[tuple[str, str], ...]
    request: Request


class GcsRequests:
    """Prepares the downloads of one bucket's objects (a ``Signer``), and sends other requests. Thread-safe.

    Args:
        base_url: Where the API is.
        bucket: The bucket.
        identity: Gives requests their tokens; None where they have none.
        user_project: The project that pays; None where none is named.
        pool: The connections.
        failures: Explains what goes wrong.
        read_timeout_seconds: How long the other requests wait for the next bytes.
    """

    def __init__(
        self,
        base_url: str,
        bucket: str,
        *,
        identity: Identity | None,
        user_project: str | None,
        pool: ConnectionPool,
        failures: GcsFailures,
        read_timeout_seconds: float,
    ) -> None:
        self._base_url = base_url
        self._bucket = quote(bucket, safe="")
        self._identity = identity
        self._user_project = user_project
        self._pool = pool
        self._failures = failures
        self._read_timeout_seconds = read_timeout_seconds
        self._prepared: dict[tuple[str, str | None], _Prepared] = {}

    # -- the downloads of ranges --------------------------------------------------------------------------------------

    def request(self, path: str, headers: Mapping[str, str]) -> Request:
        """A download of the object ``path``, with a token that is valid."""
        generation = headers.get(VERSIONS.condition)
        credentials = self._credentials()
        prepared = self._prepared.get((path, generation))
        if prepared is None or prepared.headers != credentials:
            parameters = {"alt": "media"}
            if generation is not None:
                parameters["ifGenerationMatch"] = generation
            url = f"{self._base_url}/download/storage/v1/{self._object(path)}?{self._query(parameters)}"
            prepared = _Prepared(credentials, Request.to_url("GET", url, credentials))
            self._prepared[path, generation] = prepared
        return prepared.request.with_headers({"Range": headers["Range"]})

    def renewed(self, path: str, headers: Mapping[str, str], refusals: Sequence[Refusal]) -> Request | None:
        """The same with another token, where GCS refused the one before."""
        return self.request(path, headers) if self._renew(refusals) else None

    # -- metadata and listings ----------------------------------------------------------------------------------------

    def metadata(self, path: str, operation: str) -> Mapping[str, Any]:
        """The metadata of the object ``path``."""
        query = self._query({"fields": _FIELDS})
        return self._get(f"{self._object(path)}?{query}", path, operation)

    def page(self, folder: str, token: str | None, operation: str) -> Mapping[str, Any]:
        """The page of a listing of the names that begin with ``folder``.

        Args:
            folder: With a slash at the end, or empty.
            token: What the page before says; None for the first.
            operation: For errors.
        """
        parameters = {"prefix": folder, "maxResults": "1000", "fields": f"nextPageToken,items({_FIELDS})"}
        if token is not None:
            parameters["pageToken"] = token
        return self._get(f"b/{self._bucket}/o?{self._query(parameters)}", folder.rstrip("/"), operation, listing=True)

    def _get(self, target: str, path: str, operation: str, *, listing: bool = False) -> Mapping[str, Any]:
        url = f"{self._base_url}/storage/v1/{target}"
        refusals: list[Refusal] = []
        while True:
            request = Request.to_url("GET", url, self._credentials())
            answer = exchange(
                self._pool, request, read_timeout_seconds=self._read_timeout_seconds, max_bytes=_MAX_CONTENT_BYTES
            )
            if answer.status == 200:
                return self._object_of(answer.content, path, operation)
            refusals.append(answer.as_refusal(request))
            if not self._renew(refusals):
                raise self._failures.of_answer(refusals[-1], path, operation, listing=listing)

    def _object_of(self, content: bytes, path: str, operation: str) -> Mapping[str, Any]:
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise self._failures.described(_NOT_JSON, "the answer is not of the API of GCS", path, operation)
        return parsed

    # -- parts of requests --------------------------------------------------------------------------------------------

    def _renew(self, refusals: Sequence[Refusal]) -> bool:
        """Whether a request may be sent again, with another token; once for a request."""
        if self._identity is None or refusals[-1].status != 401 or len(refusals) > 1:
            return False
        return self._identity.renew(dict(refusals[-1].request.headers).get("Authorization", ""))

    def _credentials(self) -> tuple[tuple[str, str], ...]:
        if self._identity is None:
            return ()
        headers = self._identity.headers()
        if self._user_project is None:
            return headers
        return tuple((name, value) for name, value in headers if name != "X-Goog-User-Project")

    def _object(self, path: str) -> str:
        return f"b/{self._bucket}/o/{quote(path, safe='', errors='surrogateescape')}"

    def _query(self, parameters: Mapping[str, str]) -> str:
        paying = {} if self._user_project is None else {"userProject": self._user_project}
        return urlencode({**parameters, **paying}, quote_via=quote, safe="", errors="surrogateescape")
