"""GETs of ranges that differ in nothing but the range: signed once per object, not once per request.

For each request botocore checks its parameters, resolves the endpoint, signs and parses: one to three milliseconds of
Python, which is as much as the network takes for megabytes. What the requests for one object have in common (URL,
signature, token) is prepared by botocore once and used for a minute; S3 takes a signature for fifteen. The headers in
which they differ (Range, If-Match) are not signed: S3 asks for a signature of Host and of what begins with x-amz-, says
https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html.

Where S3 wants another region, or other credentials, botocore is asked to send the request itself: it knows what to do.
The same goes until it has got an answer for the first time.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.exceptions import ClientError
from botocore.parsers import create_parser

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["RangeRequests"]

_SIGNED_SECONDS = 60.0

#: What botocore may make good by another region, or other credentials.
_BOTOCORE_KNOWS = frozenset({301, 302, 307, 308, 400, 401, 403})


@frozen
class _Signed:
    """What the GETs of one object have in common."""

    url: str
    headers: Mapping[str, Any]
    until: float


class RangeRequests:
    """Sends GETs for objects of one bucket. Thread-safe.

    Args:
        client: Prepares and signs them, and has the connections.
        bucket: Where the objects lie.
        clock: Seconds.
    """

    def __init__(self, client: S3Client, bucket: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._bucket = bucket
        self._clock = clock
        self._signed: dict[str, _Signed] = {}
        self._proven = False
        self._preparing = threading.local()
        # botocore has no public way to its connections; without them every request is sent by botocore.
        self._session: Any = getattr(getattr(client, "_endpoint", None), "http_session", None)
        self._shape: Any = client.meta.service_model.operation_model("GetObject").output_shape
        keep: Any = self._keep  # the stubs have it that handlers return nothing
        client.meta.events.register("before-send.s3.GetObject", keep)
        client.meta.events.register("after-call.s3", self._answered)

    def send(self, key: str, headers: Mapping[str, str]) -> AWSResponse | None:
        """The answer to a GET of ``key`` with ``headers``, its content not read yet; None where botocore is to ask.

        Raises:
            Exception: As the client's own requests.
        """
        if self._session is None or not self._proven:
            return None
        signed = self._signed.get(key)
        if signed is None or self._clock() > signed.until:
            signed = self._signed[key] = self._sign(key)
        both: Any = {**signed.headers, **headers}
        request = AWSPreparedRequest("GET", signed.url, both, None, stream_output=True)
        response: AWSResponse = self._session.send(request)
        if response.status_code in {200, 206}:
            return response
        try:
            content = response.content  # to its end, so that the connection can be used again
        finally:
            response.raw.close()
        if response.status_code in _BOTOCORE_KNOWS:
            self._signed.clear()
            return None
        answer = {"status_code": response.status_code, "headers": response.headers, "body": content}
        raise ClientError(create_parser("rest-xml").parse(answer, self._shape), "GetObject")

    def _sign(self, key: str) -> _Signed:
        until = self._clock() + _SIGNED_SECONDS
        preparing = self._preparing
        preparing.request = None
        preparing.under_way = True
        try:
            self._client.get_object(Bucket=self._bucket, Key=key)
        finally:
            preparing.under_way = False
        request: AWSPreparedRequest = preparing.request
        return _Signed(request.url, dict(request.headers), until)

    def _answered(self, http_response: AWSResponse, **_: object) -> None:
        self._proven = self._proven or http_response.status_code < 300

    def _keep(self, request: AWSPreparedRequest, **_: object) -> AWSResponse | None:
        """Keep a request that this thread prepares, which is not sent: an empty answer stands for S3's."""
        if not getattr(self._preparing, "under_way", False):
            return None
        self._preparing.request = request
        nothing: Any = {}
        return AWSResponse(request.url, 200, nothing, io.BytesIO())
