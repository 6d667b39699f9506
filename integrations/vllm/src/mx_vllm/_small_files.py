"""Configuration and tokenizer: the files of a model that vLLM itself reads from a directory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from modelexpress_core import ModelURI, PluginManager, pull
from modelexpress_core.report import PullReport
from mx_vllm._directories import locked

__all__ = ["CONFIGURATIONS", "copy_small_files", "has_all_weights"]

#: Files that tell vLLM the architecture; the second is Mistral's format.
CONFIGURATIONS = ("config.json", "params.json")

#: Suffixes of the files of weights that vLLM reads.
_READ_SUFFIXES = (".safetensors", ".bin", ".pt")

#: Lists the modules of a model of sentence-transformers.
_MODULES = "modules.json"
_MAX_MODULES_BYTES = 1 << 20


def copy_small_files(uri: ModelURI, directory: Path, plugins: PluginManager) -> PullReport:
    """Copy all files but weights from ``uri`` into ``directory``; those that are there already are left alone.

    Projections of sentence-transformers are copied too. vLLM reads them from the directory, not by its loader, and
    leaves them out without an error if they are not there.

    Returns:
        The report of the copy, without projections.
    """
    with locked(directory):
        report = pull(uri, directory, weights=False, plugins=plugins)
        for folder in _projections(directory):
            pull(uri.with_path(f"{uri.path}/{folder}"), directory / folder, plugins=plugins)
    return report


def _projections(directory: Path) -> Iterator[str]:
    """Yield the folders of the ``Dense`` modules below ``directory``."""
    try:
        with (directory / _MODULES).open("rb") as file:
            modules = json.loads(file.read(_MAX_MODULES_BYTES))
    except (OSError, ValueError, RecursionError):
        return
    for module in modules if isinstance(modules, list) else ():
        folder, kind = (str(module.get(key, "")) for key in ("path", "type")) if isinstance(module, dict) else ("", "")
        # Only folders that were copied: the file may name anything.
        if kind.rpartition(".")[2] == "Dense" and "/" not in folder and (directory / folder / "config.json").is_file():
            yield folder


def has_all_weights(directory: str) -> bool:
    """Return whether ``directory`` has weights, and if it has indexes, all files of one of them.

    A directory may have indexes of several formats, of which only one was downloaded.
    """
    try:
        names = os.listdir(directory)
        indexes = [list(_files_in(Path(directory, name))) for name in names if name.endswith(".index.json")]
    except (OSError, ValueError, RecursionError):
        return False
    if any(indexes):
        return any(files and all(os.path.exists(os.path.join(directory, file)) for file in files) for files in indexes)
    return any(name.endswith(_READ_SUFFIXES) for name in names)


def _files_in(index: Path) -> Iterable[str]:
    content: Any = json.loads(index.read_bytes())
    listed = content.get("weight_map") if isinstance(content, dict) else None
    return {str(file) for file in listed.values()} if isinstance(listed, Mapping) else ()
