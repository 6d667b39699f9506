"""What happens around each call: it is counted, and a store that cannot be asked is told as that."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from modelexpress_core.contracts.metadata_store import StoreUnavailableError
from modelexpress_core.server.metrics import ServerMetrics
from modelexpress_core.wire.around import Around, Context, Interceptor, status_of
from modelexpress_core.wire.rpc import STANDARD_HEALTH

__all__ = ["Observed"]

_log = logging.getLogger(__name__)

_WATCH = STANDARD_HEALTH.path("Watch")


class Observed(Interceptor):
    """Counts calls by their code, and answers what nobody expected with one that says so.

    Args:
        metrics: Where they are counted.
    """

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    def around(self, details: grpc.HandlerCallDetails) -> Around | None:
        """Counting, and answering."""
        path = details.method
        if path == _WATCH:  # it lasts as long as it is wanted
            return None

        @contextlib.asynccontextmanager
        async def observed(context: Context) -> AsyncIterator[None]:
            begun = time.perf_counter()
            raised: BaseException | None = None
            try:
                yield
            except (grpc.aio.AbortError, asyncio.CancelledError) as exc:
                raised = exc
                raise
            except StoreUnavailableError as exc:
                await context.abort(grpc.StatusCode.UNAVAILABLE, f"the metadata store cannot be asked: {exc}")
            except Exception:  # noqa: BLE001 - logged, and told as a status
                _log.exception("%s failed", path)
                await context.abort(grpc.StatusCode.INTERNAL, "the server failed; its log says why")
            finally:
                self._metrics.answered(path, status_of(context, raised).name, time.perf_counter() - begun)

        return observed
