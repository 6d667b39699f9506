"""Which plugin handles which scheme: lookups, conflicts, preferences, and what an unknown scheme is told."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from modelexpress_core.errors import (
    ModelExpressError,
    PluginConflictError,
    PluginLoadError,
    SettingsError,
    UnknownSchemeError,
)
from modelexpress_core.hooks import hookimpl
from modelexpress_core.installing import install_command
from modelexpress_core.known_schemes import KNOWN_SCHEMES, SYNONYMS
from modelexpress_core.plugins import METADATA_STORE, STORAGE, TRANSPORT, PluginManager
from modelexpress_core.providers import MetadataStoreProvider, StorageProvider, TransportProvider
from modelexpress_core.registry import PluginInfo, Registered, SchemeTable
from modelexpress_core.settings import PluginSettings
from modelexpress_core.uri import ModelURI


class Plugin:
    """A plugin registered from code, with the given records."""

    def __init__(
        self, storages: Iterable[Any] = (), transports: Iterable[Any] = (), stores: Iterable[Any] = ()
    ) -> None:
        self._records = {"storages": storages, "transports": transports, "stores": stores}

    @hookimpl
    def mx_register_storages(self) -> Iterable[Any]:
        return self._records["storages"]

    @hookimpl
    def mx_register_transports(self) -> Iterable[Any]:
        return self._records["transports"]

    @hookimpl
    def mx_register_metadata_stores(self) -> Iterable[Any]:
        return self._records["stores"]


def storage(name: str, *schemes: str, alternative: bool = False) -> StorageProvider:
    return StorageProvider(name, schemes, print, alternative=alternative)  # type: ignore[arg-type]  # never called


def manager(plugins: Mapping[str, Plugin], **prefer: str) -> PluginManager:
    made = PluginManager(PluginSettings(prefer=prefer))
    for name, plugin in plugins.items():
        made.register(plugin, name=name)
    return made


def table(
    *plugins: PluginInfo, records: Mapping[str, StorageProvider] | None = None, **prefer: str
) -> SchemeTable[Any]:
    infos = {plugin.name: plugin for plugin in plugins}
    registered = tuple(
        Registered(record, infos.setdefault(name, PluginInfo(name))) for name, record in (records or {}).items()
    )
    return SchemeTable("storage", registered, prefer, tuple(infos.values()))


def outcome(tables: SchemeTable[Any], scheme: str) -> str:
    """What a lookup comes to, as text that can be compared."""
    try:
        found = tables.lookup(scheme)
    except ModelExpressError as exc:
        return f"{type(exc).__name__}: {exc}"
    return f"{found.plugin.name}/{found.provider.name}"


# -- conflicts and preferences -----------------------------------------------------------------------------------------


def test_a_conflict_names_both_distributions_and_the_line_that_settles_it() -> None:
    """Only the user settles a conflict, so the message holds what the user needs."""
    storages = manager({"mx-b": Plugin([storage("b", "s3")]), "mx-a": Plugin([storage("a", "s3")])}).table(STORAGE)

    with pytest.raises(PluginConflictError) as caught:
        storages.lookup("s3")

    text = str(caught.value)
    for part in ("mx-a", "mx-b", "s3", "MX_PREFER=s3=mx-a", "MX_PREFER=s3=mx-b"):
        assert part in text, text


def test_a_conflict_over_one_scheme_leaves_the_others_usable() -> None:
    """Other schemes, of the same plugins too, resolve as if nothing were wrong."""
    plugins = {"mx-a": Plugin([storage("a", "s3", "left")]), "mx-b": Plugin([storage("b", "s3", "right")])}
    storages = manager(plugins).table(STORAGE)

    assert "mx-a" == storages.lookup("left").plugin.name
    assert "mx-b" == storages.lookup("right").plugin.name
    assert ["s3"] == [conflict.args[0].split("scheme ")[1].split(":")[0] for conflict in storages.conflicts()]


@pytest.mark.parametrize("preferred", ["mx-a", "mx-b"])
def test_prefer_settles_a_conflict(preferred: str) -> None:
    """``MX_PREFER`` names the distribution that is to handle the scheme."""
    plugins = {"mx-a": Plugin([storage("a", "s3")]), "mx-b": Plugin([storage("b", "s3")])}

    storages = manager(plugins, s3=preferred).table(STORAGE)

    assert preferred == storages.lookup("s3").plugin.name
    assert () == storages.conflicts()


def test_prefer_may_name_a_record() -> None:
    """Where a distribution offers several records for a scheme, the record's name says which."""
    records = [storage("plain", "s3"), storage("fast", "s3", alternative=True)]

    assert "fast" == manager({"mx-a": Plugin(records)}, s3="fast").table(STORAGE).lookup("s3").provider.name
    assert "plain" == manager({"mx-a": Plugin(records)}, s3="plain").table(STORAGE).lookup("s3").provider.name
    assert "plain" == manager({"mx-a": Plugin(records)}, s3="mx-a").table(STORAGE).lookup("s3").provider.name


