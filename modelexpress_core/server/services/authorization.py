"""Ends the calls of those who have no right to them."""

from __future__ import annotations

import grpc

from modelexpress_core.contracts.rights import Rights
from modelexpress_core.wire.authentication import caller
from modelexpress_core.wire.rpc import RpcContext

__all__ = ["require_right"]


async def require_right(rights: Rights, right: str, model: str, context: RpcContext) -> None:
    """End the call with PERMISSION_DENIED unless its caller has ``right`` for ``model``."""
    name = caller.get()
    if not rights.allows(name, right, model):
        reason = f"{name!r} may not {right} {model!r}: no rule of the server's rights allows it"
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, reason)
