"""docs/error-messages.md shows the committed results, and the times that the default settings give."""

from __future__ import annotations

import pytest

from benchmarks.error_page import PAGE, page_with_tables, report
from benchmarks.errors import BOUND_SECONDS, PARTS, SETTINGS
from benchmarks.failures import FAILURES
from modelexpress_core.fetch import RetryPolicy
from modelexpress_core.settings import LoadSettings
from mx_azure.settings import AzureSettings
from mx_gcs.settings import GcsSettings
from mx_hf.settings import HfSettings
from mx_s3.settings import S3Settings


def test_the_tables_show_the_results() -> None:
    """``python -m benchmarks.error_page`` would change nothing."""
    assert page_with_tables(PAGE.read_text(), report()) == PAGE.read_text()


def test_the_results_are_of_the_failures_that_are_scripted() -> None:
    """Each failure is in the results, as what it is called, and was met with the settings that are shown."""
    shown = {row["details"]["slug"]: (row["store"], row["failure"]) for row in report()["rows"]}

    assert {failure.slug: (failure.store, failure.what) for failure in FAILURES} == shown
    assert all(f"{name}={value}" in report()["rig"] for name, value in SETTINGS.items())


def test_every_message_has_all_points() -> None:
    """Also in the results: class, parts and time are right, and the doctor finds what it is asked about."""
    rows = report()["rows"]

    assert [] == [row["details"]["slug"] for row in rows if row["score"] != len(PARTS)]
    assert [] == [row["details"]["slug"] for row in rows if row["seconds"] > BOUND_SECONDS]
    assert [] == [row["details"]["slug"] for row in rows if row["details"]["doctor visible"] and not row["doctor"]]


@pytest.mark.parametrize("attempt_seconds", [0.0, 10.0, 30.0])
def test_times_until_the_final_error(attempt_seconds: float) -> None:
    """The page has the attempts, and the longest waits between them, of the default settings."""
    policy = RetryPolicy.from_settings(LoadSettings())
    longest = sum(policy.delay(failures, None, lambda _low, high: high) for failures in range(1, policy.attempts))

    row = {0.0: "the time of the answer", 10.0: "10 s", 30.0: "30 s"}[attempt_seconds]
    assert f"| {row}" in PAGE.read_text()
    assert f"| {policy.attempts * attempt_seconds + longest:.0f} s |" in PAGE.read_text()
    assert longest < LoadSettings().retry_budget_seconds
    assert {10.0} == {cls().connect_timeout_seconds for cls in (AzureSettings, GcsSettings, HfSettings, S3Settings)}
    assert {30.0, LoadSettings().stall_seconds} == {
        cls().read_timeout_seconds for cls in (AzureSettings, GcsSettings, HfSettings, S3Settings)
    }
