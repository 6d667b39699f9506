"""Source identities as messages of the protocol."""

from __future__ import annotations

import attrs

from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.wire.proto.modelexpress import p2p_pb2

__all__ = ["identity_from_message", "identity_to_message"]


def identity_from_message(message: p2p_pb2.SourceIdentity) -> SourceIdentity:
    """The identity in ``message``."""
    return SourceIdentity(**{name: getattr(message, name) for name in attrs.fields_dict(SourceIdentity)})


def identity_to_message(identity: SourceIdentity) -> p2p_pb2.SourceIdentity:
    """The message for ``identity``."""
    values = {name: getattr(identity, name) for name in attrs.fields_dict(SourceIdentity)}
    values["extra_parameters"] = dict(identity.extra_parameters)
    return p2p_pb2.SourceIdentity(**values)
