"""Reading byte ranges of objects over HTTP straight into the caller's memory, with every answer checked."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from attrs import frozen

from modelexpress_core.errors import SourceChangedError, UnavailableError, UnsupportedError
from modelexpress_core.messages import byte_range
from modelexpress_core.storage.http.answers import Answer
from modelexpress_core.storage.http.connections import ConnectionPool
from modelexpress_core.storage.http.failures import EncodedAnswerError, Failures, Meaning
from modelexpress_core.storage.http.requests import Refusal, Request, Signer

__all__ = ["CONTENT_ENCODING", "RangeReader", "VersionHeaders", "check_encoding"]

#: The header that says how a content is encoded (RFC 9110 section 8.4).
CONTENT_ENCODING = "content-encoding"

#: What is read of an answer that does not hold what was asked for.
_MAX_ERROR_BYTES = 1 << 20

#: Another place and other credentials may both be needed, one after the other.
_MAX_RENEWALS = 3

#: RFC 9110 section 14.4.
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")

_NO_VERSION = "the server, or a proxy before it, leaves the header out; bytes of two versions could be mixed"

#: Some servers answer a range that begins at the end with an empty one, in place of 416.
_ENDS_BEFORE = Meaning(
    SourceChangedError,
    "the object is shorter than when the load began, or than its header says",
    "start the load again when nothing writes to the model",
)

_OTHER_BYTES = "the server, or a proxy before it, does not honour Range requests"

_CHANGED = Meaning(
    SourceChangedError,
    "something replaced the object since the load began",
    "start the load again when nothing writes to the model",
)

_CLOSED = Meaning(
    UnavailableError,
    "the server, a proxy or the network dropped the connection",
    "try again; if it stays, check the server, the proxy and the network",
)


@frozen
class VersionHeaders:
    """The headers that carry an object's version.

    Attributes:
        condition: In a request: the version that is expected. The signer gets it with the other headers.
        answered: In an answer: the version that it is of; in lower case. None if answers do not have it: the signer
            then prepares requests to URLs that have the bytes of one version and no other.
    """

    condition: str = "If-Match"
    answered: str | None = "etag"


def check_encoding(
    headers: Mapping[str, str], ignored: Collection[str] = (), names: Collection[str] = (CONTENT_ENCODING,)
) -> None:
    """Refuse an answer whose content is encoded: every request says that it accepts no encoding.

    Args:
        headers: Of the answer, by lower-case name.
        ignored: Codings that a service shows although the content is not encoded, in lower case.
        names: The headers that say so, in lower case. A service that decodes objects on the way has one of its own.

    Raises:
        EncodedAnswerError: It is encoded.
    """
    for name in names:
        value = headers.get(name, "")
        codings = {coding.strip().lower() for coding in value.split(",")}
        if codings - {"", "identity", *ignored}:
            raise EncodedAnswerError(value)


class RangeReader:
    """Reads ranges for one storage: one request per call, and one more where the first was refused for its signature.

    Args:
        pool: The connections.
        signer: Prepares the requests.
        failures: Explains what goes wrong.
        read_timeout_seconds: What ``patience_seconds`` begins with, and its bound.
        versions: The headers that carry an object's version.
        ignored_encodings: Codings that the service shows although the content is not encoded. An answer with any other
            holds other bytes than the object.
        encoding_headers: The headers that say how the content, or the object, is encoded; in lower case.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        signer: Signer,
        failures: Failures,
        *,
        read_timeout_seconds: float,
        versions: VersionHeaders | None = None,
        ignored_encodings: Collection[str] = (),
        encoding_headers: Collection[str] = (CONTENT_ENCODING,),
    ) -> None:
        self._pool = pool
        self._signer = signer
        self._failures = failures
        self._read_timeout_seconds = read_timeout_seconds
        self._patience_seconds = read_timeout_seconds
        self._versions = versions or VersionHeaders()
        self._ignored_encodings = ignored_encodings
        self._encoding_headers = encoding_headers
        check = failures.names.check_server
        self._ignores_range = Meaning(UnsupportedError, _OTHER_BYTES, check)
        self._hides_version = Meaning(UnsupportedError, _NO_VERSION, check)

    @property
    def patience_seconds(self) -> float:
        """How long a read waits for its next bytes; at most, and to begin with, the read timeout."""
        return self._patience_seconds

    @patience_seconds.setter
    def patience_seconds(self, seconds: float) -> None:
        self._patience_seconds = min(seconds, self._read_timeout_seconds)

    def _patience(self) -> float:
        return self._patience_seconds

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        """Read into ``buffer``, as ``Storage.read_into`` does.

        Raises:
            BackendError: As there; UnsupportedError where the answer holds other bytes than were asked for.
        """
        operation = f"read {byte_range(offset, len(buffer))}"
        failures = self._failures
        failures.check_open(path, operation)
        headers = {"Range": f"bytes={offset}-{offset + len(buffer) - 1}"}
        if version is not None:
            headers[self._versions.condition] = version
        try:
            with self._answer(path, headers, operation) as answer:
                expected = self._check(answer, path, offset, len(buffer), version)
                done = answer.read_into(buffer[:expected])
        except failures.caught as exc:
            raise failures.of_exception(exc, path, operation, self._patience_seconds) from exc
        failures.check_open(path, operation)
        if not done:
            reason = "the connection was closed before the first byte"
            raise failures.described(_CLOSED, reason, path, operation)
        return done

    def _answer(self, path: str, headers: Mapping[str, str], operation: str) -> Answer:
        """The answer that holds a part of the object, or the whole of it."""
        request = self._signer.request(path, headers)
        refusals: list[Refusal] = []
        while True:
            answer = self._pool.send(request, self._patience)
            if answer.status in {200, 206}:
                return answer
            refusals.append(_refusal(request, answer))
            renewed = self._signer.renewed(path, headers, refusals) if len(refusals) <= _MAX_RENEWALS else None
            if renewed is None:
                raise self._failures.of_answer(refusals[-1], path, operation)
            request = renewed

    def _check(self, answer: Answer, path: str, offset: int, length: int, version: str | None) -> int:
        """How many bytes of what was asked for the content holds, beginning with the first.

        Not every server (or cache before one) honours ``Range`` and the condition; wrong bytes must never pass.
        """
        operation = f"read {byte_range(offset, length)}"
        headers = answer.headers
        if version is not None and self._versions.answered is not None:
            answered = headers.get(self._versions.answered)
            if answered is None:
                reason = f"the answer does not tell its version: it has no header {self._versions.answered}"
                raise self._failures.described(self._hides_version, reason, path, operation)
            if answered != version:
                reason = f"the answer is of another version, {answered}, and {self._versions.condition} was ignored"
                raise self._failures.described(_CHANGED, reason, path, operation)
        check_encoding(headers, self._ignored_encodings, self._encoding_headers)
        if answer.status == 200 and offset == 0:
            return length
        content_range = headers.get("content-range", "")
        match = _CONTENT_RANGE.fullmatch(content_range) if answer.status == 206 else None
        if match is not None and match[3] == match[1] == str(offset) == str(int(match[2]) + 1):
            reason = f"the answer holds no bytes: {content_range}"
            raise self._failures.described(_ENDS_BEFORE, reason, path, operation)
        if match is None or int(match[1]) != offset or int(match[2]) < offset:
            reason = f"the answer holds other bytes: {content_range[:80] or 'the whole object'}"
            raise self._failures.described(self._ignores_range, reason, path, operation)
        return min(length, int(match[2]) + 1 - offset)


def _refusal(request: Request, answer: Answer) -> Refusal:
    with answer:
        content = answer.read(_MAX_ERROR_BYTES)
    return Refusal(request, answer.status, answer.reason, answer.headers, content)
