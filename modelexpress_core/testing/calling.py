"""Calls of what a contract tests, with a limit in time, so that a call that hangs is a failure with a message."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import ClassVar, TypeVar

from modelexpress_core.errors import BackendError
from modelexpress_core.testing.contract import Contract, violated

__all__ = ["CallingContract"]

_T = TypeVar("_T")


class CallingContract(Contract, contract=True):
    """A contract whose tests call what may hang.

    Attributes:
        hang_seconds: How long one call may take before it counts as hanging.
    """

    hang_seconds: ClassVar[float] = 30.0

    def _soon(self, what: str, function: Callable[[], _T]) -> _T:
        """Call ``function``; fail if it does not return or raise in time."""
        (result,) = self._in_threads(1, lambda _: function(), what=what)
        return result

    def _failing(self, what: str, function: Callable[[], object]) -> BackendError:
        """Return the BackendError that ``function`` raises; fail if it raises none in time."""
        try:
            result = self._soon(what, function)
        except BackendError as exc:
            return exc
        except AssertionError:
            raise
        except Exception as exc:
            message = f"{what} raised {type(exc).__name__}, not BackendError: translate it with `raise ... from`"
            raise AssertionError(message) from exc
        message = f"{what} should fail, but returned {result!r}"
        raise AssertionError(message)

    def _in_threads(
        self,
        number: int,
        function: Callable[[int], _T],
        *,
        meanwhile: Callable[[], object] | None = None,
        what: str = "a call",
    ) -> list[_T]:
        """Call ``function`` in ``number`` threads, and return the results; raise the first error if there is one."""
        results: list[_T] = []
        errors: list[BaseException] = []

        def run(index: int) -> None:
            try:
                results.append(function(index))
            except BaseException as exc:  # noqa: BLE001 - raised below
                errors.append(exc)

        threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(number)]
        for thread in threads:
            thread.start()
        try:
            if meanwhile is not None:
                meanwhile()
        finally:
            end = time.monotonic() + self.hang_seconds
            for thread in threads:
                thread.join(max(end - time.monotonic(), 0.0))
        if errors:
            raise errors[0]
        if any(thread.is_alive() for thread in threads):
            violated(f"{what} did not return within {self.hang_seconds:g} s (hang_seconds)")
        return results
