"""A cache on a disk that is full or read-only: the error says so, and what is there stays right.

The disks are real ones of a few MiB in memory, which a process mounts for itself alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_MIB = 1 << 20

_BEGIN = """
import os, subprocess, sys, time
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.server.cache import ModelCache
from modelexpress_core.server.settings import CacheSettings

disk, source = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=True)
print("mounted", flush=True)

def opened():
    return ModelCache(disk + "/cache", settings=CacheSettings(sources=("file",), min_free_bytes=0), environ={})

def complete(cache, name):
    snapshot = cache.begin("file" + source + "/" + name)
    assert snapshot.wait(240)
    assert list(cache.validate(snapshot)) == []
    return snapshot

def failure(call, *arguments):
    try:
        call(*arguments)
    except ModelExpressError as exc:
        return str(exc)
    raise AssertionError("it did not fail")
"""

_FULL = """
with opened() as cache:
    small = complete(cache, "small")
    error = failure(complete, cache, "large")
    assert "more on the disk" in error and "MX_CACHE_MIN_FREE_BYTES" in error, error
    assert list(cache.validate(small)) == []

# Something else fills the disk while files arrive: there is no room for what is written at their end.
with opened() as cache:
    publish = cache._publish
    def publish_on_a_full_disk(make):
        with open(disk + "/filler", "wb", buffering=0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError:
                pass
        return publish(make)
    cache._publish = publish_on_a_full_disk
    error = failure(complete, cache, "middle")
    assert "the disk is full" in error and "free space" in error, error
    while cache.stats().downloads:
        time.sleep(0.01)
    assert [snapshot.place for snapshot, _ in cache.snapshots()] == [small.place]
    assert list(cache.validate(small)) == []
with opened() as cache:
    assert [snapshot.place for snapshot, _ in cache.snapshots()] == [small.place]
    os.unlink(disk + "/filler")
    before = cache.stats().origin_bytes
    complete(cache, "middle")
    assert cache.stats().origin_bytes == before, "what had arrived is not fetched again"
print("done")
"""

_READ_ONLY = """
with opened() as cache:
    complete(cache, "small")
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
error = failure(opened)
assert "read-only" in error and "another directory" in error, error
subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
with opened() as cache:
    complete(cache, "small")
    assert 0 == cache.stats().origin_bytes
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [_FULL, _READ_ONLY], ids=["full", "read-only"])
def test_disks(program: str, tmp_path: Path) -> None:
    """The program asserts the rest."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not here")
    for name, size in {"small": _MIB, "middle": 6 * _MIB, "large": 40 * _MIB}.items():
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / "model.bin").write_bytes(os.urandom(size))
    (tmp_path / "disk").mkdir()
    command = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.geteuid() else [])]

    done = subprocess.run(
        [*command, sys.executable, "-c", _BEGIN + program, str(tmp_path / "disk"), str(tmp_path / "source")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )

    if not done.stdout.startswith("mounted"):
        pytest.skip(f"this user or this machine may not mount: {done.stderr[-200:]}")
    assert 0 == done.returncode, done.stderr
    assert done.stdout.endswith("done\n")
