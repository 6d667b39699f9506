"""Who holds a model now: the protocol of discoveries, those of core, and asking all that are set."""

from __future__ import annotations

from modelexpress_core.sources.discovery.finding import find_candidates
from modelexpress_core.sources.discovery.protocol import Discovery

__all__ = ["Discovery", "find_candidates"]
