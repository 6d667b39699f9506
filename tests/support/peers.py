"""Workers of this process, as the contract kit has them."""

from __future__ import annotations

from modelexpress_core.testing import ServingWorker, serving_worker

__all__ = ["ServingWorker", "serving_worker"]
