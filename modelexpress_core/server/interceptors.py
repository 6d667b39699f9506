"""What happens around each call: it is counted, and a store that cannot be asked is told as that."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from modelexpress_core.server.metrics import ServerMetrics
from modelexpress_core.server.stores import StoreUnavailableError

__all__ = ["Observed"]

_log = logging.getLogger(__name__)

_NAMES = {status.value[0]: status.name for status in grpc.StatusCode}


class Observed(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # it is generic in the annotations alone
    """Counts calls by their code, and answers what nobody expected with one that says so.

    Args:
        metrics: Where they are counted.
    """

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """The handler of a call, within ours."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:  # unknown, or a watch, which lasts as long as it is wanted
            return handler
        path = handler_call_details.method
        answer: Any = handler.unary_unary  # a coroutine here, whatever the annotations say

        async def observed(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: ANN401 - any message
            begun = time.perf_counter()
            try:
                return await answer(request, context)
            except StoreUnavailableError as exc:
                await context.abort(grpc.StatusCode.UNAVAILABLE, f"the metadata store cannot be asked: {exc}")
            except grpc.aio.AbortError:
                raise
            except Exception:  # noqa: BLE001 - logged, and told as a status
                _log.exception("%s failed", path)
                await context.abort(grpc.StatusCode.INTERNAL, "the server failed; its log says why")
            finally:
                self._metrics.answered(path, _name(context.code()), time.perf_counter() - begun)

        return grpc.unary_unary_rpc_method_handler(observed, handler.request_deserializer, handler.response_serializer)


def _name(code: Any) -> str:  # noqa: ANN401 - a number, or what it stands for
    """Name of a status: of its number, as gRPC tells it, or of the status itself."""
    return _NAMES[getattr(code, "value", (code or 0,))[0]]
