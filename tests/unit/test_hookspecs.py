"""The hook contract is the reference of hooks: it explains every hook, with an example that runs."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

from modelexpress_core import hooks, hookspecs
from modelexpress_core.hooks import PROJECT_NAME
from modelexpress_core.plugins import KINDS, PluginManager

_HOOKS: dict[str, Callable[..., Any]] = {
    name: function for name, function in vars(hookspecs).items() if hasattr(function, f"{PROJECT_NAME}_spec")
}
_REGISTER = {
    "mx_register_storages",
    "mx_register_transports",
    "mx_register_discoveries",
    "mx_register_metadata_stores",
    "mx_register_authenticators",
    "mx_register_server_services",
    "mx_register_commands",
}
_POLICY = {"mx_rank_candidates": ("request", "candidates"), "mx_rewrite_uri": ("uri", "environ")}
_OBSERVE = {"mx_load_started", "mx_load_progress", "mx_load_finished", "mx_load_failed"}


def example(hook: str) -> doctest.DocTest:
    return doctest.DocTestParser().get_doctest(inspect.getdoc(_HOOKS[hook]) or "", {}, hook, "hookspecs.py", 0)


def test_there_are_three_kinds_of_hook_and_nothing_else() -> None:
    """Register, policy and observe hooks, as the architecture lists them."""
    assert _REGISTER | set(_POLICY) | _OBSERVE == set(_HOOKS)
    assert _REGISTER == {kind.hook for kind in KINDS}


def test_nothing_with_our_prefix_lacks_the_marker() -> None:
    """A function without the marker would look like a hook and never be called."""
    assert set(_HOOKS) == {name for name in dir(hookspecs) if name.startswith("mx_")}


@pytest.mark.parametrize("hook", sorted(_REGISTER))
def test_register_hooks_take_no_arguments(hook: str) -> None:
    """They always return the same records, independent of URI and settings."""
    assert [] == list(inspect.signature(_HOOKS[hook]).parameters)
    assert not getattr(_HOOKS[hook], f"{PROJECT_NAME}_spec")["firstresult"]


@pytest.mark.parametrize("hook", sorted(_POLICY))
def test_policy_hooks_are_settled_by_the_first_result(hook: str) -> None:
    """``firstresult``, with the arguments that the contract names."""
    assert _POLICY[hook] == tuple(inspect.signature(_HOOKS[hook]).parameters)
    assert getattr(_HOOKS[hook], f"{PROJECT_NAME}_spec")["firstresult"]


@pytest.mark.parametrize("hook", sorted(_OBSERVE))
def test_observe_hooks_take_one_event(hook: str) -> None:
    """One frozen object, so that new fields break no plugin."""
    assert ["event"] == list(inspect.signature(_HOOKS[hook]).parameters)
    assert not getattr(_HOOKS[hook], f"{PROJECT_NAME}_spec")["firstresult"]


@pytest.mark.parametrize("hook", sorted(_HOOKS))
def test_every_hook_says_when_it_is_not_called(hook: str) -> None:
    """Its docstring says so before the example."""
    text = " ".join((inspect.getdoc(_HOOKS[hook]) or "").partition("Example:")[0].split())

    assert re.search(r"(Not|not|Never) (called|used)\b.*\.", text), text


@pytest.mark.parametrize("hook", sorted(_HOOKS))
def test_the_example_of_every_hook_runs(hook: str) -> None:
    """It imports the marker, implements its hook, and prints the output that it shows."""
    test = example(hook)
    printed: list[str] = []

    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=printed.append, clear_globs=False)

    assert result.attempted > 0
    assert 0 == result.failed, "".join(printed)
    assert hasattr(test.globs[hook], f"{PROJECT_NAME}_impl")


@pytest.mark.parametrize("hook", sorted(_HOOKS))
def test_the_example_of_every_hook_is_accepted_by_the_loader(hook: str) -> None:
    """A module with a copy of it is a plugin that loads."""
    test = example(hook)
    doctest.DocTestRunner().run(test, out=lambda text: None, clear_globs=False)

    class Copied:
        pass

    setattr(Copied, hook, staticmethod(test.globs[hook]))
    manager = PluginManager()
    info = manager.register(Copied(), name="mx-copied")

    assert "loaded" == info.status
    assert (hook in _REGISTER) == bool(info.schemes)


def test_the_example_of_storages_imports_its_storage_in_the_factory_only() -> None:
    """Authors copy it, so it shows that the factory imports the SDK."""
    source = "".join(part.source for part in example("mx_register_storages").examples)
    outside = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    factories = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    inside = [node for factory in factories for node in ast.walk(factory) if isinstance(node, ast.ImportFrom)]

    assert ["modelexpress_core"] * len(outside) == [
        (node.module or "").partition(".")[0] for node in outside if isinstance(node, ast.ImportFrom)
    ]
    assert ["mx_hello._storage"] == [node.module for node in inside]


def test_the_markers_bear_the_name_of_the_project() -> None:
    """pluggy finds implementations by this name, so it is part of the contract."""
    assert "modelexpress" == hooks.PROJECT_NAME == hooks.hookimpl.project_name == hooks.hookspec.project_name


def test_the_module_of_the_markers_imports_nothing_but_pluggy() -> None:
    """So that marking functions costs no other import."""
    tree = ast.parse(inspect.getsource(hooks))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}

    assert {"__future__", "pluggy"} == imported
