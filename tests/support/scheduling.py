"""Which tests share a worker of pytest-xdist: those of one file, where the file is marked ``xdist_group``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

__all__ = ["GroupScheduling"]

_MARK = "pytest.mark.xdist_group("


class GroupScheduling(LoadScopeScheduling):
    """Sends each test to the next free worker, and the tests of a marked file to one.

    It stands for xdist's own scheduler for groups, which appends the group to the ids of tests; since pytest 9.2 these
    cannot be changed. The scheduler sees ids alone, so it looks for the mark in the file.
    """

    def _split_scope(self, nodeid: str) -> str:
        name = nodeid.partition("::")[0]
        return name if _is_marked(Path(self.config.rootpath, name)) else nodeid


@cache
def _is_marked(path: Path) -> bool:
    return path.is_file() and _MARK in path.read_text(encoding="utf-8")
