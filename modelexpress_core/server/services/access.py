"""``AccessService``: gives readers the grants that workers verify."""

from __future__ import annotations

from typing import Any

import grpc

from modelexpress_core.contracts.metadata_store import MetadataStore
from modelexpress_core.contracts.rights import READ, Rights
from modelexpress_core.contracts.service import ServiceContext
from modelexpress_core.server.clock import now_ms
from modelexpress_core.server.services.authorization import require_right
from modelexpress_core.settings import from_env
from modelexpress_core.wire.authentication import caller
from modelexpress_core.wire.grants import GRANT_SECONDS, ReadGrant, sign_grant
from modelexpress_core.wire.proto.modelexpress import access_pb2
from modelexpress_core.wire.rpc import ACCESS, RpcContext, handler
from modelexpress_core.wire.settings import AuthSettings

__all__ = ["AccessService", "make_access"]

_Code = grpc.StatusCode


def make_access(context: ServiceContext) -> grpc.GenericRpcHandler[Any, Any]:
    """The handler of ``AccessService``."""
    return handler(ACCESS, AccessService(context.store, from_env(AuthSettings, context.settings).rights))


class AccessService:
    """Signs read grants with the keys that workers got when they published.

    Args:
        store: The store of sources.
        rights: What callers may read.
    """

    def __init__(self, store: MetadataStore, rights: Rights) -> None:
        self._store = store
        self._rights = rights

    async def get_read_grant(
        self, request: access_pb2.GetReadGrantRequest, context: RpcContext
    ) -> access_pb2.GetReadGrantResponse:
        """Sign a grant for the caller, one source and one worker."""
        reader = caller.get()
        if not reader:
            await context.abort(_Code.FAILED_PRECONDITION, "the server authenticates no callers, so it grants nothing")
        source = await self._store.get(request.mx_source_id, request.worker_id)
        if source is None:
            reason = f"unknown worker {request.worker_id!r} of source {request.mx_source_id!r}"
            await context.abort(_Code.NOT_FOUND, reason)
        await require_right(self._rights, READ, source.record.model_name, context)
        if not source.grant_key:
            reason = "the worker was published when the server authenticated no callers: restart the worker"
            await context.abort(_Code.FAILED_PRECONDITION, reason)
        grant = ReadGrant(
            reader=reader,
            source_id=source.record.source_id,
            worker_id=source.record.worker_id,
            expires_at_ms=now_ms() + GRANT_SECONDS * 1000,
        )
        return access_pb2.GetReadGrantResponse(
            grant=sign_grant(grant, source.grant_key), valid_for_seconds=GRANT_SECONDS
        )
