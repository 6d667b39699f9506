"""Moving bytes: concurrent reads straight into place, tried again where that can help, and accounted for."""

from __future__ import annotations

from modelexpress_core.fetch.engine import FetchEngine
from modelexpress_core.fetch.ledger import Ledger
from modelexpress_core.fetch.request import Range, Segment, Ticket
from modelexpress_core.fetch.retry import RetryBudget, RetryingStorage, RetryPolicy

__all__ = ["FetchEngine", "Ledger", "Range", "RetryBudget", "RetryPolicy", "RetryingStorage", "Segment", "Ticket"]
