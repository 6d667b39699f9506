"""The GCS plugin: ``gs://bucket/name`` on Google Cloud Storage, and on servers that speak its JSON API."""

from __future__ import annotations

__all__: list[str] = []
