"""The native library of runai-model-streamer: an engine, which reads ranges straight into the memory of others.

The functions of its Python package that wrap the native ones are used as they are, because they check what they pass
on. Its classes above them are not used: they read into memory of their own.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen
from runai_model_streamer.libstreamer import libstreamer as native
from runai_model_streamer.s3_utils.s3_utils import S3Credentials

from modelexpress_core.errors import BackendError, UnsupportedError
from mx_streamer._errors import PROVIDER, closed

__all__ = ["Engine", "Extent", "check_part"]

#: How often a thread that waits for the engine looks whether the storage was closed.
_CLOSED_CHECK_MS = 100

#: Files of the parts of the native library for object stores, by the package that holds each.
_PARTS = {
    "runai_model_streamer_azure": "libstreamerazure.so",
    "runai_model_streamer_gcs": "libstreamergcs.so",
    "runai_model_streamer_s3": "libstreamers3.so",
}

_parts_lock = threading.Lock()
_parts_used: set[str] = set()


def check_part(part: str) -> None:
    """Return if this process has read from no other kind of object store with the native library than that of ``part``.

    The library keeps the first part that a process needs, and sends reads of all schemes to it: it would look for the
    objects of one store in another one. Code beside this plugin may have loaded a part, too.

    Raises:
        UnsupportedError: It has.
    """
    others = {name for name in _PARTS if name != part}
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # the parts that this plugin has used are known in any case
        mapped = ""
    used = sorted(name for name in others if name in _parts_used or f"/{_PARTS[name]}" in mapped)
    if used:
        reason = (
            f"the engine of runai-model-streamer reads one kind of object store in a process, and has used {used[0]}"
        )
        hint = "name only one of s3, gs and az with mx-streamer in MX_PREFER, or load in a process of its own"
        raise UnsupportedError(reason, operation="start the engine", provider=PROVIDER, hint=hint)


@frozen
class Extent:
    """One range to read.

    Attributes:
        path: Path or URI, as the engine takes it.
        offset: First byte.
        memory: Where the bytes go.
    """

    path: str
    offset: int
    memory: memoryview


class Engine:
    """One engine with its own threads and connections. Used by one thread at a time.

    Args:
        part: The package with the part of the native library for the store; None for files.
        endpoint: URL of the S3 server; None for files and other stores.

    Raises:
        UnsupportedError: This process has read another kind of object store.
    """

    def __init__(self, part: str | None = None, endpoint: str | None = None) -> None:
        if part is not None:
            with _parts_lock:
                check_part(part)
                _parts_used.add(part)
        with _refusals("start"):
            self._streamer = native.runai_start()
        if endpoint is not None:
            try:
                with _refusals("use the endpoint"):
                    native.runai_set_credentials(self._streamer, S3Credentials(endpoint=endpoint))
            except BaseException:
                self.end()
                raise

    def read(self, extents: Sequence[Extent], closing: threading.Event) -> list[str | None]:
        """Read all ``extents``; returns for each of them what the engine said, or None if all its bytes are in place.

        If anything else than success is returned or raised, the engine may still write: ``end`` it before the memory is
        used.

        Raises:
            BackendError: ``closing`` was set.
        """
        by_path: dict[str, list[int]] = {}
        for index in sorted(range(len(extents)), key=lambda index: extents[index].offset):
            by_path.setdefault(extents[index].path, []).append(index)
        order = [index for indexes in by_path.values() for index in indexes]
        with _refusals("read"):
            native.runai_request(
                self._streamer,
                list(by_path),
                [len(indexes) for indexes in by_path.values()],
                [extents[index].offset for index in order],
                [len(extents[index].memory) for index in order],
                [_address(extents[index].memory) for index in order],
            )
        results: list[str | None] = ["no answer"] * len(extents)
        files = list(by_path.values())
        done = False
        while not done:
            if closing.is_set():
                raise closed()
            try:
                response = native.runai_response(self._streamer, _CLOSED_CHECK_MS)
            except TimeoutError:
                continue
            if response is None:  # the engine ended: by itself, or because the storage was closed
                if closing.is_set():
                    raise closed()
                break
            code, _, file, position, done = response
            said = native.runai_response_str(code)
            results[files[file][position]] = (
                None if code == native.SUCCESS_ERROR_CODE else said.decode(errors="replace")
            )
        return results

    def end(self) -> None:
        """End the engine, and wait until it writes to no memory any more."""
        native.runai_end(self._streamer)


@contextmanager
def _refusals(operation: str) -> Iterator[None]:
    """Turn errors of calls that the engine refuses into our own."""
    try:
        yield
    except ValueError as exc:
        raise BackendError(
            f"the engine of runai-model-streamer refuses: {exc}",
            operation=operation,
            provider=PROVIDER,
            hint="RUNAI_STREAMER_LOG_TO_STDERR=1 shows its log; without mx-streamer in MX_PREFER it is not used",
        ) from exc


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
