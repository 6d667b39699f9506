"""What the plugin registers: its record, its settings, its documentation."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from modelexpress_core.contracts.candidates import Tier
from modelexpress_core.plugins import TRANSPORT, PluginManager
from modelexpress_core.testing import PluginContract
from mx_grpc_stream.settings import GrpcStreamSettings


class TestGrpcStreamPlugin(PluginContract):
    """The rules for every installed plugin."""

    distribution = "mx-grpc-stream"
    sdks: ClassVar[tuple[str, ...]] = ("grpc", "torch", "google.protobuf")
    first_party = True


def test_is_found_and_handles_grpc() -> None:
    """Its peers come after those with a fabric, and workers offer their tensors over it."""
    registered = PluginManager.discover({"MX_STRICT_PLUGINS": "1"}).table(TRANSPORT).lookup("grpc")

    assert "mx-grpc-stream" == registered.plugin.name
    assert GrpcStreamSettings is registered.provider.settings
    assert Tier.PEER is registered.provider.tier
    assert registered.provider.offered


def test_the_readme_names_every_variable() -> None:
    """With the default."""
    text = (Path(__file__).parents[1] / "README.md").read_text()

    assert "MX_GRPC_READ_TIMEOUT_SECONDS" in text
