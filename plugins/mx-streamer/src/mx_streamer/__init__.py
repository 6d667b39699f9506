"""ModelExpress storage plugin: reads with the engine of runai-model-streamer."""

from __future__ import annotations

__all__: list[str] = []
