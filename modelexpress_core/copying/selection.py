"""Which objects below a URI are copied, and under which names; which names are refused."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from attrs import frozen

from modelexpress_core.checkpoint.strict_json import shown
from modelexpress_core.contracts.storage import ObjectInfo, Storage
from modelexpress_core.errors import AccessDeniedError, BackendError, CheckpointError, NotFoundError, UnsupportedError
from modelexpress_core.resources import starting_threads
from modelexpress_core.uri import ModelURI

__all__ = ["WEIGHT_SUFFIXES", "Selection", "check_names", "reason_to_refuse", "select", "with_stat"]

#: Suffixes of files of weights, in any case. Configurations and indexes (``.json``) and tokenizers (``.model``) have
#: other suffixes.
WEIGHT_SUFFIXES = (
    ".bin",
    ".ckpt",
    ".distcp",
    ".ggml",
    ".gguf",
    ".h5",
    ".keras",
    ".msgpack",
    ".nemo",
    ".npz",
    ".onnx",
    ".onnx.data",
    ".onnx_data",
    ".ot",
    ".pt",
    ".pth",
    ".safetensors",
    ".tflite",
)

_MAX_COMPONENT_BYTES = 255

_MAX_CONCURRENT_STATS = 16


@frozen
class Selection:
    """The objects that are copied.

    Attributes:
        files: Name below the directory, and the object, sorted by name.
        hidden: Objects left out because a part of their name starts with a dot.
        weights: Objects left out because they hold weights.
        directory: Whether the URI is that of a directory, not of one object.
    """

    files: tuple[tuple[str, ObjectInfo], ...]
    hidden: int
    weights: int
    directory: bool


def select(storage: Storage, uri: ModelURI, *, weights: bool, provider: str) -> Selection:
    """The objects at or below ``uri`` that are copied. An object that ``uri`` names itself may be hidden.

    Args:
        storage: The storage of the objects.
        uri: A directory, or one object; a directory if it is both.
        weights: Whether files of weights are copied.
        provider: Name of the plugin, for messages.

    Raises:
        NotFoundError: Nothing is there.
        CheckpointError: Everything was left out, or a name is refused.
    """
    listed, directory = _listed(storage, uri, provider)
    hidden = [name for name in listed if directory and _is_hidden(name)]
    seen = listed.keys() - set(hidden)
    heavy = [] if weights else [name for name in seen if name.lower().endswith(WEIGHT_SUFFIXES)]
    names = sorted(seen - set(heavy))
    if not names:
        raise CheckpointError(
            f"nothing of {uri} is left to copy: {len(hidden)} hidden files and {len(heavy)} files of weights left out",
            uri=str(uri),
            hint="give the URI of one hidden file to copy it; leave --no-weights out to copy weights",
        )
    check_names(names, uri)
    # A broken link is listed as empty: stat raises for it.
    doubtful = [name for name in names if not listed[name].size and listed[name].version is None]
    known = {**listed, **with_stat(storage, {name: listed[name] for name in doubtful})}
    return Selection(tuple((name, known[name]) for name in names), len(hidden), len(heavy), directory)


def with_stat(storage: Storage, objects: dict[str, ObjectInfo]) -> dict[str, ObjectInfo]:
    """``objects`` as ``stat`` returns them, called in parallel."""
    if not objects:
        return {}
    with (
        starting_threads("read the sizes of the files"),
        ThreadPoolExecutor(min(_MAX_CONCURRENT_STATS, len(objects)), thread_name_prefix="mx-stat") as pool,
    ):
        found = pool.map(lambda info: storage.stat(info.path), objects.values())
        return dict(zip(objects, found, strict=True))


def _listed(storage: Storage, uri: ModelURI, provider: str) -> tuple[dict[str, ObjectInfo], bool]:
    """The objects at or below ``uri``, by name, and whether it is a directory."""
    start = f"{uri.path.rstrip('/')}/" if uri.path else ""
    try:
        found = list(storage.list(uri.path))
    except (AccessDeniedError, UnsupportedError) as denied:
        # Without the right to list, one object may still be readable.
        try:
            return {uri.name: storage.stat(uri.path)}, False
        except BackendError:
            raise denied from None
    if found:
        strange = [info.path for info in found if not info.path.startswith(start)]
        if strange:
            message = f"the storage listed {shown(strange[0])}, which is not below {uri}"
            raise BackendError(message, uri=str(uri), provider=provider, hint="report it to the plugin's authors")
        return {info.path.removeprefix(start): info for info in found}, True
    try:
        if uri.path:
            return {uri.name: storage.stat(uri.path)}, False
    except (NotFoundError, UnsupportedError) as exc:  # a disk raises this for an empty directory
        raise _nothing(uri, provider) from exc
    raise _nothing(uri, provider)


def _nothing(uri: ModelURI, provider: str) -> NotFoundError:
    return NotFoundError(
        "nothing is there",
        uri=str(uri),
        operation="list the files",
        provider=provider,
        cause="the path is misspelt, or nothing was uploaded yet",
        hint="check the URI",
    )


def _is_hidden(name: str) -> bool:
    """Whether a part of ``name`` starts with a dot. Names with ``.`` or ``..`` are refused instead."""
    parts = name.split("/")
    return any(part.startswith(".") for part in parts) and not {".", ".."} & set(parts)


def check_names(names: Iterable[str], uri: ModelURI) -> None:
    """Refuse names outside the directory, names that no file can have, and pairs that cannot exist together.

    Two names that differ only in case are refused on every disk: a later copy to a disk that ignores case would lose
    one of the files.

    Raises:
        CheckpointError: The message gives a refused name and the reason.
    """
    files: dict[str, str] = {}
    directories: dict[str, str] = {}
    for name in names:
        reason = reason_to_refuse(name)
        if reason:
            raise _refused(uri, name, f"{shown(name)} {reason}")
        folded = name.casefold()
        if folded in files:
            raise _refused(uri, name, f"{shown(files[folded])} and {shown(name)} differ only in case")
        files[folded] = name
        parts = folded.split("/")
        for length in range(1, len(parts)):
            directories["/".join(parts[:length])] = name
    for folded, name in files.items():
        if folded in directories:
            raise _refused(
                uri, name, f"{shown(name)} would be a file, and the directory of {shown(directories[folded])}"
            )


def reason_to_refuse(name: str) -> str:
    """Why no file below a directory can have the name ``name``; empty if one can."""
    parts = name.split("/")
    if name.startswith("/"):
        return "is an absolute path"
    if ".." in parts or "." in parts:
        return "has a part that is . or .."
    if not all(parts):
        return "has an empty part"
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name):
        return "has a control character"
    try:
        longest = max(len(os.fsencode(part)) for part in parts)
    except UnicodeEncodeError:
        return "cannot be encoded"
    return f"has a part of more than {_MAX_COMPONENT_BYTES} bytes" if longest > _MAX_COMPONENT_BYTES else ""


def _refused(uri: ModelURI, name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{uri} cannot be copied into a directory: {reason}",
        uri=str(uri),
        file=name,
        cause="the program that stored the objects does not treat them as files, or is malicious",
        hint="rename the object, or pull the files one by one",
    )
