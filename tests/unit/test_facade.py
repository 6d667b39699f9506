"""The public face of the package."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import modelexpress_core as mx

PUBLIC = [
    "AccessDeniedError",
    "BackendError",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFile",
    "DeadlineError",
    "DeferredWeights",
    "Explanation",
    "IncompleteLoadError",
    "IntegrityError",
    "InvalidURIError",
    "LoadReport",
    "ModelExpressError",
    "ModelURI",
    "NotFoundError",
    "PlacementError",
    "PluginApiError",
    "PluginConflictError",
    "PluginError",
    "PluginLoadError",
    "PluginManager",
    "PullReport",
    "ResolveError",
    "ResourceError",
    "SettingsError",
    "SourceChangedError",
    "SourceIdentity",
    "StillArrivingError",
    "TensorInfo",
    "ThrottledError",
    "UnavailableError",
    "UnknownSchemeError",
    "UnsupportedError",
    "deferred_weights",
    "explain",
    "hookimpl",
    "load_into",
    "load_state_dict",
    "open_checkpoint",
    "own_identity",
    "publish",
    "pull",
]

MODULES = [
    info.name for info in pkgutil.walk_packages(mx.__path__, "modelexpress_core.") if not info.name.endswith("__main__")
]


def test_the_public_names_are_these() -> None:
    """Adding or removing one is a decision."""
    assert mx.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name: str) -> None:
    """Lazy as they are, all of them resolve, and dir() shows them."""
    assert getattr(mx, name) is not None
    assert name in dir(mx)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Laziness does not swallow a misspelling."""
    with pytest.raises(AttributeError, match="load_statedict"):
        _ = mx.load_statedict


@pytest.mark.parametrize("name", MODULES)
def test_what_a_module_calls_public_is_there(name: str) -> None:
    """Each name of ``__all__`` exists, once."""
    module = importlib.import_module(name)
    public = list(getattr(module, "__all__", ()))

    assert [entry for entry in public if not hasattr(module, entry)] == []
    assert len(set(public)) == len(public)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_knows(name: str) -> None:
    """The first line of the docstring is a sentence."""
    first = (importlib.import_module(name).__doc__ or "").strip().split("\n\n")[0]

    assert first.endswith((".", ":")) or "``" in first
