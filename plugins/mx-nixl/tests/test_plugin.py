"""What the plugin registers, and what it says if NIXL is not there or does not work."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import pytest

from modelexpress_core.contracts.candidates import Peer, Tier
from modelexpress_core.errors import PluginLoadError, SettingsError
from modelexpress_core.plugins import TRANSPORT, PluginManager
from modelexpress_core.settings import variables
from modelexpress_core.testing import PluginContract
from modelexpress_core.uri import ModelURI
from mx_nixl._agent import MODULES
from mx_nixl._errors import nixl_errors
from mx_nixl.settings import NixlSettings


class TestNixlPlugin(PluginContract):
    """The rules for every installed plugin."""

    distribution = "mx-nixl"
    sdks: ClassVar[tuple[str, ...]] = (*filter(find_spec, MODULES), "numpy", "torch", "grpc")
    first_party = True


def test_is_found_and_handles_nixl() -> None:
    """Workers of which nothing is known come after those of the bulk channel, which is faster without a fabric."""
    registered = PluginManager.discover({"MX_STRICT_PLUGINS": "1"}).table(TRANSPORT).lookup("nixl")

    assert "mx-nixl" == registered.plugin.name
    assert NixlSettings is registered.provider.settings
    assert Tier.OTHER_PEER is registered.provider.tier_of(None, {})
    assert Tier.OTHER_PEER is registered.provider.tier_of(Peer("id", "w"), {})


@pytest.mark.parametrize(("environ", "offered"), [({"MX_NIXL_OFFER": "1"}, True), ({"MX_NIXL_OFFER": "0"}, False)])
def test_the_user_says_whether_workers_offer_their_tensors(environ: dict[str, str], offered: bool) -> None:
    """Because a reader gets access to the whole process."""
    provider = PluginManager.discover({}).table(TRANSPORT).lookup("nixl").provider

    assert offered is provider.is_offered(environ)


@pytest.mark.skipif(Path("/sys/class/infiniband").is_dir(), reason="this machine has an RDMA device")
def test_without_a_fabric_workers_do_not_offer_their_tensors() -> None:
    """Unless the user says so."""
    assert not PluginManager.discover({}).table(TRANSPORT).lookup("nixl").provider.is_offered({})


def test_a_wrong_setting_is_named() -> None:
    """With what is possible."""
    with pytest.raises(SettingsError, match=r"MX_NIXL_BACKEND.*UCX, LIBFABRIC"):
        PluginManager.discover({}).open(TRANSPORT, ModelURI("nixl"), {"MX_NIXL_BACKEND": "TCP"})


def test_the_readme_names_every_variable() -> None:
    """With its meaning."""
    text = (Path(__file__).parents[1] / "README.md").read_text()

    assert [] == [variable for variable in variables(NixlSettings) if f"`{variable}`" not in text]


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides all packages of NIXL."""
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.usefixtures("no_library")
def test_without_nixl_the_message_has_the_install_command() -> None:
    """It names the package."""
    with pytest.raises(PluginLoadError, match="the package nixl is missing") as caught:
        PluginManager.discover({}).open(TRANSPORT, ModelURI("nixl"), {})

    assert caught.value.hint is not None
    assert "plugins/mx-nixl[cu12]" in caught.value.hint


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("libcudart.so.13: cannot open shared object file: No such file or directory", "libraries of CUDA"),
        ("libfoo.so: undefined symbol: bar", None),
    ],
)
def test_a_stand_in_for_a_wheel_that_does_not_import_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, cause: str | None
) -> None:
    """With its reason, and the likely cause if that is CUDA."""
    monkeypatch.delitem(sys.modules, "nixl_cu13")
    (tmp_path / "nixl_cu13").mkdir()
    (tmp_path / "nixl_cu13" / "__init__.py").touch()
    (tmp_path / "nixl_cu13" / "_api.py").write_text(f"raise ImportError({said!r})")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(PluginLoadError, match="nixl-cu13 is installed, but does not import: lib") as caught:
            PluginManager.discover({}).open(TRANSPORT, ModelURI("nixl"), {})
    finally:
        sys.modules.pop("nixl_cu13", None)

    assert (cause is None) is (caught.value.cause is None)
    assert cause is None or cause in str(caught.value)


@pytest.mark.usefixtures("nixl")
@pytest.mark.parametrize("level", ["", "DEBUG"])
def test_nothing_is_written_to_stdout(level: str) -> None:
    """UCX and NIXL log to stderr, also if the user asks for more; the message names the transports that are missing."""
    program = """
import logging
from mx_nixl._agent import Agent
from modelexpress_core.errors import UnavailableError
before = logging.raiseExceptions
try:
    Agent("a", "UCX")
except UnavailableError as exc:
    assert "UCX_TLS is 'nonsense', and UCX finds none of these transports" in str(exc), exc
else:
    raise AssertionError("the agent was made")
assert logging.raiseExceptions == before
"""
    environ = {**os.environ, "UCX_TLS": "nonsense", **({"NIXL_LOG_LEVEL": level} if level else {})}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environ)

    assert (0, "") == (ended.returncode, ended.stdout), ended.stderr
    assert "transport 'nonsense' is not available" in ended.stderr


@pytest.mark.usefixtures("nixl")
def test_every_exception_of_nixl_has_a_meaning() -> None:
    """The bindings have no other one."""
    from mx_nixl._agent import library
    from mx_nixl._errors import _MEANINGS

    bindings = library().nixlBind

    assert {name for name in dir(bindings) if name.startswith("nixl") and name.endswith("Error")} == set(_MEANINGS)


def test_errors_of_others_stay() -> None:
    """Only those of NIXL are translated."""
    with pytest.raises(KeyError), nixl_errors("read", "nixl://w"):
        raise KeyError("mine")
