"""Running the program in ``credential_process`` of a profile, for a bounded time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["CredentialProgramError", "program_starter"]


class CredentialProgramError(Exception):
    """The program gave no credentials. The text says why, without what the program printed."""


def program_starter(timeout_seconds: float) -> Callable[..., Any]:
    """Return a replacement of ``subprocess.Popen``, which botocore calls to run the program and to read its output.

    botocore itself waits without end, and passes on what the program prints to its standard error.

    Args:
        timeout_seconds: How long the program may run; it is killed then.
    """

    class Program(subprocess.Popen[bytes]):
        def communicate(self, _input: bytes | None = None, _timeout: float | None = None) -> tuple[bytes, bytes]:
            try:
                output, errors = super().communicate(timeout=timeout_seconds)
            except subprocess.TimeoutExpired:
                self.kill()
                # A child of the program may hold the pipes open, so their end is not awaited.
                for pipe in (self.stdout, self.stderr):
                    if pipe is not None:
                        pipe.close()
                self.wait()
                raise CredentialProgramError(f"it ran for more than {timeout_seconds:g} s") from None
            if self.returncode:
                raise CredentialProgramError(f"it ended with the status {self.returncode}")
            if not _is_object(output):
                raise CredentialProgramError("it did not print a JSON object")
            return output, errors

    def start(command: Sequence[str], **options: Any) -> Program:  # noqa: ANN401 - those of Popen
        try:
            return Program(command, stdin=subprocess.DEVNULL, **options)
        except OSError as exc:
            raise CredentialProgramError(f"it cannot be started: {command[0]} [{type(exc).__name__}]") from None

    return start


def _is_object(output: bytes) -> bool:
    try:
        return isinstance(json.loads(output), dict)
    except (ValueError, RecursionError):
        return False
