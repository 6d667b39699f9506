"""A server collects garbage of all ages seldom, but does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_PROGRAM = """
import gc, json
from modelexpress_core.server.garbage import collect_seldom

def collections_of_all(rounds):
    before = gc.get_stats()[2]["collections"]
    kept = []
    for _ in range(rounds):
        kept += [[] for _ in range(1000)]
        if len(kept) > 100_000:
            kept.clear()
    return gc.get_stats()[2]["collections"] - before

before = collections_of_all(3000)
collect_seldom()
frozen = gc.get_freeze_count()
after = collections_of_all(9000)
print(json.dumps({"before": before, "after": after, "frozen": frozen}))
"""


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="from 3.14 on, the collector looks at a part at a time")
def test_collections_of_all_objects_become_rare() -> None:
    """In a process of its own, whose collector does not matter to others."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout)

    assert counts["before"] > counts["after"] > 0, counts  # although it made three times as many objects since then
    assert counts["frozen"] > 1000, counts
