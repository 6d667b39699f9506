"""Metrics of each call, and a status for each exception."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from modelexpress_core.contracts.metadata_store import StoreUnavailableError, UnreadableRecordError
from modelexpress_core.server.deadlines import begin_call
from modelexpress_core.server.metrics import ServerMetrics
from modelexpress_core.wire.interception import CallScope, Interceptor, status_of
from modelexpress_core.wire.rpc import STANDARD_HEALTH, RpcContext

__all__ = ["MetricsInterceptor"]

_log = logging.getLogger(__name__)

_WATCH = STANDARD_HEALTH.path("Watch")


class MetricsInterceptor(Interceptor):
    """Counts calls by their status, and turns exceptions into statuses.

    They are UNAVAILABLE for a store that does not answer, NOT_FOUND for a damaged record, and else INTERNAL.

    Args:
        metrics: Metrics of the server.
    """

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    def scope(self, details: grpc.HandlerCallDetails) -> CallScope | None:
        """Counts the call, and answers exceptions."""
        path = details.method
        if path == _WATCH:  # it lasts until the client or the server ends
            return None

        @contextlib.asynccontextmanager
        async def measured(context: RpcContext) -> AsyncIterator[None]:
            begun = time.perf_counter()
            raised: BaseException | None = None
            begin_call(context.time_remaining())
            try:
                yield
            except (grpc.aio.AbortError, asyncio.CancelledError) as exc:
                raised = exc
                raise
            except StoreUnavailableError as exc:
                await context.abort(grpc.StatusCode.UNAVAILABLE, f"the metadata store does not answer: {exc}")
            except UnreadableRecordError as exc:
                await context.abort(grpc.StatusCode.NOT_FOUND, f"{exc}; its worker has to publish it again")
            except Exception:  # noqa: BLE001 - logged, and answered with a status
                _log.exception("%s failed", path)
                await context.abort(grpc.StatusCode.INTERNAL, "the server failed; its log says why")
            finally:
                self._metrics.answered(path, status_of(context, raised).name, time.perf_counter() - begun)

        return measured
