"""The services of the model cache on a server that has none."""

from __future__ import annotations

from typing import Any

import grpc

from modelexpress_core.wire.rpc import CACHE, MODEL, RpcContext, handler

__all__ = ["make_cache", "make_models"]

_REASON = "this server has no cache: start it with --cache-dir"


class _NoCache:
    """Answers every call with FAILED_PRECONDITION."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any method of a service
        if name.startswith("_"):
            raise AttributeError(name)
        return self._refuse

    @staticmethod
    async def _refuse(_: object, context: RpcContext) -> None:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, _REASON)


def make_cache() -> grpc.GenericRpcHandler[Any, Any]:
    """The handler of ``CacheService``."""
    return handler(CACHE, _NoCache())


def make_models() -> grpc.GenericRpcHandler[Any, Any]:
    """The handler of ``ModelService``."""
    return handler(MODEL, _NoCache())
