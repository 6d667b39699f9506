"""A line in the log for each call."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from modelexpress_core.wire.around import Around, Context, Interceptor, status_of

__all__ = ["LoggedCalls"]

_log = logging.getLogger(__name__)


class LoggedCalls(Interceptor):
    """Logs each call at its end: service, method, status, seconds and who called; at level debug.

    Neither messages nor metadata, which hold tokens, are logged.
    """

    def around(self, details: grpc.HandlerCallDetails) -> Around | None:
        """The line, where there is to be one."""
        if not _log.isEnabledFor(logging.DEBUG):
            return None
        service, _, method = details.method.lstrip("/").partition("/")

        @contextlib.asynccontextmanager
        async def logged(context: Context) -> AsyncIterator[None]:
            begun = time.perf_counter()
            raised: BaseException | None = None
            try:
                yield
            except BaseException as exc:
                raised = exc
                raise
            finally:
                _ended(service, method, status_of(context, raised), time.perf_counter() - begun, context.peer())

        return logged

    def unknown(self, details: grpc.HandlerCallDetails) -> None:
        """It has a line, too."""
        service, _, method = details.method.lstrip("/").partition("/")
        _ended(service, method, grpc.StatusCode.UNIMPLEMENTED, 0.0, "")


def _shown(text: str) -> str:
    """``text`` without what would begin another line, or move the cursor of a terminal: callers choose it."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _ended(service: str, method: str, code: grpc.StatusCode, seconds: float, peer: str) -> None:
    service, method = _shown(service), _shown(method)
    fields = {"service": service, "method": method, "code": code.name, "seconds": round(seconds, 6), "peer": peer}
    _log.debug("%s/%s: %s in %.6f s, for %s", service, method, code.name, seconds, peer or "?", extra=fields)
