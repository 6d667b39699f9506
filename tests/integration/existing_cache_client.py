"""Run by the tests where the client that others have is installed: it installs a model from a server, in two phases."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from typing import Any

# The package's own __init__ imports torch, which these parts of it do not need.
spec: Any = importlib.util.find_spec("modelexpress")
bare = types.ModuleType("modelexpress")
bare.__path__ = list(spec.submodule_search_locations)
sys.modules["modelexpress"] = bare

from modelexpress.model_client import (  # type: ignore[import-not-found]  # noqa: E402 - see above
    ModelCacheClient,
    ModelCacheError,
)

url, directory = sys.argv[1:]
answers: dict[str, Any] = {}
with ModelCacheClient(url, directory) as client:
    answers["commit"] = client.ensure_downloaded("org/model", ignore_weights=True)
    answers["listed"] = client.list_files("org/model", revision=answers["commit"], ignore_weights=True)
    snapshot = client.install_metadata_snapshot("org/model", requested_revision="main")
    answers["snapshot"] = str(snapshot)
    answers["first"] = sorted(path.name for path in snapshot.iterdir())
    client.install_weight_files("org/model", snapshot)
    answers["second"] = sorted(path.name for path in snapshot.iterdir())
    answers["all"] = client.list_files("org/model", revision=answers["commit"])
    try:
        client.ensure_downloaded("org/none")
    except ModelCacheError as exc:
        answers["error"] = str(exc)
with ModelCacheClient(url, directory + "-2", chunk_size=2**32 - 1) as client:
    snapshot = client.install_metadata_snapshot("org/model")
    client.install_weight_files("org/model", snapshot)
    answers["whole"] = str(snapshot)
sys.stdout.write(json.dumps(answers))
