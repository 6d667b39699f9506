"""The custom resources of the store: how a source becomes objects, and how it is read from them again.

A source is one small object, which lists need, and objects with the rest, which are read only by who asks for the
source: the identity, the metadata of the worker, and the key of its read grants. An object of Kubernetes has about 1
MiB, so the rest is split. Its objects never change, and the small one names them with their digest: a source is
replaced as a whole.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import field, frozen

from modelexpress_core.contracts.metadata_store import PodReference, SourceRecord, SourceStatus, StoredSource
from mx_kubernetes._client import Object

__all__ = [
    "API_VERSION",
    "GROUP",
    "MANAGER",
    "UNREADABLE",
    "Content",
    "SourceObject",
    "content_manifest",
    "joined",
    "name_of",
    "packed",
    "parts_of",
    "read_source",
    "references_to",
    "source_manifest",
    "status_of",
    "unpacked",
]

GROUP = "modelexpress.io"
API_VERSION = f"{GROUP}/v1alpha1"

#: The name under which the API server keeps which fields are ours.
MANAGER = "model-express"

#: Bytes of a part, before base64 makes it a third longer. etcd takes requests of 1.5 MiB.
_PART_BYTES = 512 << 10

#: Bytes of a publication, packed: far more than the server receives in one message.
_MAX_CONTENT_BYTES = 256 << 20

#: What reading an object raises if another program wrote or damaged it.
UNREADABLE = (
    AttributeError,
    LookupError,
    OverflowError,
    TypeError,
    ValueError,
    binascii.Error,
    struct.error,
    zlib.error,
)

_MAX_U32, _MAX_I64, _MAX_U64 = (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1
_LENGTHS = struct.Struct("!III")
_POD_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_POD_UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@frozen
class Content:
    """Where the rest of a source is.

    Attributes:
        parts: Names of the objects, in order.
        size_bytes: Bytes of the parts together.
        sha256: Their digest, in hexadecimal digits.
    """

    parts: tuple[str, ...]
    size_bytes: int
    sha256: str


@frozen
class SourceObject:
    """A ``ModelSource``, read.

    Attributes:
        name: Its name.
        uid: Its uid.
        version: Its resource version.
        record: What lists return; its time is that of the clock of the server that wrote it.
        owner: The caller whose quota it counts in.
        size_bytes: What it counts there.
        content: Where the rest is.
    """

    name: str
    uid: str
    version: str
    record: SourceRecord = field(repr=False)
    owner: str = field(repr=False)
    size_bytes: int
    content: Content = field(repr=False)


def name_of(source_id: str, worker_id: str) -> str:
    """The name of the object for these ids; different pairs have different names."""
    return hashlib.sha256(f"{len(source_id)}:{source_id}:{worker_id}".encode()).hexdigest()[:32]


# -- the small object --------------------------------------------------------------------------------------------------


def status_of(status: int, updated_at_ms: int, load: float | None) -> Object:
    """The field ``status``."""
    written: Object = {"state": int(status), "ready": status == SourceStatus.READY, "updatedAt": updated_at_ms}
    if load is not None:
        written["load"] = load
    return written


def source_manifest(
    source: StoredSource, updated_at_ms: int, owner: str, content: Content, references: Sequence[Object]
) -> Object:
    """The ``ModelSource`` of ``source``."""
    record = source.record
    optional: Mapping[str, Any] = {
        "accelerator": record.accelerator or None,
        "topology": dict(record.topology) or None,
        "trainingStep": None if record.training_step is None else str(record.training_step),
        "layoutSignature": record.layout_signature,
        "publisher": record.publisher or None,
        "publisherAddress": record.publisher_address or None,
        "owner": owner or None,
    }
    return {
        "apiVersion": API_VERSION,
        "kind": "ModelSource",
        "metadata": _metadata(name_of(record.source_id, record.worker_id), references),
        "spec": {
            "sourceId": record.source_id,
            "workerId": record.worker_id,
            "modelName": record.model_name,
            "rank": record.worker_rank,
            "bytes": source.size_bytes,
            "content": {"parts": [*content.parts], "bytes": content.size_bytes, "sha256": content.sha256},
            **{key: value for key, value in optional.items() if value is not None},
        },
        "status": status_of(record.status, updated_at_ms, record.source_load),
    }


def read_source(manifest: Object) -> SourceObject:
    """The source in an object of the API server.

    Raises:
        Exception: One of ``UNREADABLE``: it is not the object of a source.
    """
    metadata, spec, status = manifest["metadata"], manifest["spec"], manifest["status"]
    rank, updated, state = _number(spec["rank"], _MAX_U32), _number(status["updatedAt"]), int(status["state"])
    step = spec.get("trainingStep")
    load = status.get("load")
    record = SourceRecord(
        source_id=_text(spec["sourceId"]),
        worker_id=_text(spec["workerId"]),
        model_name=_text(spec["modelName"]),
        worker_rank=rank,
        status=state,
        updated_at_ms=updated,
        accelerator=_text(spec.get("accelerator", "")),
        topology={_text(key): _text(value) for key, value in spec.get("topology", {}).items()},
        training_step=None if step is None else _number(int(step), _MAX_U64),
        layout_signature=None if spec.get("layoutSignature") is None else _text(spec["layoutSignature"]),
        source_load=None if load is None else float(load),
        publisher=_text(spec.get("publisher", "")),
        publisher_address=_text(spec.get("publisherAddress", "")),
    )
    name = _text(metadata["name"])
    if name != name_of(record.source_id, record.worker_id):
        reason = "the name of the object is not that of its ids"
        raise ValueError(reason)
    content = spec["content"]
    return SourceObject(
        name=name,
        uid=_text(metadata["uid"]),
        version=_text(metadata["resourceVersion"]),
        record=record,
        owner=_text(spec.get("owner", "")),
        size_bytes=_number(spec["bytes"]),
        content=Content(
            tuple(_text(part) for part in content["parts"]), _number(content["bytes"]), _text(content["sha256"])
        ),
    )


def references_to(pod: PodReference | None, namespace: str) -> list[Object]:
    """A reference to the worker's pod as the owner: Kubernetes removes an object with the last of its owners.

    None for a pod in another namespace, which cannot own the object, and for what is no name or uid of a pod.
    """
    if pod is None or pod.namespace != namespace:
        return []
    if not (_POD_NAME.fullmatch(pod.name) and _POD_UID.fullmatch(pod.uid)):
        return []
    return [{"apiVersion": "v1", "kind": "Pod", "name": pod.name, "uid": pod.uid}]


def _metadata(name: str, references: Sequence[Object]) -> Object:
    metadata: Object = {"name": name, "labels": {"app.kubernetes.io/managed-by": MANAGER}}
    if references:
        metadata["ownerReferences"] = [*references]
    return metadata


def _text(value: Any) -> str:  # noqa: ANN401 - of JSON
    if not isinstance(value, str):
        reason = "a text is wanted"
        raise TypeError(reason)
    value.encode()  # the protocol carries no lone surrogates
    return value


def _number(value: Any, most: int = _MAX_I64) -> int:  # noqa: ANN401 - of JSON
    if not isinstance(value, int) or not 0 <= value <= most:
        reason = "a number is out of its range"
        raise ValueError(reason)
    return value


# -- the rest ----------------------------------------------------------------------------------------------------------


def packed(source: StoredSource) -> bytes:
    """Identity, metadata and key of ``source``. Names of tensors resemble each other: compressed, they take a fifth."""
    fields = (source.identity, source.worker, source.grant_key)
    return zlib.compress(_LENGTHS.pack(*(len(each) for each in fields)) + b"".join(fields), 1)


def unpacked(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Identity, metadata and key.

    Raises:
        Exception: One of ``UNREADABLE``.
    """
    stream = zlib.decompressobj()
    raw = stream.decompress(data, _MAX_CONTENT_BYTES)
    first, second, third = _LENGTHS.unpack_from(raw)
    if not stream.eof or len(raw) != _LENGTHS.size + first + second + third:
        reason = "the lengths do not fit"
        raise ValueError(reason)
    at = _LENGTHS.size
    return raw[at : at + first], raw[at + first : at + first + second], raw[at + first + second :]


