"""Requests that botocore prepares and core sends: botocore knows endpoints, signatures and regions, core connections.

For each request botocore checks its parameters, resolves the endpoint and signs: one to two milliseconds of Python. The
GETs of one object differ in Range and If-Match alone, which need no signature (S3 asks for one of Host and of the
headers that begin with x-amz-, says https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html). So
one of them is signed and used for a minute; S3 takes a signature for fifteen.

Where S3 refuses a GET because it wants another region or other credentials, botocore is shown the answer as if it had
sent the request itself. It then prepares another one, or raises its error for that answer.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.exceptions import HTTPClientError
from botocore.parsers import ResponseParserError

from modelexpress_core.storage.http import ConnectionPool, Origin, Refusal, Request, exchange
from mx_s3._credentials import RENEWAL_TRIED
from mx_s3._errors import BucketListError
from mx_s3._sending import answer_of, prepared_request

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["IGNORED_ENCODINGS", "S3Requests"]

_SIGNED_SECONDS = 60.0

#: Statuses for which botocore may know another region or other credentials.
_RENEWABLE = frozenset({301, 302, 307, 308, 400, 401, 403})

#: A page of a listing has at most 1000 keys of 1024 bytes, percent-encoded.
_MAX_CONTENT_BYTES = 8 << 20

#: The element that a listing of objects consists of, and how many bytes may come before it.
_LISTING = re.compile(rb"<(?:[A-Za-z0-9]+:)?ListBucketResult\b")
_MAX_PROLOG_BYTES = 4096

#: How an object was uploaded, which some servers store and show.
IGNORED_ENCODINGS = ("aws-chunked",)


@frozen
class _Signed:
    """A GET of one object, without the headers that are not signed.

    Attributes:
        request: The request.
        until: When it is to be prepared again, by the clock.
    """

    request: Request
    until: float


class S3Requests:
    """Prepares the GETs of one bucket's objects (a ``Signer``), and sends its client's other requests. Thread-safe.

    Args:
        client: Prepares and signs.
        bucket: The objects' bucket.
        pool: The connections.
        read_timeout_seconds: How long the other requests wait for the next bytes.
        clock: Seconds.
    """

    def __init__(
        self,
        client: S3Client,
        bucket: str,
        pool: ConnectionPool,
        read_timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._bucket = bucket
        self._pool = pool
        self._read_timeout_seconds = read_timeout_seconds
        self._clock = clock
        self._signed: dict[str, _Signed] = {}
        self._thread = threading.local()
        send: Any = self._send  # the stubs have it that handlers return nothing
        client.meta.events.register("before-send.s3", send)
        client.meta.events.register("request-created.s3.GetObject", self._remember_renewal)

    # -- the GETs of ranges -------------------------------------------------------------------------------------------

    def request(self, path: str, headers: Mapping[str, str]) -> Request:
        """A GET of the key ``path``; its signature may have been used before."""
        signed = self._signed.get(path)
        if signed is None or self._clock() > signed.until:
            signed = self._prepare(path, ())
        return signed.request.with_headers(headers)

    def renewed(self, path: str, headers: Mapping[str, str], refusals: Sequence[Refusal]) -> Request | None:
        """A GET with other credentials or to another region, where botocore knows any.

        Raises:
            ClientError: It does not; this is the refusal as botocore reads it.
        """
        if refusals[-1].status not in _RENEWABLE:
            return None
        self._signed.clear()
        return self._prepare(path, refusals).request.with_headers(headers)

    def _prepare(self, path: str, refusals: Sequence[Refusal]) -> _Signed:
        until = self._clock() + _SIGNED_SECONDS
        conversation = self._thread.conversation = _Conversation(refusals)
        try:
            self._client.get_object(Bucket=self._bucket, Key=path)
        finally:
            self._thread.conversation = None
        if conversation.accepted is None:
            raise HTTPClientError(error="no request was prepared")
        signed = self._signed[path] = _Signed(conversation.accepted, until)
        return signed

    def _remember_renewal(self, request: Any, **_: object) -> None:  # noqa: ANN401 - an AWSRequest
        conversation: _Conversation | None = getattr(self._thread, "conversation", None)
        if conversation is not None and conversation.credentials_were_renewed:
            request.context[RENEWAL_TRIED] = True

    # -- sending for botocore -----------------------------------------------------------------------------------------

    def _send(self, request: AWSPreparedRequest, event_name: str, **_: object) -> AWSResponse:
        """The answer to a request of botocore's."""
        try:
            prepared = prepared_request(request)
        except ValueError as exc:
            raise HTTPClientError(error=exc) from exc
        conversation: _Conversation | None = getattr(self._thread, "conversation", None)
        if conversation is not None and event_name.endswith(".GetObject"):
            return conversation.answer(prepared)
        answer = exchange(
            self._pool,
            prepared,
            read_timeout_seconds=self._read_timeout_seconds,
            max_bytes=_MAX_CONTENT_BYTES,
            ignored_encodings=IGNORED_ENCODINGS,
        )
        if event_name.endswith(".ListObjectsV2") and answer.status < 300:
            _check_listing(answer.content)
        return answer_of(request.url, answer.status, answer.headers, answer.content)


def _check_listing(content: bytes) -> None:
    """Refuse what botocore would read as a listing without objects: it passes over elements that it does not expect."""
    if _LISTING.search(content, 0, _MAX_PROLOG_BYTES):
        return
    if b"<ListAllMyBucketsResult" in content[:_MAX_PROLOG_BYTES]:
        raise BucketListError
    raise ResponseParserError("the answer is no listing")


class _Conversation:
    """Stands for S3 while botocore prepares a GET: refuses what S3 refused, and accepts anything else.

    Args:
        refusals: S3's answers to this read so far.

    Attributes:
        accepted: The request that S3 has not refused.
    """

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        self._refusals = refusals
        self.accepted: Request | None = None

    @property
    def credentials_were_renewed(self) -> bool:
        """This read was refused with more than one credential."""
        return len({_credential(refusal.request) for refusal in self._refusals}) > 1

    def answer(self, request: Request) -> AWSResponse:
        url = f"{request.origin}{request.target}"
        if self._refusals and _signing(request) == _signing(self._refusals[-1].request):
            refusal = self._refusals[-1]
            return answer_of(url, refusal.status, refusal.headers, refusal.content)
        self.accepted = request
        return answer_of(url, 200, {}, b"")


def _signing(request: Request) -> tuple[Origin, str, str, str]:
    """What S3 judges a request by: two requests with the same are refused for the same reason."""
    authorization = dict(request.headers).get("Authorization", "")
    # Credential=<access key>/<date>/<region>/s3/aws4_request
    scope = authorization.partition("Credential=")[2].partition(",")[0].split("/")
    return request.origin, request.target, "/".join(scope[2:]), _credential(request)


def _credential(request: Request) -> str:
    """The access key and the token that a request is signed with."""
    headers = {name.lower(): value for name, value in request.headers}
    key = headers.get("authorization", "").partition("Credential=")[2].partition("/")[0]
    return f"{key} {headers.get('x-amz-security-token', '')}"
