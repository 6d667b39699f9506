"""The plugin for Kubernetes: a server's metadata in custom resources, and authentication by TokenReview."""

from __future__ import annotations

__all__: list[str] = []
