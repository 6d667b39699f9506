"""The settings of transfers over NIXL."""

from __future__ import annotations

from attrs import frozen

from modelexpress_core.settings import boolean, env, seconds

__all__ = ["BACKENDS", "NixlSettings"]

#: The backends of NIXL that move bytes between the memory of two processes.
BACKENDS = ("UCX", "LIBFABRIC")

_MAX_FABRIC_LENGTH = 64


def _backend(text: str) -> str:
    word = text.strip().upper()
    if word not in BACKENDS:
        reason = f"expected one of {', '.join(BACKENDS)}"
        raise ValueError(reason)
    return word


def _fabric(text: str) -> str:
    word = text.strip()
    if not word.isascii() or not word.isprintable() or {" ", ","} & {*word} or len(word) > _MAX_FABRIC_LENGTH:
        reason = f"expected a word of at most {_MAX_FABRIC_LENGTH} characters of ASCII, without commas"
        raise ValueError(reason)
    return word


@frozen
class NixlSettings:
    """How workers read from each other over NIXL."""

    backend: str = env(
        "MX_NIXL_BACKEND",
        default="UCX",
        converter=_backend,
        help="The backend of NIXL, the same on all workers: UCX, or LIBFABRIC for EFA.",
    )
    fabric: str = env(
        "MX_NIXL_FABRIC",
        default="",
        converter=_fabric,
        help="Name of the network of this host's RDMA devices. Workers with another name, or with none, are not read "
        "over RDMA before other workers. Set it where not all devices of a kind reach each other.",
    )
    offer: bool | None = env(
        "MX_NIXL_OFFER",
        default=None,
        converter=boolean,
        help="Whether workers offer their tensors over NIXL; a reader can then read and write the whole memory of the "
        "worker's process. Unset: where this machine has an RDMA device in use.",
    )
    read_timeout_seconds: float = env(
        "MX_NIXL_READ_TIMEOUT_SECONDS",
        default=60.0,
        converter=seconds,
        help="How long one read of up to 32 MiB may take.",
    )
