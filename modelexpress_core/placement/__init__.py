"""Where bytes go: deferred tensors, the operations on them, and the reads that follow."""

from __future__ import annotations

from modelexpress_core.placement.deferred import DeferredTensor, Source
from modelexpress_core.placement.recording import Recorder

__all__ = ["DeferredTensor", "Recorder", "Source"]
