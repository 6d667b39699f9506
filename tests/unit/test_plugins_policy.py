"""Asking plugins: policies, observers and factories, and who is blamed when one of them fails."""

from __future__ import annotations

import functools
import logging
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import pytest

from modelexpress_core.contracts.candidates import Candidate, LoadRequest
from modelexpress_core.errors import (
    AccessDeniedError,
    PluginError,
    PluginLoadError,
    SettingsError,
    UnknownSchemeError,
)
from modelexpress_core.events import LoadFailed, LoadFinished, LoadProgress, LoadStarted
from modelexpress_core.hooks import hookimpl
from modelexpress_core.plugins import STORAGE, PluginManager, entry_points
from modelexpress_core.providers import StorageProvider
from modelexpress_core.report import LoadReport
from modelexpress_core.uri import ModelURI

_URI = ModelURI.parse("s3://bucket/model")
_REQUEST = LoadRequest(_URI)
_CANDIDATES = tuple(Candidate(ModelURI.parse(text)) for text in ("s3://bucket/model", "/models/model", "gs://b/m"))
_REPORT = LoadReport("file:///m", {}, 1, 1, 1, 1, 1, 0, 0, 1, 1.0, {}, 1.0, 1, 0, 1, {}, {}, 0, 1)
_EVENTS = {
    "load_started": LoadStarted("1", "file:///m", "file", 1, 1, 1),
    "load_progress": LoadProgress("1", "file:///m", 1, 2, False, 1.0, 1.0, None, 0),
    "load_finished": LoadFinished("1", _REPORT),
    "load_failed": LoadFailed("1", "file:///m", RuntimeError("why"), 1.0),
}


def plugin(source: str) -> types.ModuleType:
    made = types.ModuleType("plugin")
    text = "from modelexpress_core.hooks import hookimpl\nfrom modelexpress_core.uri import ModelURI\n"
    exec(compile(text + textwrap.dedent(source), "plugin.py", "exec"), made.__dict__)
    return made


def manager(made: PluginManager | None = None, /, **sources: str | object) -> PluginManager:
    """Core and the given plugins, whose names are given with underscores."""
    from modelexpress_core import plugin as core

    made = PluginManager() if made is None else made
    for name, source in sources.items():
        made.register(plugin(source) if isinstance(source, str) else source, name=name.replace("_", "-"))
    made.register(core, name="modelexpress-core")
    return made


# -- policies ----------------------------------------------------------------------------------------------------------


def test_without_an_opinion_core_keeps_the_order_and_the_uri() -> None:
    """Core's defaults: candidates as they were found, the URI as it was given."""
    made = manager(mx_a="@hookimpl\ndef mx_rank_candidates(request, candidates):\n    return None\n")

    assert _CANDIDATES == made.rank_candidates(_REQUEST, _CANDIDATES)
    assert _URI is made.rewrite_uri(_URI, {})


def test_the_first_opinion_settles_a_policy() -> None:
    """One that returns None passes; the first result that is not None counts, an empty one too."""
    made = manager(
        mx_a="@hookimpl\ndef mx_rank_candidates(request, candidates):\n    return candidates[::-1]\n",
        mx_b="@hookimpl(tryfirst=True)\ndef mx_rank_candidates(request, candidates):\n    return None\n",
    )
    none = manager(mx_a="@hookimpl\ndef mx_rank_candidates(request, candidates):\n    return []\n")

    assert _CANDIDATES[::-1] == made.rank_candidates(_REQUEST, _CANDIDATES)
    assert () == none.rank_candidates(_REQUEST, _CANDIDATES)


