"""Reading objects of one S3 bucket, straight into the caller's memory."""

from __future__ import annotations

import base64
import binascii
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.utils import get_environ_proxies

from modelexpress_core.contracts.storage import Endpoint, ObjectInfo
from modelexpress_core.errors import (
    BackendError,
    InvalidURIError,
    NotFoundError,
    SettingsError,
    SourceChangedError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.settings import from_env
from modelexpress_core.uri import ModelURI
from mx_s3._credentials import Identity, new_session
from mx_s3._errors import FAILURES, PROVIDER, translated
from mx_s3._http import BotocoreAnswer, Connections
from mx_s3._ranges import RangeAnswer, RangeRequests
from mx_s3.settings import REGION_PATTERN, S3Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectRequestTypeDef, HeadObjectOutputTypeDef

__all__ = ["S3Storage", "open_s3"]

#: More than core ever reads at once; urllib3 would close what comes back to a full pool.
_POOL_CONNECTIONS = 256

#: The rules for new buckets are stricter; older ones and other servers have looser ones.
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")

_MD5_ETAG = re.compile(r'"([0-9A-Fa-f]{32})"')

#: Ends of the names of directory buckets, and of access points to them.
_DIRECTORY_BUCKET = re.compile(r"--(?:xa-s3|x-s3)$")

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(?:\d+|\*)")


class S3Storage:
    """Reads ranges of the objects of one bucket. An object's version is its ETag, as S3 writes it.

    Args:
        client: The client that is used, and closed, by this storage alone.
        uri: Any URI in the bucket.
        identity: What the client signs with; None where it does not sign.
        ca_bundle: File with the authorities that the client trusts; None for those of botocore.
    """

    def __init__(
        self, client: S3Client, uri: ModelURI, identity: Identity | None = None, ca_bundle: str | None = None
    ) -> None:
        self._client = client
        self._uri = uri
        self._bucket = uri.authority
        self._identity = identity
        self._ca_bundle = ca_bundle
        self._read_timeout_seconds = float(client.meta.config.read_timeout)  # type: ignore[attr-defined]
        self._connections = Connections(self._read_timeout_seconds)
        self._connections.watch(client)
        self._ranges = RangeRequests(client, self._bucket, lambda: self.patience_seconds)
        client.meta.events.register("before-call.s3.HeadBucket", _stay)
        if identity is not None:
            identity.watch(client)

    @property
    def patience_seconds(self) -> float:
        """How long a read waits for its next bytes; at most, and to begin with, MX_S3_READ_TIMEOUT_SECONDS."""
        return self._connections.patience_seconds

    @patience_seconds.setter
    def patience_seconds(self, seconds: float) -> None:
        self._connections.patience_seconds = seconds

    def endpoint(self) -> Endpoint:
        """Where requests for objects of the bucket go, as botocore works it out."""
        url = urlsplit(self._url())
        tls = url.scheme == "https"
        return Endpoint(
            host=url.hostname or "",
            port=url.port or (443 if tls else 80),
            tls=tls,
            ca_bundle=self._ca_bundle if tls else None,
            proxy=_proxy(self._client.meta.endpoint_url, url.scheme),
        )

    def _url(self) -> str:
        """The URL of a request, which is prepared and not sent."""
        asking = threading.get_ident()

        def stop(params: Mapping[str, Any], **_: object) -> None:
            if threading.get_ident() == asking:
                raise _StopError(params["url"])

        self._client.meta.events.register("before-call.s3.HeadObject", stop)
        try:
            self._client.head_object(Bucket=self._bucket, Key="any")
        except _StopError as stopped:
            return str(stopped)
        except FAILURES as exc:
            raise self._failure(exc, "", "find the endpoint") from exc
        finally:
            self._client.meta.events.unregister("before-call.s3.HeadObject", stop)
        return self._client.meta.endpoint_url

    def credentials(self) -> str:
        """Whose key requests are signed with, and where it was found."""
        if self._identity is None:
            return "nobody: requests are not signed (MX_S3_ANONYMOUS)"
        try:
            return self._identity.describe()
        except FAILURES as exc:
            raise self._failure(exc, "", "find the credentials") from exc

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects below ``prefix``, a page of a thousand at a time; keys that end in a slash are directories."""
        prefix = prefix.strip("/")
        operation = "list the objects"
        self._check_open(prefix, operation)
        pages = iter(
            self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket,
                Prefix=f"{prefix}/" if prefix else "",
            )
        )
        while True:
            try:
                page = next(pages, None)
            except FAILURES as exc:
                raise self._failure(exc, prefix, operation) from exc
            if page is None:
                return
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):
                    yield ObjectInfo(entry["Key"], entry["Size"], entry.get("ETag"))

    def stat(self, path: str) -> ObjectInfo:
        """The object at ``path``, with the digests that S3 keeps of the whole of it."""
        operation = "read the size"
        self._check_open(path, operation)
        if not path:
            reason = "a bucket is no object"
            raise self._error(NotFoundError, reason, path, operation, hint="name a key in it")
        try:
            head = self._client.head_object(Bucket=self._bucket, Key=path, ChecksumMode="ENABLED")
        except FAILURES as exc:
            raise self._failure(exc, path, operation) from exc
        return ObjectInfo(path, head["ContentLength"], head.get("ETag"), _digests(head, self._bucket))

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        """Read into ``buffer`` with one GET of the range, which S3 refuses if the ETag is no longer ``version``."""
        last = offset + len(buffer) - 1
        operation = f"read bytes {offset}-{last}"
        self._check_open(path, operation)
        headers = {"Range": f"bytes={offset}-{last}"}
        if version is not None:
            headers["If-Match"] = version
        with self._connections.reading() as wait_patiently:
            try:
                answer = self._ranges.get(path, headers) or self._get(path, headers, wait_patiently)
            except FAILURES as exc:
                raise self._failure(exc, path, operation, self.patience_seconds) from exc
            try:
                expected = self._check_answer(answer, path, offset=offset, length=len(buffer), version=version)
            except BackendError:
                answer.close()
                raise
            done, error = answer.read_into(buffer[:expected])
        self._check_open(path, operation)
        if error is not None and not done:
            raise self._failure(error, path, operation, self.patience_seconds) from error
        if not done:
            reason = "the connection was closed before the first byte"
            raise self._error(UnavailableError, reason, path, operation, hint="try again")
        return done

    def _get(self, path: str, headers: Mapping[str, str], wait_patiently: Callable[[], None]) -> BotocoreAnswer:
        """The answer to a GET that botocore sends."""
        request: GetObjectRequestTypeDef = {"Bucket": self._bucket, "Key": path, "Range": headers["Range"]}
        if "If-Match" in headers:
            request["IfMatch"] = headers["If-Match"]
        return BotocoreAnswer(self._client.get_object(**request), wait_patiently)

    def close(self) -> None:
        """Shut the connections down; reads that are under way in other threads fail at once."""
        self._connections.shut_down()
        self._client.close()

    def _check_answer(
        self, answer: RangeAnswer | BotocoreAnswer, path: str, *, offset: int, length: int, version: str | None
    ) -> int:
        """How many bytes of what was asked for the body holds, starting with the first.

        Not every server (or cache before one) honours ``Range`` and ``If-Match``; wrong bytes must never pass.
        """
        operation = f"read bytes {offset}-{offset + length - 1}"
        headers = answer.headers
        if version is not None and headers.get("etag", version) != version:
            reason = f"the answer is of another version, {headers['etag']}, and If-Match was ignored"
            raise self._error(SourceChangedError, reason, path, operation, hint="start the load again")
        if answer.status == 200 and offset == 0:
            return min(length, int(headers.get("content-length", length)))
        match = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
        if match is None or int(match[1]) != offset or int(match[2]) < offset:
            reason = f"the answer holds other bytes: {headers.get('content-range', 'the whole object')}"
            raise self._error(
                UnsupportedError,
                reason,
                path,
                operation,
                cause="the server, or a proxy before it, does not honour Range requests",
                hint="check AWS_ENDPOINT_URL and what is in front of it",
            )
        return min(length, int(match[2]) + 1 - offset)

    def _check_open(self, path: str, operation: str) -> None:
        if self._connections.closed:
            raise self._error(BackendError, "the storage was closed", path, operation)

    def _failure(self, exc: Exception, path: str, operation: str, silence_seconds: float | None = None) -> BackendError:
        if self._connections.closed:
            return self._error(BackendError, "the storage was closed while this was under way", path, operation)
        uri = str(self._uri.with_path(path))
        return translated(
            exc,
            uri=uri,
            operation=operation,
            endpoint=self._client.meta.endpoint_url,
            silence_seconds=silence_seconds or self._read_timeout_seconds,
        )

    def _error(
        self,
        cls: type[BackendError],
        reason: str,
        path: str,
        operation: str,
        *,
        cause: str | None = None,
        hint: str | None = None,
    ) -> BackendError:
        uri = str(self._uri.with_path(path))
        return cls(reason, uri=uri, operation=operation, provider=PROVIDER, cause=cause, hint=hint)


def _digests(head: HeadObjectOutputTypeDef, bucket: str) -> dict[str, str]:
    """Digests of the whole object, by algorithm."""
    digests = _checksums(head)
    md5 = _md5(head, bucket)
    return digests if md5 is None else {**digests, "md5": md5}


def _checksums(head: HeadObjectOutputTypeDef) -> dict[str, str]:
    """The checksums that S3 keeps; those of objects uploaded in parts are mostly checksums of checksums."""
    if head.get("ChecksumType") == "COMPOSITE":
        return {}
    published = {
        "crc32": (head.get("ChecksumCRC32"), 4),
        "crc32c": (head.get("ChecksumCRC32C"), 4),
        "crc64nvme": (head.get("ChecksumCRC64NVME"), 8),
        "sha1": (head.get("ChecksumSHA1"), 20),
        "sha256": (head.get("ChecksumSHA256"), 32),
    }
    checksums = {}
    for algorithm, (text, length) in published.items():
        if text and "-" not in text:  # of parts: "...-3"
            try:
                value = base64.b64decode(text, validate=True)
            except binascii.Error:
                continue
            if len(value) == length:
                checksums[algorithm] = value.hex()
    return checksums


def _md5(head: HeadObjectOutputTypeDef, bucket: str) -> str | None:
    """The MD5 of the object, where its ETag is one.

    It is for what was uploaded in one piece and lies there plain or encrypted with keys of S3 itself, says
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html; directory buckets have ETags of another kind.
    """
    match = _MD5_ETAG.fullmatch(head.get("ETag", ""))
    encryption = head.get("ServerSideEncryption", "AES256")
    if match is None or encryption != "AES256" or head.get("SSECustomerAlgorithm") or _DIRECTORY_BUCKET.search(bucket):
        return None
    return match[1].lower()


def _proxy(endpoint_url: str, scheme: str) -> str | None:
    """URL of the proxy that botocore takes for a client of ``endpoint_url``, without the credentials in it."""
    proxy = get_environ_proxies(endpoint_url).get(scheme)
    if not proxy:
        return None
    parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    return f"{parts.scheme or 'http'}://{parts.netloc.rpartition('@')[2]}"


def _stay(context: Any, **_: object) -> None:  # noqa: ANN401 - the dict in which botocore keeps what it did
    """Follow no redirect of a request that is to find the region: botocore would ask for that again, without end."""
    context.get("s3_redirect", {})["redirected"] = True


class _StopError(Exception):
    """Ends a request before it is sent."""


def open_s3(uri: ModelURI, settings: Mapping[str, str]) -> S3Storage:
    """The storage for ``s3`` URIs. Connects to nothing yet, and looks for no credentials.

    Raises:
        InvalidURIError: The URI has no bucket, or holds credentials or parameters that mean nothing here.
        SettingsError: A variable has a value that cannot be used.
        BackendError: The configuration files cannot be used, or the variables hold a part of the credentials only.
    """
    _check(uri)
    values = from_env(S3Settings, settings)
    try:
        session = new_session(values)
        region = uri.query.get("region") or values.region or session.get_config_variable("region") or "us-east-1"
        identity = None if values.anonymous else Identity(values, region)
        ca_bundle = session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
        return S3Storage(_client(uri, values, session, region, identity), uri, identity, ca_bundle)
    except FAILURES as exc:
        raise translated(exc, uri=str(uri), operation="") from exc


def _check(uri: ModelURI) -> None:
    if uri.userinfo:
        message = f"credentials in an S3 URI: {uri}"
        hint = "take them out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        raise InvalidURIError(message, hint=hint)
    if not uri.authority:
        message = f"no bucket in the S3 URI: {uri}"
        raise InvalidURIError(message, hint="write s3://bucket/path, with two slashes before the bucket")
    if not _BUCKET.fullmatch(uri.authority):
        message = f"no bucket can have the name that stands in {uri}"
        hint = "write s3://bucket/path; for an access point use its alias; an endpoint goes into AWS_ENDPOINT_URL"
        raise InvalidURIError(message, hint=hint)
    unknown = sorted(uri.query.keys() - {"region"})
    if unknown:
        message = f"unknown parameters in {uri}: {', '.join(unknown)}"
        raise InvalidURIError(
            message,
            cause="an S3 URI takes only ?region=; all else is set by variables",
            hint="take them out; an endpoint goes into AWS_ENDPOINT_URL, a ? in a key is written %3F",
        )
    if "region" in uri.query and not REGION_PATTERN.fullmatch(uri.query["region"]):
        message = f"no region can have the name that stands in {uri}"
        raise InvalidURIError(message, hint="write for example ?region=eu-central-1")


def _client(
    uri: ModelURI,
    settings: S3Settings,
    session: botocore.session.Session,
    region: str,
    identity: Identity | None,
) -> S3Client:
    if identity is not None:
        session.register_component("credential_provider", identity)
    try:
        return boto3.session.Session(botocore_session=session).client(
            "s3",
            region_name=region,
            endpoint_url=settings.s3_endpoint or settings.endpoint,
            config=_config(settings),
        )
    except ValueError as exc:
        # Our own variables were checked before, and botocore's message shows the value.
        message = f"botocore refuses the region or the endpoint URL that holds for {uri}"
        hint = "check region and endpoint_url in the AWS configuration file"
        raise SettingsError(message, hint=hint) from exc


def _config(settings: S3Settings) -> Config:
    config = Config(
        connect_timeout=settings.connect_timeout_seconds,
        read_timeout=settings.read_timeout_seconds,
        max_pool_connections=_POOL_CONNECTIONS,
        tcp_keepalive=True,
        retries={"total_max_attempts": 1, "mode": "standard"},  # core retries
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    if settings.anonymous:
        config = config.merge(Config(signature_version=UNSIGNED))
    if settings.addressing_style:
        config = config.merge(Config(s3={"addressing_style": settings.addressing_style}))
    return config
