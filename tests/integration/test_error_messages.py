"""Scripted failures over all stores: class, object, operation, cause, next step, time, and what ``mx doctor`` finds.

The failures, and the words that are expected of each message, are those of the benchmark ``errors``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

import modelexpress_core as mx
from benchmarks.error_page import report
from benchmarks.errors import BOUND_SECONDS, ENVIRON, PARTS, found_by_doctor, load, points, same_cause, steady
from benchmarks.failures import FAILURES, SERVERS, Failure, Scene, Site

pytestmark = pytest.mark.slow

_FIXTURES = {"S3": "s3_server", "GCS": "gcs_server", "Azure": "azurite"}


@pytest.fixture(scope="module")
def sites() -> Iterator[dict[tuple[str, bool], Site]]:
    """The sites that were used already, by store, and whether the server runs."""
    found: dict[tuple[str, bool], Site] = {}
    yield found
    for site in found.values():
        site.close()


@pytest.fixture(scope="module")
def plugins() -> mx.PluginManager:
    """Looking for plugins takes longer than most failures."""
    return mx.PluginManager.discover({})


@pytest.fixture
def site(
    failure: Failure,
    sites: dict[tuple[str, bool], Site],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Site:
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)
    key = failure.store, failure.needs_server and failure.store in _FIXTURES
    if key not in sites:
        server = request.getfixturevalue(_FIXTURES[failure.store]) if key[1] else None
        sites[key] = SERVERS[failure.store][0](tmp_path_factory.mktemp("errors"), server)
    return sites[key]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.slug)
def test_a_failure_is_explained(failure: Failure, site: Site, plugins: mx.PluginManager) -> None:
    """The final error has the right class and all parts of a message, comes in time, and is the one in the docs."""
    with failure.scene(site, failure.slug) as scene:
        outcome = load(scene, plugins=plugins)

    assert failure.error == outcome.error, outcome.message
    found = points(failure, scene, outcome.message, outcome.seconds)
    assert dict.fromkeys(PARTS, True) == found, f"{outcome.message}\nafter {outcome.seconds:.1f} s"
    shown = next(row["details"]["message"] for row in report()["rows"] if row["details"]["slug"] == failure.slug)
    advice = steady(outcome.message, site.scratch).splitlines()[1:]
    assert shown.splitlines()[1:] == advice, "run python -m benchmarks.error_page --update"


@pytest.mark.parametrize(
    "failure", [failure for failure in FAILURES if failure.doctor], ids=lambda failure: failure.slug
)
def test_the_doctor_finds_the_cause(failure: Failure, site: Site, plugins: mx.PluginManager) -> None:
    """The first step that fails names cause and next step as a load does; the model is not called loadable."""
    with failure.scene(site, failure.slug) as scene:
        step = found_by_doctor(scene, plugins)

    assert step is not None, "mx doctor says that the model can be loaded"
    assert same_cause(failure, scene, step), f"{step.name}: {step.seen}\n{step.cause}"
    assert re.search(failure.next_step, step.hint or "", re.IGNORECASE), step.hint


@pytest.mark.parametrize(
    ("message", "seconds", "expected"),
    [
        ("", 1.0, set()),
        ("File access error", 1.0, {"in time"}),
        ("could not read gs://models/errors/missing-shard-file: HTTP 403", 11.0, {"object", "operation"}),
        ("model-00002-of-00002.safetensors is missing. Copy it again", 1.0, {"cause", "next step", "in time"}),
    ],
)
def test_points_are_given_by_rules(message: str, seconds: float, expected: set[str]) -> None:
    """Each part counts alone, and the name of a failure in the path of its model counts for nothing."""
    failure = next(failure for failure in FAILURES if failure.slug == "missing-shard-file")
    scene = Scene("gs://models/errors/missing-shard-file", {})

    assert expected == {part for part, found in points(failure, scene, message, seconds).items() if found}


def test_the_failures_cover_all_stores() -> None:
    """At least 25 failures, some on each store, each with a name of its own."""
    assert len(FAILURES) >= 25
    assert {"S3", "GCS", "Azure", "file"} == {failure.store for failure in FAILURES}
    assert len(FAILURES) == len({failure.slug for failure in FAILURES})
    assert BOUND_SECONDS <= 10
