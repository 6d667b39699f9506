"""Which files belong together: ``model.safetensors.index.json``, and missing shards by the names of others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from modelexpress_core.checkpoint.strict_json import repeated_key, shown
from modelexpress_core.errors import CheckpointError
from modelexpress_core.messages import printable

__all__ = ["INDEX_SUFFIX", "MAX_INDEX_BYTES", "SUFFIX", "missing_shards", "parse_index"]

#: Ending of a checkpoint file.
SUFFIX = ".safetensors"

#: Ending of an index.
INDEX_SUFFIX = ".safetensors.index.json"

#: Enough for several hundred thousand tensors; a larger file is no index.
MAX_INDEX_BYTES = 64 << 20

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5,9})-of-(?P<count>[0-9]{5,9})\.safetensors")
_NOT_IN_NAMES = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters and lone surrogates
_MAX_SHARDS = 100_000
_HINT = "copy the index again from the original"


def _pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = repeated_key(pairs)
    if twice is not None:
        message = f"the key {shown(twice)} appears twice in one object"
        raise ValueError(message)
    return dict(pairs)


def parse_index(text: bytes, *, file: str, uri: str = "") -> Mapping[str, str]:
    """``tensor name -> file name`` of an index.

    Raises:
        CheckpointError: It is no index, or names a file outside its directory.
    """

    def refuse(what: str) -> CheckpointError:
        where = f"could not open {uri}: {printable(file)}" if uri else printable(file)
        return CheckpointError(f"{where} is no valid index: {what}", uri=uri, file=file, hint=_HINT)

    try:
        # Numbers in an index are not used, and converting one with a million digits would take long.
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_pairs_once, parse_int=str, parse_float=str)
    except RecursionError:
        raise refuse("it is nested too deeply") from None
    except ValueError as exc:  # not UTF-8, not JSON, a key twice
        raise refuse(str(exc)) from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise refuse("it has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(SUFFIX):
            raise refuse(f"the tensor {shown(tensor)} is in {shown(name)}, which is no {SUFFIX} file")
        # A name outside the checkpoint could make us read, and publish, any file of the machine.
        if name.startswith("/") or "\\" in name or any(part in {"", ".", ".."} for part in name.split("/")):
            raise refuse(f"the tensor {shown(tensor)} is in {shown(name)}, outside the checkpoint")
        if _NOT_IN_NAMES.search(name):
            raise refuse(f"the tensor {shown(tensor)} is in {shown(name)}, which is no valid file name")
    return weight_map


def missing_shards(files: Iterable[str]) -> tuple[str, ...]:
    """Shards that are missing, by the names of others (``model-00001-of-00003.safetensors``).

    Only those of one series are returned: thousands of names could stand for 100,000 shards each.
    """
    present = set(files)
    series = {(m["stem"], len(m["number"]), m["count"]) for m in map(_SHARD.fullmatch, present) if m is not None}
    for stem, width, count in sorted(series):
        if int(count) > _MAX_SHARDS:  # no number of shards
            continue
        # Numbers usually begin at one; some writers begin at zero.
        first = 0 if f"{stem}-{0:0{width}}-of-{count}{SUFFIX}" in present else 1
        expected = (f"{stem}-{n:0{width}}-of-{count}{SUFFIX}" for n in range(first, first + int(count)))
        missing = tuple(name for name in expected if name not in present)
        if missing:
            return missing
    return ()