@pytest.mark.parametrize("claims", [1, 2])
def test_prefer_that_names_nobody_is_an_error_that_lists_the_choice(claims: int) -> None:
    """A misspelt preference is never ignored, whether or not it was needed."""
    plugins = {f"mx-{letter}": Plugin([storage(letter, "s3")]) for letter in "ab"[:claims]}

    with pytest.raises(SettingsError) as caught:
        manager(plugins, s3="mx-nobody").table(STORAGE).lookup("s3")

    text = str(caught.value)
    for part in ("MX_PREFER=s3=mx-nobody", *plugins):
        assert part in text, text


@pytest.mark.parametrize("status", ["broken", "disabled"])
def test_prefer_that_names_an_unusable_plugin_says_why_it_is(status: str) -> None:
    """Nothing takes the place of the plugin that the user asked for, and the reason is given."""
    with pytest.raises(ModelExpressError) as caught:
        table(
            PluginInfo("mx-fast", "1", status, "the reason"), records={"mx-s3": storage("mx-s3", "s3")}, s3="mx-fast"
        ).lookup("s3")

    assert isinstance(caught.value, PluginLoadError)
    for part in ("mx-fast", status, "the reason", "mx-s3"):
        assert part in str(caught.value), str(caught.value)


def test_prefer_for_one_kind_leaves_a_scheme_of_the_same_name_alone() -> None:
    """``memory`` is a storage and a metadata store: preferring a storage must not break the store."""
    plugins = {
        "mx-core": Plugin([storage("memory", "memory")], stores=[MetadataStoreProvider("memory", ("memory",), print)]),
        "mx-mine": Plugin([storage("mine", "memory", alternative=True)]),
    }

    for preferred in ("mx-mine", "mine"):
        made = manager(plugins, memory=preferred)
        assert "mx-mine" == made.table(STORAGE).lookup("memory").plugin.name
        assert "mx-core" == made.table(METADATA_STORE).lookup("memory").plugin.name


def test_one_word_may_be_a_scheme_of_two_kinds_without_conflict() -> None:
    """Tables are by kind: a storage and a transport called alike do not meet."""
    plugins = {
        "mx-a": Plugin([storage("a", "grpc")]),
        "mx-b": Plugin(transports=[TransportProvider("b", ("grpc",), print)]),
    }

    made = manager(plugins)

    assert "mx-a" == made.table(STORAGE).lookup("grpc").plugin.name
    assert "mx-b" == made.table(TRANSPORT).lookup("grpc").plugin.name


# -- alternatives ------------------------------------------------------------------------------------------------------


def test_an_alternative_is_used_only_when_it_is_preferred() -> None:
    """It neither conflicts with the regular record nor takes its place unasked."""
    plugins = {"mx-a": Plugin([storage("a", "s3")]), "mx-z": Plugin([storage("z", "s3", alternative=True)])}

    assert "mx-a" == manager(plugins).table(STORAGE).lookup("s3").plugin.name
    assert () == manager(plugins).table(STORAGE).conflicts()
    assert "mx-z" == manager(plugins, s3="mx-z").table(STORAGE).lookup("s3").plugin.name


def test_an_alternative_alone_is_not_used_and_says_how_it_would_be() -> None:
    """Without a regular record the scheme is unknown, with the setting that makes it known."""
    storages = manager({"mx-z": Plugin([storage("z", "shout", alternative=True)])}).table(STORAGE)

    with pytest.raises(UnknownSchemeError) as caught:
        storages.lookup("shout")

    assert "MX_PREFER=shout=mx-z" in str(caught.value)
    assert () == storages.conflicts()


def test_the_settings_that_an_error_suggests_work() -> None:
    """Every ``MX_PREFER`` line of a message resolves, also where one distribution offers two alternatives."""
    plugins = {
        "mx-y": Plugin([storage("slow", "shout", alternative=True), storage("fast", "shout", alternative=True)]),
        "mx-z": Plugin([storage("z", "shout", alternative=True)]),
    }
    with pytest.raises(UnknownSchemeError) as caught:
        manager(plugins).table(STORAGE).lookup("shout")
    lines = [word.strip(".,") for word in str(caught.value).split() if word.startswith("MX_PREFER=shout=")]

    found = {
        manager(plugins, shout=line.rpartition("=")[2]).table(STORAGE).lookup("shout").provider.name for line in lines
    }

    assert {"slow", "fast", "z"} == found, str(caught.value)


