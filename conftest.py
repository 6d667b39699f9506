"""What the tests of all packages share: servers of object stores, a clean environment, and how tests are told apart."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from devtools.azurite import Azurite
from devtools.fake_gcs import FakeGcs
from devtools.kube_apiserver import KubeApiServer
from devtools.missing import ToolMissingError
from devtools.seaweedfs import SeaweedFS
from modelexpress_core.plugins import plugin_packages
from tests.support.network import CLOSED_PORT
from tests.support.tools import MISSING_TOOL, skip_without

BUCKET = "models"

#: Fixtures that start a server; the tests that use one are marked ``server``.
_SERVER_FIXTURES = {"azurite", "gcs_server", "kube_apiserver", "s3_server"}

#: Variables that our settings and the SDKs read.
_READ_VARIABLES = (
    "AWS_",
    "AZURE_",
    "CLOUDSDK_",
    "CLOUD_STORAGE_",
    "GCE_",
    "GOOGLE_",
    "HF_",
    "HUGGING",
    "IDENTITY_",
    "IMDS_",
    "KUBECONFIG",
    "KUBERNETES_",
    "MODEL_EXPRESS_",
    "MSI_",
    "MX_",
    "NO_GCE_CHECK",
    "REQUESTS_",
    "RUNAI_",
    "STORAGE_EMULATOR_HOST",
)

_MAX_WORKERS = 16

if find_spec("hypothesis"):  # the environment with vLLM does without it
    from tests.support.properties import load_profile

    load_profile()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--require-tools`` turns skips for want of a tool into failures, for machines that should have all of them."""
    parser.addoption("--require-tools", action="store_true", help=f"fail tests that skip with '{MISSING_TOOL}...'")
    parser.addoption(
        "--optional-tool", action="append", default=[], help="a tool that --require-tools does not require"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two workers for each core with ``-n auto``: tests wait for servers and processes more than they compute."""
    return min(_MAX_WORKERS, 2 * len(os.sched_getaffinity(0)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:  # noqa: ANN401 - types of xdist
    """With ``--dist loadgroup``, keep the tests of files that are marked with one ``xdist_group`` in one worker."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from tests.support.scheduling import GroupScheduling

    return GroupScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start a server."""
    for item in items:
        if _SERVER_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("server")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    """Skip a test whose fixtures need a tool that this machine lacks."""
    try:
        return (yield)
    except ToolMissingError as exc:
        skip_without(str(exc))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip a test that starts a tool that this machine lacks."""
    try:
        return (yield)
    except ToolMissingError as exc:
        skip_without(str(exc))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Fail a test that skips for want of a tool, under ``--require-tools``."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple) and item.config.getoption("require_tools"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        optional = tuple(f"{MISSING_TOOL}{tool}:" for tool in item.config.getoption("optional_tool"))
        if reason.startswith(MISSING_TOOL) and not reason.startswith(optional):
            report.outcome, report.longrepr = "failed", f"{reason} (--require-tools)"
    return report


@pytest.fixture(scope="session")
def our_loggers() -> list[logging.Logger]:
    """Those of core and of the installed plugins."""
    return [logging.getLogger(name) for name in ("modelexpress_core", *plugin_packages())]


@pytest.fixture(autouse=True)
def _logging_as_before(our_loggers: list[logging.Logger]) -> Iterator[None]:
    """Put back what a command that a test runs in this process changes: levels of our loggers, and where logs go."""
    levels = [logger.level for logger in our_loggers]
    yield
    for logger, level in zip(our_loggers, levels, strict=True):
        logger.setLevel(level)
    for handler in logging.root.handlers[:]:
        if type(handler) is logging.StreamHandler:  # pytest's own handlers are subclasses
            logging.root.removeHandler(handler)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[SeaweedFS]:
    """SeaweedFS with the bucket ``models``; each worker starts one at first use, and stops it at the end."""
    with SeaweedFS(BUCKET) as server:
        yield server


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[FakeGcs]:
    """fake-gcs-server with the bucket ``models``; each worker starts one at first use, and stops it at the end."""
    with FakeGcs(BUCKET) as server:
        yield server


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    """Azurite with the container ``models``; each worker starts one at first use, and stops it at the end."""
    with Azurite("models") as server:
        yield server


@pytest.fixture(scope="session")
def kube_apiserver() -> Iterator[KubeApiServer]:
    """kube-apiserver and etcd; each worker starts them at first use, and stops them at the end.

    A test takes a namespace of its own. One that kills or freezes the API server starts another one.
    """
    with KubeApiServer() as server:
        yield server


@pytest.fixture
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove from the environment what SDKs read from it, and hide the configuration files of this machine."""
    for name in list(os.environ):
        if name.startswith(_READ_VARIABLES) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("COLUMNS", "LINES"):  # a width would cut the tables that commands print
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "no-gcloud"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-hugging-face"))
    monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", f"http://127.0.0.1:{CLOSED_PORT}")
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "ManagedIdentityCredential")
