"""Each package brings what it needs and nothing else, and the page on packages says how much that is."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

import pytest

from devtools.package_costs import ROWS, Cost, cost_of, needs, parsed
from devtools.packages import ROOT
from tests.support.tools import skip_without

#: Beginnings of the names of the SDKs of each cloud.
_SDKS: Mapping[str, tuple[str, ...]] = {
    "s3": ("boto", "s3transfer", "aws"),
    "gcs": ("google", "gcs"),
    "azure": ("azure", "msal"),
    "hf": ("hf-", "hugging"),
}

#: What each row may have of them, and the largest size that we accept.
_ALLOWED: Mapping[str, tuple[set[str], float]] = {
    "mx-s3": ({"s3"}, 30),
    "mx-gcs": ({"gcs"}, 25),
    "mx-azure": ({"azure"}, 25),
    "mx-hf": ({"hf"}, 35),
    "mx-grpc-stream": (set(), 50),
    "mx-kubernetes": (set(), 50),
    "mx-nixl": (set(), 95),
    "mx-streamer": (set(), 75),
    "mx-streamer[s3]": ({"s3"}, 125),
    "mx-streamer[gcs]": ({"gcs"}, 140),
    "mx-streamer[azure]": ({"azure"}, 125),
    "mx-vllm": (set(), 1),
}

_MAX_IMPORT_MS = 50

#: How far a page may be from what is measured: versions and machines differ.
_SIZE_TOLERANCE = 0.25
_IMPORT_TOLERANCE_MS = 15


@pytest.fixture(scope="module")
def stated() -> Mapping[str, Cost]:
    """What the page says."""
    return parsed((ROOT / "docs" / "packages.md").read_text(encoding="utf-8"))


def test_the_page_has_all_packages(stated: Mapping[str, Cost]) -> None:
    """Each package of this repository, with each store that mx-streamer reads from; so have the bounds of this test."""
    assert list(ROWS) == list(stated)
    assert set(ROWS) == set(_ALLOWED)


@pytest.mark.parametrize("row", ROWS)
def test_a_package_brings_the_sdk_of_its_store_alone(row: str) -> None:
    """By the metadata of all that it needs."""
    try:
        brought = needs(row)
    except importlib.metadata.PackageNotFoundError as exc:
        skip_without(f"the package {exc.name}: make installs it where it has wheels")

    found = {cloud for cloud, starts in _SDKS.items() if any(name.startswith(starts) for name in brought)}
    assert _ALLOWED[row][0] == found


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_the_page_says_what_a_package_costs(row: str, stated: Mapping[str, Cost]) -> None:
    """What it adds, within the bounds and near to what the page says; `python -m devtools.package_costs` prints it."""
    try:
        cost = cost_of(row)
    except importlib.metadata.PackageNotFoundError as exc:
        skip_without(f"the package {exc.name}: make installs it where it has wheels")

    assert stated[row].needs == cost.needs
    assert cost.size_mb < _ALLOWED[row][1]
    assert cost.size_mb == pytest.approx(stated[row].size_mb, rel=_SIZE_TOLERANCE, abs=0.1)
    assert cost.import_ms < _MAX_IMPORT_MS
    assert cost.import_ms == pytest.approx(stated[row].import_ms, abs=_IMPORT_TOLERANCE_MS)