# -- any order ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_order_of_registration_changes_anything() -> None:
    """All 720 orders of six plugins give the same schemes and the same outcome for each.

    Among them are a conflict, a conflict that is settled, alternatives, and one that cannot be registered.
    """
    plugins = {
        "mx-a": Plugin([storage("a", "clash", "settled", "only-a")]),
        "mx-b": Plugin([storage("b", "clash", "settled")]),
        "mx-c": Plugin([storage("c", "clash", alternative=True), storage("c2", "asked", alternative=True)]),
        "mx-d": Plugin([storage("d", "only-d"), storage("d2", "only-d", alternative=True)]),
        "mx-e": Plugin([storage("e", "two"), storage("e2", "two")]),
        "mx-f": Plugin([storage("f", "clash", "asked", alternative=True)]),
    }

    outcomes = set()
    for order in itertools.permutations(plugins):
        made = PluginManager(PluginSettings(prefer={"settled": "mx-b", "only-a": "mx-nobody"}))
        for name in order:
            if name == "mx-e":
                with pytest.raises(PluginLoadError, match="two twice"):
                    made.register(plugins[name], name=name)
            else:
                made.register(plugins[name], name=name)
        schemes = ("clash", "settled", "only-a", "asked", "only-d", "two", "nobody")
        outcomes.add((made.table(STORAGE).schemes, *(outcome(made.table(STORAGE), scheme) for scheme in schemes)))

    assert 1 == len(outcomes)
    schemes, clash, settled, only_a, asked, only_d, two, nobody = outcomes.pop()
    assert ("asked", "clash", "only-a", "only-d", "settled") == schemes
    assert clash.startswith("PluginConflictError: 2 plugins claim the storage scheme clash: mx-a (a) and mx-b (b)")
    assert "mx-b/b" == settled
    assert only_a.startswith("SettingsError")
    assert asked.startswith("UnknownSchemeError")
    assert "mx-d/d" == only_d
    assert two.startswith("UnknownSchemeError")
    assert nobody.startswith("UnknownSchemeError")


def test_the_order_of_records_within_a_table_does_not_matter() -> None:
    """The same holds for a table that is built by hand."""
    records = {f"mx-{letter}": storage(letter, "s3") for letter in "abcd"}

    texts = {outcome(table(records=dict(order)), "s3") for order in itertools.permutations(records.items())}

    assert 1 == len(texts), texts


# -- unknown schemes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", sorted(scheme for scheme, known in KNOWN_SCHEMES.items() if known.extra))
def test_a_first_party_scheme_that_is_not_installed_gives_the_pip_command(scheme: str) -> None:
    """The message lists what is installed and ends with the command to paste."""
    with pytest.raises(UnknownSchemeError) as caught:
        table(records={"mx-z": storage("mx-z", "zz")}).lookup(scheme)

    hint = KNOWN_SCHEMES[scheme].install_hint
    assert hint is not None
    assert install_command(hint) in str(caught.value)
    assert "zz" in str(caught.value)
    assert repr(scheme) in str(caught.value)


def test_a_stranger_scheme_lists_what_is_there() -> None:
    """Where no package is known for the scheme, at least the installed schemes are."""
    made = manager({"mx-a": Plugin([storage("a", "aa")]), "mx-b": Plugin([storage("b", "bb")])})

    with pytest.raises(UnknownSchemeError) as caught:
        made.table(STORAGE).lookup("quux")

    assert "aa, bb" in str(caught.value)
    assert "quux" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(("slip", "meant"), sorted(SYNONYMS.items()))
def test_a_scheme_that_others_use_is_translated(slip: str, meant: str) -> None:
    """People write other tools' schemes; the message gives ours and, if need be, the package."""
    with pytest.raises(UnknownSchemeError) as missing:
        table().lookup(slip)
    with pytest.raises(UnknownSchemeError) as installed:
        table(records={"mx-x": storage("mx-x", meant)}).lookup(slip)

    assert f"{meant}://" in str(missing.value)
    known = KNOWN_SCHEMES[meant]
    if known.install_hint:
        assert install_command(known.install_hint) in str(missing.value)
    elif known.extra is None:
        assert f"{known.distribution}, which is not published" in str(missing.value)
    assert f"{meant}://" in str(installed.value)
    assert "pip install" not in str(installed.value)


def test_a_near_miss_is_guessed() -> None:
    """A misspelt scheme gets the nearest one."""
    with pytest.raises(UnknownSchemeError, match="shout://"):
        table(records={"mx-x": storage("mx-x", "shout")}).lookup("shuot")


@pytest.mark.parametrize("status", ["broken", "disabled"])
def test_an_installed_plugin_that_is_not_loaded_is_not_called_missing(status: str) -> None:
    """For a first-party scheme the plugin is known: its state and reason come instead of a pip command."""
    with pytest.raises(UnknownSchemeError) as caught:
        table(PluginInfo("mx-s3", "1", status, "the reason")).lookup("s3")

    text = str(caught.value)
    for part in ("mx-s3", f"installed but {status}", "the reason"):
        assert part in text, text
    assert "pip install" not in text


