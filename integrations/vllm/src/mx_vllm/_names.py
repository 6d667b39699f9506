"""Names and content versions of models, from vLLM's ``--model``; imports neither vLLM nor torch."""

from __future__ import annotations

import os
import re

__all__ = ["content_of_snapshot", "name_of"]

#: A folder of the cache of the Hugging Face Hub: repository and commit.
_SNAPSHOT = re.compile(r"/models--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")


def name_of(model: str) -> str:
    """Return the name of vLLM's ``--model``: that of the Hub, or that of the last directory of a path."""
    if not os.path.isdir(model):
        return model
    path = os.path.abspath(model)
    snapshot = _SNAPSHOT.search(path)
    return snapshot["name"].replace("--", "/") if snapshot else os.path.basename(path)


def content_of_snapshot(path: str) -> str:
    """Return the content version of what is in the Hub's cache, which is its commit; empty for other paths."""
    snapshot = _SNAPSHOT.search(os.path.dirname(path) if path.endswith((".safetensors", ".json")) else path)
    return f"hub:{snapshot['name'].replace('--', '/')}@{snapshot['commit']}" if snapshot else ""
