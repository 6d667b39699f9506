"""The built-in discoveries, and the search through all configured discoveries."""

from __future__ import annotations

from modelexpress_core.sources.discovery.finding import find_candidates

__all__ = ["find_candidates"]
