"""Which files belong together: ``model.safetensors.index.json``, and what file names say of missing shards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from modelexpress_core.checkpoint.strict_json import repeated_key
from modelexpress_core.errors import CheckpointError

__all__ = ["INDEX_SUFFIX", "MAX_INDEX_BYTES", "SUFFIX", "missing_shards", "parse_index"]

#: Ending of a checkpoint file.
SUFFIX = ".safetensors"

#: Ending of an index.
INDEX_SUFFIX = ".safetensors.index.json"

#: About a million tensors; a larger one is no index.
MAX_INDEX_BYTES = 256 << 20

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.safetensors")
_HINT = "copy the index again from the original"


def _pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = repeated_key(pairs)
    if twice is not None:
        message = f"the key {twice!r} stands twice"
        raise ValueError(message)
    return dict(pairs)


def parse_index(text: bytes, *, file: str, uri: str = "") -> Mapping[str, str]:
    """``tensor name -> file name`` of an index.

    Raises:
        CheckpointError: It is no index, or names a file outside its directory.
    """

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{file} is no valid index: {what}", uri=uri, file=file, hint=_HINT)

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_pairs_once)
    except RecursionError:
        raise refuse("it is nested too deeply") from None
    except ValueError as exc:  # not UTF-8, not JSON, a key twice
        raise refuse(str(exc)) from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise refuse("it has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(SUFFIX):
            raise refuse(f"the tensor {tensor!r} is said to be in {name!r}, which is no {SUFFIX} file")
        # A name that leads elsewhere could make us read, and hand out, any file there is.
        if name.startswith("/") or "\\" in name or any(part in {"", ".", ".."} for part in name.split("/")):
            raise refuse(f"the tensor {tensor!r} is said to be in {name!r}, outside the checkpoint")
    return weight_map


def missing_shards(files: Iterable[str]) -> tuple[str, ...]:
    """Shards that the names of the others (``model-00001-of-00003.safetensors``) promise and that are not there."""
    present = set(files)
    promised = set()
    for name in present:
        match = _SHARD.fullmatch(name)
        if match is None:
            continue
        stem, width, count = match["stem"], len(match["number"]), match["count"]
        if int(count) > 100_000:  # a name, not a promise
            continue
        # Numbering from one is the rule; some writers begin at zero.
        first = 0 if f"{stem}-{0:0{width}}-of-{count}{SUFFIX}" in present else 1
        promised |= {f"{stem}-{n:0{width}}-of-{count}{SUFFIX}" for n in range(first, first + int(count))}
    return tuple(sorted(promised - present))
