"""Moving bytes: concurrent reads directly into place, retried if that can help, and counted."""

from __future__ import annotations

from modelexpress_core.fetch.concurrency import concurrency_for
from modelexpress_core.fetch.engine import FetchEngine
from modelexpress_core.fetch.ledger import Ledger
from modelexpress_core.fetch.progress import ProgressReporter
from modelexpress_core.fetch.request import Range, Segment, Ticket
from modelexpress_core.fetch.retry import RetryBudget, RetryingStorage, RetryPolicy

__all__ = [
    "FetchEngine",
    "Ledger",
    "ProgressReporter",
    "Range",
    "RetryBudget",
    "RetryPolicy",
    "RetryingStorage",
    "Segment",
    "Ticket",
    "concurrency_for",
]
