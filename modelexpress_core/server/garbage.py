"""How often Python's garbage collector looks at all objects: seldom, since that stops the server for as long."""

from __future__ import annotations

import gc

__all__ = ["collect_seldom"]

#: Collections of younger objects until one of all. Python's default is 10. Nearly all garbage of a call dies young: the
#: memory of a server stayed the same through 100,000 heartbeats without a collection of all.
_YOUNGER_COLLECTIONS = 500


def collect_seldom() -> None:
    """Make collections of all objects of this process rare, and pass over those that exist already.

    With 40,000 records one takes a third of a second, in which no call is answered.
    """
    gc.collect()
    gc.freeze()
    youngest, younger, _ = gc.get_threshold()
    gc.set_threshold(youngest, younger, _YOUNGER_COLLECTIONS)
