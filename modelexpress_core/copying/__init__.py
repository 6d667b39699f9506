"""Copying the files below a URI into a directory: parallel, resumable, verified, each file complete or absent."""

from __future__ import annotations

from modelexpress_core.copying.puller import FileProgress, PullProgress, pull

__all__ = ["FileProgress", "PullProgress", "pull"]
