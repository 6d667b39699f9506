"""Reading objects of one S3 bucket, straight into the caller's memory."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.httpsession import get_cert_path

from modelexpress_core.contracts.storage import Endpoint, ObjectInfo
from modelexpress_core.errors import (
    InvalidURIError,
    NotFoundError,
    SettingsError,
)
from modelexpress_core.settings import from_env
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
    md5_of_etag,
)
from modelexpress_core.storage.http.service_errors import no_version
from modelexpress_core.uri import ModelURI
from mx_s3._credentials import Identity, new_session
from mx_s3._errors import FAILURES, NAMES, PROVIDER, S3Failures, translated
from mx_s3._requests import IGNORED_ENCODINGS, S3Requests
from mx_s3.settings import REGION_PATTERN, S3Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef, ObjectTypeDef

__all__ = ["S3Storage", "open_s3"]

#: The rules for new buckets are stricter; older ones and other servers have looser ones.
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")

#: Ends of the names of directory buckets, and of access points to them.
_DIRECTORY_BUCKET = re.compile(r"--(?:xa-s3|x-s3)$")

_A_BUCKET = Meaning(NotFoundError, hint="name a key in it")

_NO_ETAG = no_version(NAMES)


class S3Storage(HttpStorage):
    """Reads ranges of the objects of one bucket. An object's version is its ETag, as S3 writes it.

    Args:
        client: The client that is used, and closed, by this storage alone.
        uri: Any URI in the bucket.
        pool: The connections, which are closed with the storage.
        read_timeout_seconds: How long to wait for the next bytes.
        identity: What the client signs with; None where it does not sign.
        ca_bundle: File with the authorities that the user named; None for those of botocore.
        clock: Seconds; says how old a signature is, and how long a listing takes.
    """

    def __init__(
        self,
        client: S3Client,
        uri: ModelURI,
        pool: ConnectionPool,
        *,
        read_timeout_seconds: float,
        identity: Identity | None = None,
        ca_bundle: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._bucket = uri.authority
        self._identity = identity
        self._ca_bundle = ca_bundle
        failures = S3Failures(
            PROVIDER,
            uri,
            endpoint=lambda: client.meta.endpoint_url,
            names=NAMES,
            closed=lambda: pool.closed,
        )
        failures.anonymous = identity is None
        reader = RangeReader(
            pool,
            S3Requests(client, uri.authority, pool, read_timeout_seconds, clock),
            failures,
            read_timeout_seconds=read_timeout_seconds,
            ignored_encodings=IGNORED_ENCODINGS,
        )
        super().__init__(reader, pool, failures, read_timeout_seconds=read_timeout_seconds, clock=clock)
        client.meta.events.register("before-call.s3.HeadBucket", _stay)
        if identity is not None:
            identity.watch(client)

    def endpoint(self) -> Endpoint:
        """Where requests for objects of the bucket go, as botocore works it out."""
        return endpoint_of(Origin.of_url(self._url()), self._pool, self._failures, self._ca_bundle)

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
            return "none: requests are not signed (MX_S3_ANONYMOUS)"
        with self._explained("", "find the credentials"):
            return self._identity.describe()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects below ``prefix``, a page of a thousand at a time; keys that end in a slash are directories."""
        prefix = prefix.strip("/")
        operation = "list the objects"
        folder = f"{prefix}/" if prefix else ""
        for entry in self._entries(lambda mark: self._page(folder, mark), prefix, operation):
            if not entry["Key"].endswith("/"):
                yield ObjectInfo(entry["Key"], entry["Size"], self._etag(entry, entry["Key"], operation))

    def _page(self, prefix: str, mark: str | None) -> ListingPage[ObjectTypeDef]:
        following: dict[str, Any] = {} if mark is None else {"ContinuationToken": mark}
        page = self._client.list_objects_v2(Bucket=self._bucket, Prefix=prefix, **following)
        return ListingPage(
            page.get("Contents", ()), page.get("NextContinuationToken") if page.get("IsTruncated") else None
        )

    def stat(self, path: str) -> ObjectInfo:
        """The object at ``path``, with the digests that S3 keeps of the whole of it."""
        operation = "read the size"
        self._failures.check_open(path, operation)
        if not path:
            raise self._failures.described(_A_BUCKET, "a bucket is no object", path, operation)
        with self._explained(path, operation):
            head = self._client.head_object(Bucket=self._bucket, Key=path, ChecksumMode="ENABLED")
        etag = self._etag(head, path, operation)
        return ObjectInfo(path, head["ContentLength"], etag, _digests(head, self._bucket))

    def close(self) -> None:
        """Shut the connections down; reads that are under way in other threads fail at once."""
        super().close()
        self._client.close()

    def _etag(self, answer: Mapping[str, Any], path: str, operation: str) -> str:
        """The ETag of an object, without which its version cannot be pinned."""
        etag = answer.get("ETag")
        if not etag:
            raise self._failures.described(_NO_ETAG, "S3 gave no ETag for it", path, operation)
        return str(etag)


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
        "crc32": head.get("ChecksumCRC32"),
        "crc32c": head.get("ChecksumCRC32C"),
        "crc64nvme": head.get("ChecksumCRC64NVME"),
        "sha1": head.get("ChecksumSHA1"),
        "sha256": head.get("ChecksumSHA256"),
    }
    # Those of parts ("...-3") are not Base64.
    checksums = {algorithm: hex_of_base64(algorithm, text) for algorithm, text in published.items()}
    return {algorithm: checksum for algorithm, checksum in checksums.items() if checksum is not None}


