"""What a worker tells readers about its agent and its memory, as bytes.

A head in JSON, the metadata of the agent, the names of the tensors, and three arrays: addresses, sizes, devices. All of
it is compressed by zlib, which also notices damage. Bytes of the same weight stand together in the arrays, because they
differ little: 50,000 tensors need well below a mebibyte.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from attrs import frozen

from mx_nixl._allocations import HOST
from mx_nixl._lanes import Location

__all__ = ["LIMIT_BYTES", "MAX_TENSORS", "AgentDescription", "Proof", "TensorPlace"]

#: The limit of ``ServedTensors.description``.
LIMIT_BYTES = 1 << 20

#: How many tensors a description may have: a stranger's may be short, and name many that are alike.
MAX_TENSORS = 250_000

_FORMAT = 1
_MAGIC = b"mx-nixl\n"
_MAX_PLAIN_BYTES = 64 << 20
_MAX_HEAD_BYTES = 64 << 10
_MAX_ADDRESS = (1 << 63) - 1
_MAX_PID = (1 << 31) - 1
_NONCE_BYTES = 16


@frozen
class TensorPlace:
    """Where a tensor lies in the memory of the worker.

    Attributes:
        address: First byte.
        nbytes: How many bytes it has.
        device: Number of its device; -1 for memory of the host.
    """

    address: int
    nbytes: int
    device: int


@frozen
class Proof:
    """Bytes in the memory of the worker, which prove that a reader can read it through CMA.

    Attributes:
        pid: The worker's process.
        address: Where they lie.
        nonce: Random bytes.
    """

    pid: int
    address: int
    nonce: bytes


@frozen
class AgentDescription:
    """What a worker tells readers.

    Attributes:
        agent: Name of its agent.
        backend: The backend of the agent.
        metadata: What NIXL needs to read its memory.
        tensors: The place of each tensor.
        location: Where the worker runs.
        proof: Proves that CMA works.
    """

    agent: str
    backend: str
    metadata: bytes
    tensors: Mapping[str, TensorPlace]
    location: Location
    proof: Proof

    def to_bytes(self) -> bytes:
        """The description as bytes."""
        names = "\0".join(self.tensors).encode()
        head = {
            "agent": self.agent,
            "backend": self.backend,
            "metadata": len(self.metadata),
            "names": len(names),
            "tensors": len(self.tensors),
            "host": self.location.host,
            "pid_namespace": self.location.pid_namespace,
            "fabrics": list(self.location.fabrics),
            "cma": self.location.cma,
            "pid": self.proof.pid,
            "nonce_address": self.proof.address,
            "nonce": self.proof.nonce.hex(),
        }
        numbers = [(each.address, each.nbytes, each.device) for each in self.tensors.values()]
        columns = np.array(numbers, dtype="<i8").reshape(-1, 3).T
        # The first bytes of all numbers, then their second bytes, and so on.
        shuffled = np.ascontiguousarray(columns).view(np.uint8).reshape(3, -1, 8).transpose(0, 2, 1).tobytes()
        text = json.dumps(head).encode()
        plain = b"".join((len(text).to_bytes(4, "little"), text, self.metadata, names, shuffled))
        return b"".join((_MAGIC, bytes([_FORMAT]), zlib.compress(plain, 9)))

    @classmethod
    def from_bytes(cls, description: bytes) -> AgentDescription:
        """Read a description, which may come from a stranger.

        Raises:
            ValueError: It is no description of this format, or damaged.
        """
        plain = _plain(description)
        try:
            return cls._parsed(plain)
        except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as exc:
            reason = f"its head is not valid: {type(exc).__name__}"
            raise ValueError(reason) from exc

    @classmethod
    def _parsed(cls, plain: bytes) -> AgentDescription:
        end = 4 + int.from_bytes(plain[:4], "little")
        if end > _MAX_HEAD_BYTES:
            reason = f"its head has {end} bytes"
            raise ValueError(reason)
        head = json.loads(plain[4:end])
        metadata = plain[end : end + _number(head, "metadata", len(plain))]
        begin = end + len(metadata)
        encoded = plain[begin : begin + _number(head, "names", len(plain))]
        count = _number(head, "tensors", MAX_TENSORS)
        shuffled = plain[begin + len(encoded) :]
        if len(metadata) != head["metadata"] or len(encoded) != head["names"] or len(shuffled) != count * 24:
            reason = f"it has {len(plain)} bytes, which its head does not explain"
            raise ValueError(reason)
        names = encoded.decode().split("\0") if count else []
        if len(names) != count or len(set(names)) != count:
            reason = f"{len(set(names))} names for {count} tensors"
            raise ValueError(reason)
        bytes_of_numbers = np.frombuffer(shuffled, np.uint8).reshape(3, 8, count).transpose(0, 2, 1)
        numbers = np.ascontiguousarray(bytes_of_numbers).view("<i8").reshape(3, count).T.tolist()
        return cls(
            agent=_text(head, "agent"),
            backend=_text(head, "backend"),
            metadata=metadata,
            tensors={name: _place(name, *each) for name, each in zip(names, numbers, strict=True)},
            location=Location(
                _text(head, "host"),
                _text(head, "pid_namespace"),
                tuple(map(str, head["fabrics"])),
                cma=head["cma"] is True,
            ),
            proof=Proof(_number(head, "pid", _MAX_PID), _number(head, "nonce_address", _MAX_ADDRESS), _nonce(head)),
        )


def _plain(description: bytes) -> bytes:
    if not description.startswith(_MAGIC) or len(description) > LIMIT_BYTES:
        reason = "it does not begin as a description of mx-nixl, or is too long"
        raise ValueError(reason)
    packed = description[len(_MAGIC) :]
    if packed[:1] != bytes([_FORMAT]):
        reason = f"it has another format than {_FORMAT}"
        raise ValueError(reason)
    unpacking = zlib.decompressobj()
    try:
        plain = unpacking.decompress(packed[1:], _MAX_PLAIN_BYTES)
    except zlib.error as exc:
        reason = "it is damaged"
        raise ValueError(reason) from exc
    if not unpacking.eof or unpacking.unused_data:
        reason = "it is cut off, or too long"
        raise ValueError(reason)
    return plain


def _place(name: str, address: int, nbytes: int, device: int) -> TensorPlace:
    if address <= 0 or nbytes <= 0 or address > _MAX_ADDRESS - nbytes or not HOST <= device < 1 << 16:
        reason = f"{name[:200]!r} has {nbytes} bytes at {address} on device {device}"
        raise ValueError(reason)
    return TensorPlace(address, nbytes, device)


def _number(head: Mapping[str, Any], key: str, most: int) -> int:
    value = head[key]
    if type(value) is not int or not 0 <= value <= most:
        reason = f"{key} is no number up to {most}"
        raise ValueError(reason)
    return value


def _text(head: Mapping[str, Any], key: str) -> str:
    value = head[key]
    if not isinstance(value, str) or len(value) > 1024:
        reason = f"{key} is no short text"
        raise ValueError(reason)
    return value


def _nonce(head: Mapping[str, Any]) -> bytes:
    nonce = bytes.fromhex(_text(head, "nonce"))
    if len(nonce) != _NONCE_BYTES:
        reason = f"the nonce has {len(nonce)} bytes, not {_NONCE_BYTES}"
        raise ValueError(reason)
    return nonce
