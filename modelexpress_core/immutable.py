"""A mapping that a frozen record can hold: nobody changes it, not even whoever passed it in."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["unmodifiable"]


def unmodifiable(given: Mapping[str, str]) -> Mapping[str, str]:
    """A read-only copy of ``given``; a converter for attrs fields."""
    return MappingProxyType(dict(given))