def parts_of(name: str, publication: str, data: bytes) -> tuple[Content, list[bytes]]:
    """How ``data`` is split, with the names of the parts; ``publication`` makes them different from all before."""
    pieces = [data[start : start + _PART_BYTES] for start in range(0, len(data), _PART_BYTES)]
    names = tuple(f"{name}-{publication}-{number}" for number in range(len(pieces)))
    return Content(names, len(data), hashlib.sha256(data).hexdigest()), pieces


def content_manifest(name: str, piece: bytes, references: Sequence[Object]) -> Object:
    """The ``ModelSourceContent`` with one part."""
    return {
        "apiVersion": API_VERSION,
        "kind": "ModelSourceContent",
        "metadata": _metadata(name, references),
        "data": base64.b64encode(piece).decode(),
    }


def joined(content: Content, objects: Sequence[Object]) -> bytes:
    """The parts together.

    Raises:
        Exception: One of ``UNREADABLE``: they are not what the source names.
    """
    data = b"".join(_pieces(objects))
    if len(data) != content.size_bytes or hashlib.sha256(data).hexdigest() != content.sha256:
        reason = "the parts are not those of the source"
        raise ValueError(reason)
    return data


def _pieces(objects: Sequence[Object]) -> Iterator[bytes]:
    for each in objects:
        yield base64.b64decode(each["data"], validate=True)
