"""What went wrong when the engine failed: it says a few words for every failure, so the regular plugin is asked."""

from __future__ import annotations

import copy

from modelexpress_core.contracts.storage import ObjectInfo, ReadRequest, Storage
from modelexpress_core.errors import BackendError, SourceChangedError, UnsupportedError
from modelexpress_core.messages import byte_range, printable
from modelexpress_core.uri import ModelURI

__all__ = ["PROVIDER", "Failures", "closed"]

PROVIDER = "mx-streamer"


def closed() -> BackendError:
    """The error of calls after ``close``."""
    return BackendError("the storage was closed", operation="read", provider=PROVIDER)


class Failures:
    """The errors of the requests of one batch. Asks the regular plugin once for each object.

    Args:
        regular: The storage of the regular plugin.
        uri: Any URI of the storage.
    """

    def __init__(self, regular: Storage, uri: ModelURI) -> None:
        self._regular = regular
        self._uri = uri
        self._found: dict[str, ObjectInfo | BackendError] = {}
        self._read: dict[tuple[str, str | None], BackendError | None] = {}

    def of_path(self, request: ReadRequest, reason: str) -> BackendError:
        """The error of ``request``, whose path the engine cannot take."""
        hint = "rename the object, or take mx-streamer out of MX_PREFER"
        return self._named(UnsupportedError(reason, provider=PROVIDER, hint=hint), request)

    def of_read(self, request: ReadRequest, said: str) -> BackendError:
        """The error of ``request``, which the engine did not read; ``said`` are its words."""
        error = self.of_version(request) or self._of_one_byte(request)
        if error is None:
            error = BackendError(
                f"the engine of runai-model-streamer said {printable(said)!r}, and the regular plugin finds no fault",
                provider=PROVIDER,
                retryable=True,
                cause="the fault has passed, or only the engine has it",
                hint="RUNAI_STREAMER_LOG_TO_STDERR=1 shows its log; without mx-streamer in MX_PREFER it is not used",
            )
        return self._named(error, request)

    def of_version(self, request: ReadRequest) -> BackendError | None:
        """Why the object of ``request`` has no such bytes of this version now; None if it has them."""
        found = self._stat(request.path)
        if isinstance(found, BackendError):
            return self._named(found, request)
        reason = ""
        if request.version is not None and found.version != request.version:
            reason = "the object was changed or replaced since the load began"
        elif found.size < request.offset + len(request.buffer):
            reason = f"it has {found.size} bytes, and the read ends at byte {request.offset + len(request.buffer)}"
        if not reason:
            return None
        cause, hint = "a program writes to the model", "start the load again when nothing writes to it"
        return self._named(SourceChangedError(reason, provider=PROVIDER, cause=cause, hint=hint), request)

    def _stat(self, path: str) -> ObjectInfo | BackendError:
        if path not in self._found:
            try:
                self._found[path] = self._regular.stat(path)
            except BackendError as exc:
                self._found[path] = exc
        return self._found[path]

    def _of_one_byte(self, request: ReadRequest) -> BackendError | None:
        """The error of the regular plugin when it reads the first byte of ``request``; None if it reads it."""
        key = (request.path, request.version)
        if key not in self._read:
            self._read[key] = None
            one = memoryview(bytearray(1))
            try:
                self._regular.read_into(request.path, request.offset, one, version=request.version)
            except BackendError as exc:
                self._read[key] = exc
        return self._read[key]

    def _named(self, error: BackendError, request: ReadRequest) -> BackendError:
        """A copy of ``error`` that names ``request``."""
        named = copy.copy(error)
        named.uri = str(self._uri.with_path(request.path))
        named.operation = f"read {byte_range(request.offset, len(request.buffer))}"
        named.__cause__ = error
        return named
