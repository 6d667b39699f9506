"""How many reads are under way at once."""

from __future__ import annotations

from typing import Protocol

from attrs import frozen

from modelexpress_core.providers import StorageCapabilities
from modelexpress_core.settings import LoadSettings

__all__ = ["ConcurrencyLimit", "FixedConcurrency"]


class ConcurrencyLimit(Protocol):
    """Asked before each read, so that it may change while a load runs."""

    @property
    def reads(self) -> int:
        """Reads that may be under way now."""
        ...


@frozen
class FixedConcurrency:
    """What the storage asks for, and never more than the user allows.

    Attributes:
        reads: Reads that may be under way.
    """

    reads: int

    @classmethod
    def of(cls, capabilities: StorageCapabilities, settings: LoadSettings) -> FixedConcurrency:
        """The limit for one storage under the user's bound."""
        bound = settings.concurrency
        return cls(capabilities.concurrency if bound is None else min(bound, capabilities.concurrency))
