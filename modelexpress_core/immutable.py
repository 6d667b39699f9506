"""Read-only mappings for frozen records. Later changes of the caller's mapping do not affect the record."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["unmodifiable"]


def unmodifiable(given: Mapping[str, str]) -> Mapping[str, str]:
    """A read-only copy of ``given``; a converter for attrs fields."""
    return MappingProxyType(dict(given))