def _md5(head: HeadObjectOutputTypeDef, bucket: str) -> str | None:
    """The MD5 of the object, where its ETag is one.

    It is one for objects that were uploaded in one piece and are stored plain or encrypted with keys of S3 itself, says
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html; directory buckets have ETags of another kind.
    """
    encryption = head.get("ServerSideEncryption", "AES256")
    if encryption != "AES256" or head.get("SSECustomerAlgorithm") or _DIRECTORY_BUCKET.search(bucket):
        return None
    return md5_of_etag(head.get("ETag"))


def _stay(context: Any, **_: object) -> None:  # noqa: ANN401 - the dict in which botocore keeps what it did
    """Follow no redirect of a request that is to find the region: botocore would ask for that again, without end."""
    context.get("s3_redirect", {})["redirected"] = True


class _StopError(Exception):
    """Ends a request before it is sent."""


def open_s3(uri: ModelURI, settings: Mapping[str, str], *, clock: Callable[[], float] = time.monotonic) -> S3Storage:
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
        client = _client(uri, values, session, region, identity)
    except FAILURES as exc:
        raise translated(exc, uri=str(uri), operation="") from exc
    pool = ConnectionPool(
        connect_timeout_seconds=values.connect_timeout_seconds,
        proxies=Proxies.from_environ(settings, os.environ),
        ca_bundle=ca_bundle or get_cert_path(verify=True),
    )
    return S3Storage(
        client,
        uri,
        pool,
        read_timeout_seconds=values.read_timeout_seconds,
        identity=identity,
        ca_bundle=ca_bundle,
        clock=clock,
    )


def _check(uri: ModelURI) -> None:
    check_uri(
        uri,
        service="S3",
        place="bucket",
        pattern=_BUCKET,
        parameters=("region",),
        credentials_hint="remove them, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        name_hint="for an access point use its alias; an endpoint goes into AWS_ENDPOINT_URL",
    )
    if "region" in uri.query and not REGION_PATTERN.fullmatch(uri.query["region"]):
        message = f"no region can have the name in {uri}"
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
        retries={"total_max_attempts": 1, "mode": "standard"},  # core retries
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    if settings.anonymous:
        config = config.merge(Config(signature_version=UNSIGNED))
    if settings.addressing_style:
        config = config.merge(Config(s3={"addressing_style": settings.addressing_style}))
    return config