@pytest.mark.parametrize("status", ["broken", "disabled"])
def test_a_strangers_plugin_that_is_not_loaded_is_mentioned(status: str) -> None:
    """What it would have handled is not known, so it may be what is missed."""
    with pytest.raises(UnknownSchemeError) as caught:
        table(PluginInfo("mx-shout", "1", status, "the reason")).lookup("shout")

    for part in ("mx-shout", status, "the reason"):
        assert part in str(caught.value), str(caught.value)


def test_a_table_is_looked_up_in_and_no_plugin_is_asked_again() -> None:
    """Register hooks run once, at registration, however many lookups follow."""
    calls = []

    class Counting:
        @hookimpl
        def mx_register_storages(self) -> list[StorageProvider]:
            calls.append(1)
            return [storage("a", "aa")]

    made = PluginManager()
    made.register(Counting(), name="mx-counting")
    for _ in range(10):
        made.table(STORAGE).lookup("aa")

    assert [1] == calls


# -- alternatives that need the regular plugin -------------------------------------------------------------------------


class Opened:
    """What a factory opened, with the regular storage that it was given."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.closed = False

    def list(self) -> None: ...

    def stat(self) -> None: ...

    def read_into(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def needing(name: str, factory: Any = Opened) -> StorageProvider:
    return StorageProvider(name, ("s3",), factory, alternative=True, needs_regular=True)


def regular(name: str, factory: Any = Opened) -> StorageProvider:
    return StorageProvider(name, ("s3",), factory)


URI = ModelURI.parse("s3://bucket/model")


def test_an_alternative_gets_the_regular_storage() -> None:
    """Both are opened for the same URI and settings, and the alternative has the other one to close."""
    plugins = {"mx-a": Plugin([regular("mx-a")]), "mx-b": Plugin([needing("mx-b")])}
    environ = {"AWS_REGION": "eu-central-1"}

    found, opened = manager(plugins, s3="mx-b").open(STORAGE, URI, environ)

    assert isinstance(opened, Opened)
    *own, inner = opened.arguments
    assert ("mx-b", [URI, environ], (URI, environ)) == (found.plugin.name, own, inner.arguments)
    assert not inner.closed


def test_an_alternative_that_fails_to_open_leaves_nothing_open() -> None:
    """The regular storage is closed, and the error is that of the alternative."""
    opened: list[Opened] = []

    def open_regular(*arguments: Any) -> Opened:
        opened.append(Opened(*arguments))
        return opened[-1]

    def fail(*_arguments: object) -> Opened:
        raise SettingsError("no")

    made = manager(
        {"mx-a": Plugin([regular("mx-a", open_regular)]), "mx-b": Plugin([needing("mx-b", fail)])}, s3="mx-b"
    )

    with pytest.raises(SettingsError, match="no"):
        made.open(STORAGE, URI, {})

    assert [True] == [each.closed for each in opened]


def test_an_alternative_without_the_regular_plugin_says_how_to_install_it() -> None:
    """It is named, as is the plugin that it needs."""
    made = manager({"mx-b": Plugin([needing("mx-b")])}, s3="mx-b")

    with pytest.raises(UnknownSchemeError, match="only alternatives are usable: mx-b") as caught:
        made.open(STORAGE, URI, {})

    assert install_command("modelexpress-core[s3]") in str(caught.value)


def test_an_alternative_with_two_regular_plugins_names_both() -> None:
    """``MX_PREFER`` names the alternative, so that one of the others must go."""
    plugins = {"mx-a": Plugin([regular("a")]), "mx-b": Plugin([needing("mx-b")]), "mx-c": Plugin([regular("c")])}

    with pytest.raises(PluginConflictError, match="2 are installed: mx-a") as caught:
        manager(plugins, s3="mx-b").open(STORAGE, URI, {})

    assert "MX_DISABLED_PLUGINS=mx-c" in str(caught.value)


def test_only_alternatives_may_need_the_regular_plugin() -> None:
    """A regular record would need itself."""
    with pytest.raises(ValueError, match="must be alternative=True"):
        StorageProvider("a", ("s3",), Opened, needs_regular=True)


def test_unregistering_takes_the_records_out() -> None:
    """After ``unregister`` its schemes are unknown and a conflict is none."""
    made = manager({"mx-a": Plugin([storage("a", "s3")]), "mx-b": Plugin([storage("b", "s3")])})
    with pytest.raises(PluginConflictError):
        made.table(STORAGE).lookup("s3")

    made.unregister("mx-b")

    assert "mx-a" == made.table(STORAGE).lookup("s3").plugin.name