@pytest.mark.parametrize("name", ["aa_plugin", "zz_plugin"])
def test_cores_default_comes_after_every_plugin_that_is_discovered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after one that asks to be last itself, whatever its name: otherwise it would never be asked."""
    import importlib.metadata
    import sys

    source = "@hookimpl(trylast=True)\ndef mx_rank_candidates(request, candidates):\n    return candidates[::-1]\n"
    monkeypatch.setitem(sys.modules, name, plugin(source))
    distribution = name.replace("_", "-")
    found = [
        entry_points.PluginEntryPoint(importlib.metadata.EntryPoint(label, value, "modelexpress.plugins"), label, "1")
        for label, value in ((distribution, name), ("modelexpress-core", "modelexpress_core.plugin"))
    ]

    made = PluginManager.discover({}, found=found)

    assert ["loaded", "loaded"] == [each.status for each in made.plugins]
    assert _CANDIDATES[::-1] == made.rank_candidates(_REQUEST, _CANDIDATES)


def test_no_candidates_are_not_ranked() -> None:
    """Without candidates the hook is not called."""
    made = manager(mx_a="@hookimpl\ndef mx_rank_candidates(request, candidates):\n    raise AssertionError\n")

    assert () == made.rank_candidates(_REQUEST, [])


def test_a_rewritten_uri_is_used_and_not_rewritten_again() -> None:
    """The URI that a plugin returns is final."""
    source = "@hookimpl\ndef mx_rewrite_uri(uri):\n    return uri.join('x')\n"

    assert "s3://bucket/model/x" == str(manager(mx_a=source).rewrite_uri(_URI, {}))


def test_a_rewriting_plugin_may_ask_for_variables() -> None:
    """Those of the load, which may differ from those of the process."""
    source = "@hookimpl\ndef mx_rewrite_uri(uri, environ):\n    return uri.join(environ['SITE'])\n"

    assert "s3://bucket/model/east" == str(manager(mx_a=source).rewrite_uri(_URI, {"SITE": "east"}))


@pytest.mark.parametrize("guilty", ["mx_a", "mx_b", "mx_c"])
def test_a_policy_that_raises_is_attributed_to_its_plugin(guilty: str) -> None:
    """Not to the ones that were asked before it, nor to the ones that would have been asked next."""
    innocent = "@hookimpl\ndef mx_rewrite_uri(uri):\n    return None\n"
    raising = "@hookimpl\ndef mx_rewrite_uri(uri):\n    return uri.no_such_attribute\n"
    names = ("mx_a", "mx_b", "mx_c")
    made = manager(**{name: raising if name == guilty else innocent for name in names})

    with pytest.raises(PluginError) as caught:
        made.rewrite_uri(_URI, {})

    name = guilty.replace("_", "-")
    assert name == caught.value.plugin
    assert "no_such_attribute" in str(caught.value)
    assert f"MX_DISABLED_PLUGINS={name}" in str(caught.value)
    assert isinstance(caught.value.__cause__, AttributeError)


def test_a_wrapper_is_not_blamed_for_what_it_wraps() -> None:
    """The exception passes through the wrapper's frame; the one that raised is deeper."""
    made = manager(
        mx_a="@hookimpl\ndef mx_rewrite_uri(uri):\n    return 1 / 0\n",
        mx_b="@hookimpl(wrapper=True)\ndef mx_rewrite_uri(uri):\n    return (yield)\n",
    )

    with pytest.raises(PluginError) as caught:
        made.rewrite_uri(_URI, {})

    assert "mx-a" == caught.value.plugin


