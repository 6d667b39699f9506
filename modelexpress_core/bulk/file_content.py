"""Files as a bulk server sends them: from the system's cache to the socket, also while they arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from modelexpress_core.bulk.output import PIECE_BYTES, Output
from modelexpress_core.bulk.requests import Run
from modelexpress_core.storage.file_runs import fill, fill_runs

__all__ = ["ArrivingFile", "FileContent"]

#: Pieces of this length are sent one by one; shorter ones are gathered in memory first.
_LONG_BYTES = 32 << 10


class ArrivingFile(Protocol):
    """An open file, of which some bytes may not be there yet."""

    @property
    def descriptor(self) -> int:
        """Open for reading."""
        ...

    def wait(self, start: int, end: int, seconds: float) -> bool:
        """Wait until the bytes from ``start`` to ``end`` are there, and return whether they are.

        Raises:
            ModelExpressError: They cannot arrive.
        """
        ...

    def close(self) -> None:
        """Close it."""
        ...


class FileContent:
    """The bytes of a file. It is opened with the first of them that is sent.

    Args:
        nbytes: How many bytes there are.
        open_file: Opens the file; None if it does not exist within some seconds, because it is still to arrive.
        close: Called at the end.
        present_bytes: How many bytes have arrived, of all files that belong together.

    Attributes:
        nbytes: As above.
    """

    def __init__(
        self,
        nbytes: int,
        open_file: Callable[[float], ArrivingFile | None],
        *,
        close: Callable[[], None],
        present_bytes: Callable[[], int],
    ) -> None:
        self.nbytes = nbytes
        self._open_file = open_file
        self._close = close
        self._present_bytes = present_bytes
        self._opened: ArrivingFile | None = None

    def send(self, output: Output, run: Run) -> None:
        """Send ranges as they are, and short pieces gathered."""
        file = self._file(output)
        if run.count > 1 and run.length < _LONG_BYTES:
            self._send_gathered(output, file, run)
            return
        for number in range(run.count):
            start = run.offset + number * run.stride
            self._send_range(output, file, start, start + run.length)

    def _send_range(self, output: Output, file: ArrivingFile, start: int, end: int) -> None:
        for at in range(start, end, PIECE_BYTES):
            stop = min(at + PIECE_BYTES, end)
            self._wait(output, file, at, stop)
            if output.sends_files:
                output.write_file(file.descriptor, at, stop - at)
                continue
            buffer = output.buffer
            for position in range(at, stop, len(buffer)):
                part = buffer[: min(len(buffer), stop - position)]
                _check_length(fill(file.descriptor, part, position), len(part))
                output.write(part)

    def _send_gathered(self, output: Output, file: ArrivingFile, run: Run) -> None:
        buffer = output.buffer
        at_once = len(buffer) // run.length
        for first in range(0, run.count, at_once):
            count, start = min(at_once, run.count - first), run.offset + first * run.stride
            self._wait(output, file, start, start + (count - 1) * run.stride + run.length)
            part = buffer[: count * run.length]
            _check_length(fill_runs(file.descriptor, part, start, run.length, run.stride), len(part))
            output.write(part)

    def _file(self, output: Output) -> ArrivingFile:
        if self._opened is None:
            output.wait(self._has_opened, self._present_bytes)
        assert self._opened is not None  # noqa: S101 - for the type checker: it was waited for
        return self._opened

    def _has_opened(self, seconds: float) -> bool:
        self._opened = self._open_file(seconds)
        return self._opened is not None

    def _wait(self, output: Output, file: ArrivingFile, start: int, end: int) -> None:
        output.wait(lambda seconds: file.wait(start, end, seconds), self._present_bytes)

    def close(self) -> None:
        """Close the file."""
        try:
            if self._opened is not None:
                self._opened.close()
        finally:
            self._close()


def _check_length(read: int, wanted: int) -> None:
    if read != wanted:
        message = "the file ends before the bytes that were asked for"
        raise ConnectionAbortedError(message)
