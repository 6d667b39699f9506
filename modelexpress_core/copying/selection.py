"""Which objects below a URI are copied, and under which names; names that no file below a directory can have."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from attrs import frozen

from modelexpress_core.checkpoint.strict_json import shown
from modelexpress_core.contracts.storage import ObjectInfo, Storage
from modelexpress_core.errors import AccessDeniedError, BackendError, CheckpointError, NotFoundError, UnsupportedError
from modelexpress_core.uri import ModelURI

__all__ = ["WEIGHT_SUFFIXES", "Selection", "check_names", "select", "with_stat"]

#: Files of weights end like this, in any case. What describes them (``.json``, indexes included) does not, nor do
#: tokenizers (``.model``).
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

_STATS_AT_ONCE = 16


@frozen
class Selection:
    """What is copied.

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
    """The objects at and below ``uri`` that are copied. An object that is named itself may be hidden.

    Args:
        storage: Where the objects are.
        uri: A directory, or one object; a directory where it is both.
        weights: Whether files of weights are among them.
        provider: Name of the plugin, for messages.

    Raises:
        NotFoundError: Nothing is there.
        CheckpointError: Everything was left out, or a name cannot be that of a file below a directory.
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
            hint="give the URI of one file to copy it though it is hidden; leave --no-weights out to copy weights",
        )
    check_names(names, uri)
    # A link that leads nowhere is listed as empty: asking for it says so.
    doubtful = [name for name in names if not listed[name].size and listed[name].version is None]
    known = {**listed, **with_stat(storage, {name: listed[name] for name in doubtful})}
    return Selection(tuple((name, known[name]) for name in names), len(hidden), len(heavy), directory)


def with_stat(storage: Storage, objects: dict[str, ObjectInfo]) -> dict[str, ObjectInfo]:
    """``objects`` as ``stat`` tells them, asked for in parallel."""
    if not objects:
        return {}
    with ThreadPoolExecutor(min(_STATS_AT_ONCE, len(objects)), thread_name_prefix="mx-stat") as pool:
        found = pool.map(lambda info: storage.stat(info.path), objects.values())
        return dict(zip(objects, found, strict=True))


def _listed(storage: Storage, uri: ModelURI, provider: str) -> tuple[dict[str, ObjectInfo], bool]:
    """What is at or below ``uri``, by name, and whether it is a directory."""
    start = f"{uri.path.rstrip('/')}/" if uri.path else ""
    try:
        found = list(storage.list(uri.path))
    except (AccessDeniedError, UnsupportedError) as denied:
        # Who may not list may still read the one object that is meant.
        try:
            return {uri.name: storage.stat(uri.path)}, False
        except BackendError:
            raise denied from None
    if found:
        strange = [info.path for info in found if not info.path.startswith(start)]
        if strange:
            message = f"asked for what lies below {uri}, the storage listed {shown(strange[0])}"
            raise BackendError(message, uri=str(uri), provider=provider, hint="report it to the plugin's authors")
        return {info.path.removeprefix(start): info for info in found}, True
    try:
        if uri.path:
            return {uri.name: storage.stat(uri.path)}, False
    except (NotFoundError, UnsupportedError) as exc:  # a disk says so of an empty directory
        raise _nothing(uri, provider) from exc
    raise _nothing(uri, provider)


def _nothing(uri: ModelURI, provider: str) -> NotFoundError:
    return NotFoundError(
        "nothing is there",
        uri=str(uri),
        operation="list the files",
        provider=provider,
        cause="the path is misspelt, or nothing was put there yet",
        hint="check the URI",
    )


def _is_hidden(name: str) -> bool:
    """Whether a part of ``name`` starts with a dot. One that leads somewhere else makes it a name to be refused."""
    parts = name.split("/")
    return any(part.startswith(".") for part in parts) and not {".", ".."} & set(parts)


def check_names(names: Iterable[str], uri: ModelURI) -> None:
    """Refuse names that would leave the directory, that no file can have, or of which two cannot both be there.

    Two names that differ in case alone are refused wherever the directory is: a copy that loses a file as soon as it
    is copied on, to a disk that does not tell them apart, is no copy.

    Raises:
        CheckpointError: The message names one that is refused, and why.
    """
    files: dict[str, str] = {}
    directories: dict[str, str] = {}
    for name in names:
        reason = _why_not(name)
        if reason:
            raise _refused(uri, name, f"{shown(name)} {reason}")
        folded = name.casefold()
        if folded in files:
            raise _refused(uri, name, f"{shown(files[folded])} and {shown(name)} differ in case alone")
        files[folded] = name
        parts = folded.split("/")
        for length in range(1, len(parts)):
            directories["/".join(parts[:length])] = name
    for folded, name in files.items():
        if folded in directories:
            raise _refused(
                uri, name, f"{shown(name)} would be a file, and the directory of {shown(directories[folded])}"
            )


def _why_not(name: str) -> str:
    """Why there can be no file called ``name`` below a directory; empty where there can."""
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
        cause="the objects were stored by a program that does not think of them as files, or to do harm",
        hint="rename the object, or pull the files that are wanted one by one",
    )
