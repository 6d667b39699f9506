"""The discoveries of core, and asking all that are set."""

from __future__ import annotations

from modelexpress_core.sources.discovery.finding import find_candidates

__all__ = ["find_candidates"]
