"""Addresses that tests need."""

from __future__ import annotations

__all__ = ["CLOSED_PORT"]

#: Refuses connections. A port that was free a moment ago may be taken by a test that runs beside; the system assigns no
#: port below 1024, and tcpmux, which this one is for, is not in use.
CLOSED_PORT = 1