def _traced(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(uri: ModelURI) -> object:
        return function(uri)

    return call


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_decorator_that_plugins_share_does_not_mix_them_up(guilty: int) -> None:
    """Its frame is the same for all of them; the decorated function tells them apart."""

    def raising(uri: ModelURI) -> None:
        raise ZeroDivisionError

    def innocent(uri: ModelURI) -> None: ...

    made = PluginManager()
    for number in range(2):
        function = raising if number == guilty else innocent
        namespace = types.SimpleNamespace(mx_rewrite_uri=hookimpl(_traced(function)))
        made.register(namespace, name=f"mx-{number}")

    with pytest.raises(PluginError) as caught:
        made.rewrite_uri(_URI, {})

    assert f"mx-{guilty}" == caught.value.plugin


def test_where_nobody_can_be_blamed_all_that_were_asked_are_named() -> None:
    """Two plugins of one class share their code: the message names both rather than the wrong one."""

    class Raising:
        @hookimpl
        def mx_rewrite_uri(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(PluginError) as caught:
        manager(mx_a=Raising(), mx_b=Raising()).rewrite_uri(_URI, {})

    assert "mx-a,mx-b" == caught.value.plugin


def test_an_error_of_ours_that_a_policy_raises_is_passed_on() -> None:
    """A policy that refuses a load says so with one of our errors, which is not wrapped."""

    class Refusing:
        @hookimpl
        def mx_rewrite_uri(self, uri: ModelURI) -> None:
            message = f"{uri} is not allowed here"
            raise SettingsError(message)

    with pytest.raises(SettingsError, match="not allowed here"):
        manager(mx_a=Refusing()).rewrite_uri(_URI, {})


@pytest.mark.parametrize("result", ["'s3://bucket/other'", "42", "(uri,)"])
def test_a_rewriter_that_returns_something_else_is_an_error(result: str) -> None:
    """Text is the usual slip: the message names plugin, hook, what came and what belongs there."""
    with pytest.raises(PluginError) as caught:
        manager(mx_a=f"@hookimpl\ndef mx_rewrite_uri(uri):\n    return {result}\n").rewrite_uri(_URI, {})

    assert "mx-a" == caught.value.plugin
    for part in ("mx-a", "mx_rewrite_uri", "ModelURI"):
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize("result", ["42", "candidates[0]", "['s3://bucket']", "'text'", "[c.uri for c in candidates]"])
def test_a_ranking_that_returns_something_else_is_an_error(result: str) -> None:
    """A single candidate instead of a list, URIs instead of candidates: named, with the plugin."""
    source = f"@hookimpl\ndef mx_rank_candidates(request, candidates):\n    return {result}\n"

    with pytest.raises(PluginError) as caught:
        manager(mx_a=source).rank_candidates(_REQUEST, _CANDIDATES)

    assert "mx-a" == caught.value.plugin
    for part in ("mx-a", "mx_rank_candidates", "Candidate"):
        assert part in str(caught.value), str(caught.value)


def test_a_ranking_may_be_a_generator_and_is_blamed_when_it_raises() -> None:
    """A generator fails only as it is read; that too is its plugin's fault."""
    good = "@hookimpl\ndef mx_rank_candidates(request, candidates):\n    yield from candidates[1:]\n"
    bad = "@hookimpl\ndef mx_rank_candidates(request, candidates):\n    yield candidates[0]\n    raise KeyError('x')\n"

    with pytest.raises(PluginError) as caught:
        manager(mx_a=bad).rank_candidates(_REQUEST, _CANDIDATES)

    assert _CANDIDATES[1:] == manager(mx_a=good).rank_candidates(_REQUEST, _CANDIDATES)
    assert "mx-a" == caught.value.plugin


# -- observers ---------------------------------------------------------------------------------------------------------


class Observing:
    """Keeps every event it is told."""

    def __init__(self) -> None:
        self.events: list[object] = []

    @hookimpl
    def mx_load_started(self, event: LoadStarted) -> None:
        self.events.append(event)

    @hookimpl
    def mx_load_progress(self, event: LoadProgress) -> None:
        self.events.append(event)

    @hookimpl
    def mx_load_finished(self, event: LoadFinished) -> None:
        self.events.append(event)

    @hookimpl
    def mx_load_failed(self, event: LoadFailed) -> None:
        self.events.append(event)


class Failing(Observing):
    """Fails at every event, after having kept it."""

    @hookimpl
    def mx_load_started(self, event: LoadStarted) -> None:
        super().mx_load_started(event)
        message = "observer out of order"
        raise RuntimeError(message)

    @hookimpl
    def mx_load_progress(self, event: LoadProgress) -> None:
        self.mx_load_started(event)  # type: ignore[arg-type]  # all events alike

    @hookimpl
    def mx_load_finished(self, event: LoadFinished) -> None:
        self.mx_load_started(event)  # type: ignore[arg-type]  # all events alike

    @hookimpl
    def mx_load_failed(self, event: LoadFailed) -> None:
        self.mx_load_started(event)  # type: ignore[arg-type]  # all events alike


@pytest.mark.parametrize("method", _EVENTS)
def test_every_observer_is_told_with_the_same_frozen_event(method: str) -> None:
    """One object for all, which none of them can change for the others."""
    first, second = Observing(), Observing()
    event = _EVENTS[method]

    getattr(manager(mx_a=first, mx_b=second), method)(event)

    assert [True] == [each is event for each in first.events]
    assert [True] == [each is event for each in second.events]
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        first.events[0].load_id = "2"  # type: ignore[attr-defined]  # what must not work


@pytest.mark.parametrize("method", _EVENTS)
def test_an_observer_that_raises_harms_nobody(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """The load goes on, other observers are told, and the log says whose fault it is."""
    before, failing, after = Observing(), Failing(), Observing()

    with caplog.at_level(logging.WARNING):
        getattr(manager(mx_a=before, mx_b=failing, mx_c=after), method)(_EVENTS[method])

    assert 1 == len(before.events) == len(failing.events) == len(after.events)
    assert 1 == len(caplog.records)
    for part in ("mx-b", f"mx_{method}", "observer out of order"):
        assert part in caplog.records[0].getMessage()


def test_an_observer_that_keeps_raising_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """Progress comes several times a second: the log must not fill. Each plugin has its own minute."""
    now = [1000.0]
    made = manager(PluginManager(clock=lambda: now[0]), mx_a=Failing(), mx_b=Failing())
    event = _EVENTS["load_progress"]

    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            made.load_progress(event)  # type: ignore[arg-type]  # one of several types
            now[0] += 1.0
        first = len(caplog.records)
        now[0] += 30.0
        made.load_progress(event)  # type: ignore[arg-type]  # one of several types

    assert 2 == first
    assert 4 == len(caplog.records)


def test_an_observer_may_leave_the_event_out() -> None:
    """Hooks are called with the arguments that they name, as everywhere in pluggy."""
    called = []

    class Counting:
        @hookimpl
        def mx_load_started(self) -> None:
            called.append(1)

    manager(mx_a=Counting()).load_started(_EVENTS["load_started"])  # type: ignore[arg-type]  # one of several types

    assert [1] == called


def test_what_an_observer_returns_is_ignored() -> None:
    """Even a value that would settle a policy keeps no other observer from being told."""
    observing = Observing()
    returning = "@hookimpl\ndef mx_load_started(event):\n    return event\n"
    made = manager(mx_a=observing, mx_b=returning, mx_c=returning)

    made.load_started(_EVENTS["load_started"])  # type: ignore[arg-type]  # one of several types

    assert 1 == len(observing.events)


# -- factories ---------------------------------------------------------------------------------------------------------


class Shelf:
    """The least that is a storage."""

    def list(self, prefix: str) -> Iterator[Any]: ...  # type: ignore[empty-body]

    def stat(self, path: str) -> Any: ...

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int: ...  # type: ignore[empty-body]

    def close(self) -> None: ...


def opening(factory: Callable[[ModelURI, Mapping[str, str]], Any], **options: Any) -> PluginManager:
    class Offering:
        @hookimpl
        def mx_register_storages(self) -> list[StorageProvider]:
            return [StorageProvider("shelf", ("shelf",), factory, **options)]

    return manager(mx_shelf=Offering())


_SHELF = ModelURI.parse("shelf://user:hunter2@top/model?token=hunter2")


def test_a_factory_gets_the_uri_and_the_settings_at_first_use() -> None:
    """It is called with the parsed URI and the mapping, not before, and its product comes back."""
    calls: list[tuple[object, object]] = []
    shelf = Shelf()

    def factory(uri: ModelURI, settings: Mapping[str, str]) -> Shelf:
        calls.append((uri, settings))
        return shelf

    made = opening(factory)
    before = list(calls)
    registered, storage = made.open(STORAGE, _SHELF, {"A": "1"})

    assert [] == before
    assert [(_SHELF, {"A": "1"})] == calls
    assert "mx-shelf" == registered.plugin.name
    assert shelf is storage


@pytest.mark.parametrize(
    ("hint", "command"), [("mx-shelf[sdk]", "pip install 'mx-shelf[sdk]'"), (None, "pip install 'mx-shelf'")]
)
def test_a_missing_sdk_gives_the_pip_command(hint: str | None, command: str) -> None:
    """The plugin is there and its SDK is not: the message names the package and how to get it."""

    def factory(uri: ModelURI, settings: Mapping[str, str]) -> Shelf:
        import mx_no_such_sdk  # type: ignore[import-not-found]  # on purpose

        return mx_no_such_sdk

    with pytest.raises(PluginLoadError) as caught:
        opening(factory, install_hint=hint).open(STORAGE, _SHELF, {})

    assert "mx-shelf" == caught.value.plugin
    assert "mx_no_such_sdk" in str(caught.value)
    assert command in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_an_sdk_of_the_wrong_version_is_not_called_missing() -> None:
    """The package is installed, it only lacks a name: saying that it is missing would send people astray."""

    def factory(uri: ModelURI, settings: Mapping[str, str]) -> Shelf:
        from json import no_such_name  # type: ignore[attr-defined]  # on purpose

        return no_such_name

    with pytest.raises(PluginLoadError) as caught:
        opening(factory).open(STORAGE, _SHELF, {})

    assert "missing" not in str(caught.value)
    assert "no_such_name" in str(caught.value)
    assert "pip install" in str(caught.value)


def test_a_factory_that_raises_is_attributed_to_its_plugin() -> None:
    """With the exception as the cause, and without the credentials of the URI."""

    def factory(uri: ModelURI, settings: Mapping[str, str]) -> Shelf:
        message = "no shelf"
        raise KeyError(message)

    with pytest.raises(PluginLoadError) as caught:
        opening(factory).open(STORAGE, _SHELF, {})

    assert "mx-shelf" == caught.value.plugin
    assert isinstance(caught.value.__cause__, KeyError)
    for part in ("mx-shelf", "no shelf", "shelf://***@top/model?token=***"):
        assert part in str(caught.value), str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_an_error_of_ours_that_a_factory_raises_is_passed_on() -> None:
    """A factory that classifies its failure is not second-guessed."""

    def factory(uri: ModelURI, settings: Mapping[str, str]) -> Shelf:
        reason = "wrong key"
        raise AccessDeniedError(reason, uri=str(uri))

    with pytest.raises(AccessDeniedError, match="wrong key"):
        opening(factory).open(STORAGE, _SHELF, {})


@pytest.mark.parametrize(
    ("product", "said"), [(None, "NoneType"), (object(), "object"), (Shelf, "class"), ("shelf", "str")]
)
def test_a_factory_that_returns_no_storage_is_found_out_at_once(product: object, said: str) -> None:
    """A forgotten ``return`` or pair of parentheses is the plugin's fault, not an AttributeError in the engine."""
    with pytest.raises(PluginLoadError) as caught:
        opening(lambda uri, settings: product).open(STORAGE, _SHELF, {})

    assert "mx-shelf" == caught.value.plugin
    assert said in str(caught.value)


def test_opening_an_unknown_scheme_is_a_resolve_error() -> None:
    """What ``lookup`` raises comes through ``open_storage``."""
    with pytest.raises(UnknownSchemeError, match="quux"):
        manager().open(STORAGE, ModelURI.parse("quux://a/b"), {})


def test_settings_classes_of_records_come_with_their_distribution() -> None:
    """For ``mx settings``: each class once, though two records share it."""

    @attrs.frozen
    class ShelfSettings:
        pass

    class Offering:
        @hookimpl
        def mx_register_storages(self) -> list[StorageProvider]:
            return [
                StorageProvider(name, (name,), lambda uri, settings: Shelf(), settings=ShelfSettings)
                for name in ("one", "two")
            ]

    pairs = manager(mx_shelf=Offering()).settings_classes()
    assert [("mx-shelf", ShelfSettings)] == [pair for pair in pairs if pair[0] != "modelexpress-core"]
