"""Which tests share a worker of pytest-xdist: those of files that are marked with one ``xdist_group``."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

__all__ = ["GroupScheduling"]

_MARK = re.compile(r"pytest\.mark\.xdist_group\(\"([^\"]+)\"\)")


class GroupScheduling(LoadScopeScheduling):
    """Sends each test to the next free worker, and all tests of files with the same mark to one.

    It stands for xdist's own scheduler for groups, which appends the group to the ids of tests; since pytest 9.2 these
    cannot be changed. The scheduler sees ids alone, so it looks for the mark in the file.
    """

    def _split_scope(self, nodeid: str) -> str:
        name = nodeid.partition("::")[0]
        return _group_of(Path(self.config.rootpath, name)) or nodeid


@cache
def _group_of(path: Path) -> str:
    found = _MARK.search(path.read_text(encoding="utf-8")) if path.is_file() else None
    return "" if found is None else found[1]
