"""Finding and loading plugins: real distributions on the path, one broken way at a time."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import logging
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelexpress_core.errors import PluginApiError, PluginConflictError, PluginError, PluginLoadError, SettingsError
from modelexpress_core.events import LoadStarted
from modelexpress_core.hooks import hookimpl
from modelexpress_core.plugins import (
    AUTHENTICATOR,
    COMMAND,
    CORE,
    ENTRY_POINT_GROUP,
    KINDS,
    STORAGE,
    PluginManager,
)
from modelexpress_core.registry import PluginInfo
from modelexpress_core.uri import ModelURI

Discover = Callable[..., PluginManager]

#: Plugins that happen to be installed where the tests run, and are not what they are about.
_OTHERS = sorted({point.name for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)} - {CORE})

_STARTED = LoadStarted("1", "file:///model", "file", 1, 1, 1)

_IMPORTS = """
from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import StorageProvider, TransportProvider, CommandProvider
"""


def storage(scheme: str, record: str, options: str = "") -> str:
    """The source of a plugin that registers one storage."""
    return f"""
        @hookimpl
        def mx_register_storages():
            return [StorageProvider({record!r}, ({scheme!r},), lambda uri, settings: None, {options})]
        """


class Site:
    """A directory on the path, into which distributions are written the way pip writes them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()

    def install(
        self,
        name: str,
        source: str | None,
        *,
        entry_point: str | None = None,
        version: str = "1.0",
        entry_points_txt: bytes | None = None,
    ) -> None:
        package = re.sub("[-.]", "_", name).lower()
        if source is not None:
            (self.root / package).mkdir()
            (self.root / package / "__init__.py").touch()
            (self.root / package / "plugin.py").write_text(_IMPORTS + textwrap.dedent(source))
        info = self.root / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        text = f"[{ENTRY_POINT_GROUP}]\n{entry_point or name} = {package}.plugin\n"
        (info / "entry_points.txt").write_bytes(text.encode() if entry_points_txt is None else entry_points_txt)


@pytest.fixture
def make_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Site]]:
    before = set(sys.modules)

    def make(name: str) -> Site:
        made = Site(tmp_path / name)
        monkeypatch.syspath_prepend(made.root)
        return made

    yield make
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def site(make_site: Callable[[str], Site]) -> Site:
    return make_site("site")


@pytest.fixture
def discover() -> Discover:
    def discovered(**environ: str) -> PluginManager:
        importlib.invalidate_caches()
        disabled = [*_OTHERS, environ.pop("MX_DISABLED_PLUGINS", "")]
        return PluginManager.discover({"MX_DISABLED_PLUGINS": ",".join(disabled), **environ})

    return discovered


def info(manager: PluginManager, name: str) -> PluginInfo:
    found = [plugin for plugin in manager.plugins if plugin.name == name]
    assert len(found) == 1, f"{name} stands {len(found)} times among {[plugin.name for plugin in manager.plugins]}"
    return found[0]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# -- what works ------------------------------------------------------------------------------------


def test_an_installed_plugin_is_found_by_its_entry_point_alone(site: Site, discover: Discover) -> None:
    """A distribution on the path with an entry point in the group is all it takes."""
    site.install("mx-shout", storage("shout", "mx-shout"), version="2.3")

    manager = discover()

    expected = PluginInfo("mx-shout", "2.3", "loaded", "", {"storage": ("shout",)})
    assert expected == info(manager, "mx-shout")
    assert manager.table(STORAGE).lookup("shout").plugin == expected


def test_built_ins_are_a_plugin_like_any(discover: Discover) -> None:
    """``file`` and ``memory`` come from core's own entry point, and can be disabled as any plugin can."""
    manager = discover()
    without = discover(MX_DISABLED_PLUGINS=CORE)

    assert {"file", "memory"} <= set(manager.table(STORAGE).schemes)
    assert info(manager, CORE).status == "loaded"
    assert info(without, CORE).status == "disabled"
    assert without.table(STORAGE).schemes == ()


def test_every_kind_of_record_is_collected(site: Site, discover: Discover) -> None:
    """One plugin may offer something of each kind, and each lands in its own table."""
    source = "from modelexpress_core import providers\n"
    for kind in KINDS:
        name = kind.hook.removeprefix("mx_register_").replace("_", "-")
        arguments = f"'all', ('all-{name}',), print" if kind.by_scheme else f"'all-{name}', print"
        source += f"@hookimpl\ndef {kind.hook}():\n    return [providers.{kind.record.__name__}({arguments})]\n"
    site.install("mx-all", source)

    manager = discover()

    for kind in KINDS:
        name = "all-" + kind.hook.removeprefix("mx_register_").replace("_", "-")
        if kind.by_scheme:
            assert "mx-all" == manager.table(kind).lookup(name).plugin.name
        else:
            assert "mx-all" == manager.named(kind, name).plugin.name


def test_a_record_is_found_by_its_name(site: Site, discover: Discover) -> None:
    """An authenticator is chosen by name; one that is missing or offered twice is an error that names the plugins."""
    for name, offered in (("mx-a", ("badge", "both")), ("mx-b", ("both",))):
        records = ", ".join(f"AuthenticatorProvider({each!r}, lambda settings: object())" for each in offered)
        source = "from modelexpress_core.providers import AuthenticatorProvider\n"
        source += f"@hookimpl\ndef mx_register_authenticators():\n    return [{records}]\n"
        site.install(name, source)

    manager = discover()

    assert "mx-a" == manager.named(AUTHENTICATOR, "badge").plugin.name
    with pytest.raises(PluginConflictError, match=r"2 plugins offer the authenticator both: mx-a and mx-b"):
        manager.named(AUTHENTICATOR, "both")
    with pytest.raises(SettingsError, match=r"no usable plugin offers the authenticator 'none'; installed: .*badge"):
        manager.named(AUTHENTICATOR, "none")
    with pytest.raises(
        PluginLoadError, match=r"returned object, which is no authenticator(.|\n)*it has no authenticate"
    ):
        manager.open_named(AUTHENTICATOR, "badge", {})


def test_a_record_may_have_several_settings_classes(site: Site, discover: Discover) -> None:
    """Each is listed once, with the distribution."""
    source = (
        "from modelexpress_core import providers\nfrom modelexpress_core.settings import LoadSettings, PluginSettings\n"
    )
    source += "@hookimpl\ndef mx_register_commands():\n    both = (LoadSettings, PluginSettings)\n"
    source += "    return [providers.CommandProvider('c', print, settings=both)]\n"
    source += "@hookimpl\ndef mx_register_server_services():\n"
    source += "    return [providers.ServerServiceProvider('a.B', print, settings=LoadSettings)]\n"
    site.install("mx-all", source)

    found = [(name, cls.__name__) for name, cls in discover().settings_classes() if name == "mx-all"]

    assert [("mx-all", "LoadSettings"), ("mx-all", "PluginSettings")] == sorted(found)


def test_a_register_hook_may_be_a_generator(site: Site, discover: Discover) -> None:
    """The contract says iterable: a generator of records is one."""
    source = """
    @hookimpl
    def mx_register_storages():
        yield StorageProvider("a", ("aa",), print)
        yield StorageProvider("b", ("bb",), print)
    """
    site.install("mx-generator", source)

    manager = discover()

    assert ("aa", "bb") == info(manager, "mx-generator").schemes["storage"]


def test_two_functions_of_a_plugin_may_implement_one_register_hook(site: Site, discover: Discover) -> None:
    """With ``specname`` a plugin can split its records over functions; none of them gets lost."""
    source = """
    @hookimpl
    def mx_register_storages():
        return [StorageProvider("a", ("aa",), print)]

    @hookimpl(specname="mx_register_storages")
    def more_storages():
        return [StorageProvider("b", ("bb",), print)]
    """
    site.install("mx-two", source)

    manager = discover()

    assert {"aa", "bb"} == set(info(manager, "mx-two").schemes["storage"])


def test_an_optional_hook_of_a_later_contract_is_no_misspelling(site: Site, discover: Discover) -> None:
    """``optionalhook=True`` says that this core may not know the hook."""
    source = (
        storage("shout", "mx-shout") + "\n        @hookimpl(optionalhook=True)\n        def mx_load_paused(event):\n"
    )
    source += "            pass\n"
    site.install("mx-shout", source)

    assert info(discover(), "mx-shout").status == "loaded"


def test_a_stand_in_with_every_attribute_is_not_taken_for_a_hook(site: Site, discover: Discover) -> None:
    """Objects that answer to any attribute (mocks, proxies) may be lying around in a plugin's module."""
    source = "from unittest.mock import call, MagicMock\nanything = MagicMock()\n" + textwrap.dedent(storage("aa", "a"))
    site.install("mx-mock", source)

    assert "" == info(discover(), "mx-mock").reason


def test_wrappers_are_allowed_on_policy_hooks(site: Site, discover: Discover) -> None:
    """A policy hook has one result, which a plugin may wrap."""
    source = """
    @hookimpl(wrapper=True)
    def mx_rewrite_uri(uri):
        result = yield
        return result or uri.with_path("wrapped")
    """
    site.install("mx-wrap", source)

    manager = discover()

    assert "wrapped" == manager.rewrite_uri(ModelURI.parse("s3://bucket/model"), {}).path


# -- what does not ---------------------------------------------------------------------------------


def returning(records: str) -> str:
    """The source of a plugin whose ``mx_register_storages`` returns ``records``."""
    return f"@hookimpl\ndef mx_register_storages():\n    return [{records}]\n"


_SECOND = "hookimpl(specname='mx_register_storages')\ndef more"

_BROKEN: dict[str, tuple[str, list[str]]] = {
    "raises at import": ("raise RuntimeError('no such luck')", ["RuntimeError", "no such luck"]),
    "syntax error": ("def broken(:", ["SyntaxError", "plugin.py"]),
    "missing dependency": ("import mx_no_such_sdk", ["mx_no_such_sdk"]),
    "exits at import": ("import sys; sys.exit('bye')", ["SystemExit", "bye"]),
    "base exception at import": ("class Odd(BaseException): pass\nraise Odd('odd')", ["Odd"]),
    "misspelt hook": (
        "@hookimpl\ndef mx_register_storage():\n    return []",
        ["mx_register_storage,", "did you mean mx_register_storages?"],
    ),
    "hook like no other": ("@hookimpl\ndef qqq():\n    return []", ["qqq", "mx_load_failed", "mx_rewrite_uri"]),
    "misspelt specname": (
        "@hookimpl(specname='mx_rewrite_url')\ndef anything(uri):\n    return None",
        ["mx_rewrite_url", "did you mean mx_rewrite_uri?"],
    ),
    "unmarked hook": ("def mx_register_storages():\n    return []", ["mx_register_storages", "@hookimpl"]),
    "unmarked by a decorator": (
        "import functools\n@functools.partial\n@hookimpl\ndef mx_register_storages():\n    return []",
        ["mx_register_storages", "@hookimpl"],
    ),
    "marked object that is no function": (
        "import functools\nmx_register_storages = hookimpl(functools.partial(list))",
        ["mx_register_storages", "plain def"],
    ),
    "async hook": ("@hookimpl\nasync def mx_register_storages():\n    return []", ["async", "plain def"]),
    "async observer": ("@hookimpl\nasync def mx_load_started(event):\n    return None", ["async", "plain def"]),
    "async generator": ("@hookimpl\nasync def mx_register_storages():\n    yield None", ["async"]),
    "wrapper on a register hook": (
        "@hookimpl(wrapper=True)\ndef mx_register_storages():\n    return (yield)",
        ["wraps mx_register_storages", "plain @hookimpl"],
    ),
    "old wrapper on a register hook": (
        "@hookimpl(hookwrapper=True)\ndef mx_register_commands():\n    yield",
        ["wraps mx_register_commands"],
    ),
    "wrapper on an observer": (
        "@hookimpl(wrapper=True)\ndef mx_load_started(event):\n    return (yield)",
        ["mx_load_started", "without yield"],
    ),
    "observer that yields": ("@hookimpl\ndef mx_load_started(event):\n    yield", ["mx_load_started", "without yield"]),
    "unexpected arguments": (
        "@hookimpl\ndef mx_register_storages(uri):\n    return []",
        ["mx_register_storages", "uri"],
    ),
    "observer with two arguments": (
        "@hookimpl\ndef mx_load_started(event, progress):\n    return None",
        ["mx_load_started", "progress"],
    ),
    "register hook raises": (
        "@hookimpl\ndef mx_register_storages():\n    raise KeyError('region')",
        ["KeyError", "region"],
    ),
    "register hook exits": ("@hookimpl\ndef mx_register_storages():\n    raise SystemExit(3)", ["SystemExit"]),
    "returns None": ("@hookimpl\ndef mx_register_storages():\n    pass", ["NoneType", "StorageProvider"]),
    "returns a record": (
        "@hookimpl\ndef mx_register_storages():\n    return StorageProvider('a', ('aa',), print)",
        ["returned StorageProvider", "list"],
    ),
    "returns text": ("@hookimpl\ndef mx_register_storages():\n    return 'aa'", ["returned str"]),
    "returns names": ("@hookimpl\ndef mx_register_storages():\n    return ['aa']", ["returned a str among"]),
    "returns records of another kind": (
        "@hookimpl\ndef mx_register_storages():\n    return [TransportProvider('a', ('aa',), print)]",
        ["TransportProvider", "StorageProvider"],
    ),
    "generator raises midway": (
        "@hookimpl\ndef mx_register_storages():\n    yield StorageProvider('a', ('aa',), print)\n    raise OSError",
        ["OSError"],
    ),
    "upper-case scheme": (textwrap.dedent(storage("Shout", "a")), ["'Shout'", "lower-case"]),
    "scheme with a separator": (textwrap.dedent(storage("shout://", "a")), ["'shout://'"]),
    "bare scheme": (
        "@hookimpl\ndef mx_register_storages():\n    return [StorageProvider('a', 'aa', print)]",
        ["comma", "('aa',)"],
    ),
    "no scheme": (
        "@hookimpl\ndef mx_register_storages():\n    return [StorageProvider('a', (), print)]",
        ["at least one scheme"],
    ),
    "scheme twice in a record": (
        "@hookimpl\ndef mx_register_storages():\n    return [StorageProvider('a', ('aa', 'aa'), print)]",
        ["twice", "aa"],
    ),
    "scheme in two records": (
        returning("StorageProvider('a', ('aa',), print), StorageProvider('b', ('aa',), print)"),
        ["aa twice", "a, b", "alternative=True"],
    ),
    "scheme in two functions": (
        returning("StorageProvider('a', ('aa',), print)")
        + returning("StorageProvider('b', ('aa',), print)").replace("hookimpl\ndef mx_register_storages", _SECOND),
        ["aa twice"],
    ),
    "alternative with the name of the other": (
        returning("StorageProvider('a', ('aa',), print), StorageProvider('a', ('aa',), print, alternative=True)"),
        ["aa twice", "different names"],
    ),
    "factory that is no function": (
        "@hookimpl\ndef mx_register_storages():\n    return [StorageProvider('a', ('aa',), None)]",
        ["factory", "None"],
    ),
    "record without a name": (
        "@hookimpl\ndef mx_register_storages():\n    return [StorageProvider('', ('aa',), print)]",
        ["name"],
    ),
    "future contract": (textwrap.dedent(storage("aa", "a", "api_version=2")), ["upgrade modelexpress-core"]),
    "past contract": (textwrap.dedent(storage("aa", "a", "api_version=0")), ["upgrade mx-broken"]),
    "future contract of a command": (
        "@hookimpl\ndef mx_register_commands():\n    return [CommandProvider('c', print, help='.', api_version=2)]",
        ["upgrade modelexpress-core"],
    ),
}


@pytest.mark.parametrize(("source", "fragments"), _BROKEN.values(), ids=_BROKEN)
def test_a_broken_plugin_is_reported_once_and_leaves_the_others_alone(
    source: str, fragments: list[str], site: Site, discover: Discover, caplog: pytest.LogCaptureFixture
) -> None:
    """Its reason is remembered and logged once; plugins before and after it in the order of names work."""
    site.install("mx-broken", source)
    site.install("mx-alpha", storage("alpha", "mx-alpha"))
    site.install("mx-omega", storage("omega", "mx-omega"))

    with caplog.at_level(logging.WARNING):
        manager = discover()
        schemes = manager.table(STORAGE).schemes
        manager.load_started(_STARTED)

    broken = info(manager, "mx-broken")
    assert "broken" == broken.status
    assert [] == [fragment for fragment in fragments if fragment not in broken.reason], broken.reason
    assert "\n" not in broken.reason
    assert {"alpha", "omega", "file", "memory"} == set(schemes)
    logged = warnings(caplog)
    assert 1 == len(logged), logged
    assert "mx-broken" in logged[0]
    assert broken.reason in logged[0]


@pytest.mark.parametrize(("source", "fragments"), _BROKEN.values(), ids=_BROKEN)
def test_strict_mode_raises_what_is_broken(source: str, fragments: list[str], site: Site, discover: Discover) -> None:
    """``MX_STRICT_PLUGINS=1`` stops at the first broken plugin, with an error that names it and what to do."""
    site.install("mx-broken", source)

    with pytest.raises(PluginError) as caught:
        discover(MX_STRICT_PLUGINS="1")

    assert "mx-broken" == caught.value.plugin
    assert "mx-broken" in str(caught.value)
    assert [] == [fragment for fragment in fragments if fragment not in str(caught.value)], str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(("api_version", "side"), [(2, "modelexpress-core"), (0, "mx-broken")])
def test_another_contract_is_an_error_of_its_own(api_version: int, side: str, site: Site, discover: Discover) -> None:
    """A mismatch of ``api_version`` is told from other faults, and says which side to upgrade."""
    site.install("mx-broken", storage("aa", "a", f"api_version={api_version}"))

    with pytest.raises(PluginApiError) as caught:
        discover(MX_STRICT_PLUGINS="1")

    assert f"upgrade {side}" == caught.value.hint


def test_a_missing_module_is_a_broken_plugin(site: Site, discover: Discover) -> None:
    """An entry point that points nowhere makes a broken plugin, with the module's name."""
    site.install("mx-hollow", None)

    broken = info(discover(), "mx-hollow")

    assert "broken" == broken.status
    assert "mx_hollow" in broken.reason


@pytest.mark.parametrize("module", ["mx_odd.plugin:missing", "not a module!", ""])
def test_an_entry_point_that_makes_no_sense_is_a_broken_plugin(module: str, site: Site, discover: Discover) -> None:
    """Whatever stands behind the equals sign, the others work."""
    text = f"[{ENTRY_POINT_GROUP}]\nmx-odd = {module}\n"
    site.install("mx-odd", storage("odd", "odd"), entry_points_txt=text.encode())
    site.install("mx-shout", storage("shout", "mx-shout"))

    manager = discover()

    assert "broken" == info(manager, "mx-odd").status
    assert "shout" in manager.table(STORAGE).schemes


def test_keyboard_interrupt_is_not_swallowed(site: Site, discover: Discover) -> None:
    """Ctrl-C while plugins load ends the program, whichever plugin it hits."""
    site.install("mx-slow", "raise KeyboardInterrupt")

    with pytest.raises(KeyboardInterrupt):
        discover()


def test_a_plugin_that_exits_does_not_end_the_process(site: Site) -> None:
    """``sys.exit`` in a plugin's module is that plugin's problem; shown in a separate process."""
    site.install("mx-exit", "import sys; sys.exit(7)")
    code = (
        f"import sys; sys.path.insert(0, {str(site.root)!r})\n"
        "from modelexpress_core.plugins import STORAGE, PluginManager\n"
        "print('still here', PluginManager.discover({}).table(STORAGE).lookup('file').plugin.name)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (0, "still here modelexpress-core\n") == (done.returncode, done.stdout), done.stderr


@pytest.mark.parametrize(
    "text",
    [
        f"[{ENTRY_POINT_GROUP}]\nno equals sign here\n".encode(),
        f"[{ENTRY_POINT_GROUP}]\nmx-torn = mx_torn.plugin\n# caf\xe9\n".encode("latin-1"),
    ],
    ids=["no pair", "not UTF-8"],
)
def test_torn_metadata_of_a_plugin_makes_it_broken(text: bytes, site: Site, discover: Discover) -> None:
    """A plugin whose entry_points.txt cannot be read is broken; the others are found all the same."""
    site.install("mx-torn", "", entry_points_txt=text)
    site.install("mx-shout", storage("shout", "mx-shout"))

    manager = discover()

    assert "broken" == info(manager, "mx-torn").status
    assert "entry_points.txt" in info(manager, "mx-torn").reason
    assert "shout" in manager.table(STORAGE).schemes


def test_torn_metadata_of_a_stranger_is_none_of_our_business(
    site: Site, discover: Discover, caplog: pytest.LogCaptureFixture
) -> None:
    """Packages that are no plugins may be in any state: they are passed over without a word."""
    site.install("stranger", None, entry_points_txt=b"[console_scripts]\nno equals sign here\n")
    site.install("foreigner", None, entry_points_txt=b"[console_scripts]\n\xff\xfe\n")
    (site.root / "nameless-1.0.dist-info").mkdir()
    (site.root / "binary-1.0.dist-info").mkdir()
    (site.root / "binary-1.0.dist-info" / "METADATA").write_bytes(b"Name: \xff\xfe\n")
    site.install("mx-shout", storage("shout", "mx-shout"))

    with caplog.at_level(logging.WARNING):
        manager = discover()

    assert "shout" in manager.table(STORAGE).schemes
    assert {CORE, "mx-shout", *_OTHERS} == {plugin.name for plugin in manager.plugins}
    assert [] == warnings(caplog)


# -- nothing is left behind ------------------------------------------------------------------------


def test_a_plugin_that_fails_at_registration_leaves_nothing_behind(
    site: Site, discover: Discover, tmp_path: Path
) -> None:
    """Neither its records nor its observers nor its policies stay, though its module was fine until then."""
    called = tmp_path / "called"
    source = f"""
    import pathlib
    from modelexpress_core.uri import ModelURI

    @hookimpl
    def mx_load_started(event):
        pathlib.Path({str(called)!r}).touch()

    @hookimpl
    def mx_rewrite_uri(uri):
        return ModelURI.parse("s3://stolen/model")

    @hookimpl
    def mx_register_commands():
        return [CommandProvider("good", print, help="Good.")]

    @hookimpl
    def mx_register_storages():
        return [StorageProvider("good", ("good",), print)]

    @hookimpl
    def mx_register_transports():
        raise RuntimeError("too late")
    """
    site.install("mx-late", source)

    manager = discover()
    manager.load_started(_STARTED)
    uri = ModelURI.parse("s3://bucket/model")

    assert "broken" == info(manager, "mx-late").status
    assert {} == info(manager, "mx-late").schemes
    assert uri == manager.rewrite_uri(uri, {})
    assert not called.exists()
    assert "good" not in manager.table(STORAGE).schemes
    assert "good" not in [each.provider.name for each in manager.records(COMMAND)]


def test_an_observer_of_a_sound_plugin_is_called(site: Site, discover: Discover, tmp_path: Path) -> None:
    """The counterpart of the test above, so that it can fail."""
    called = tmp_path / "called"
    source = f"import pathlib\n@hookimpl\ndef mx_load_started(event):\n    pathlib.Path({str(called)!r}).touch()\n"
    site.install("mx-sound", source)

    discover().load_started(_STARTED)

    assert called.exists()


def test_registering_from_code_leaves_nothing_behind_either() -> None:
    """``register`` raises and takes the plugin out whole, so that a mended one can take its name."""

    class Raising:
        @hookimpl
        def mx_register_storages(self) -> list[object]:
            message = "not yet"
            raise RuntimeError(message)

    class Mended:
        @hookimpl
        def mx_register_storages(self) -> list[object]:
            return []

    manager = PluginManager()

    with pytest.raises(PluginLoadError, match="not yet"):
        manager.register(Raising(), name="mx-x")
    manager.register(Mended(), name="mx-x")

    assert ["mx-x"] == [plugin.name for plugin in manager.plugins]


def test_an_attribute_that_raises_breaks_only_its_plugin() -> None:
    """An object with a property that raises is refused with the plugin's name, not with the bare exception."""

    class Touchy:
        @property
        def weights(self) -> None:
            message = "do not touch"
            raise RuntimeError(message)

    with pytest.raises(PluginLoadError, match=r"mx-touchy.*do not touch"):
        PluginManager().register(Touchy(), name="mx-touchy")


# -- names -----------------------------------------------------------------------------------------


def test_an_entry_point_must_have_the_name_of_its_distribution(site: Site, discover: Discover) -> None:
    """Otherwise blocking by name would not work, and two distributions could take one name."""
    site.install("acme-storage", storage("acme", "acme"), entry_point="acme")

    manager = discover()
    broken = info(manager, "acme-storage")

    assert "broken" == broken.status
    assert "'acme'" in broken.reason
    assert "'acme-storage'" in broken.reason
    assert "acme" not in manager.table(STORAGE).schemes
    assert "acme_storage.plugin" not in sys.modules


@pytest.mark.parametrize("entry_point", ["Mx_Shout", "mx.shout", "mx_shout"])
def test_spelling_of_a_name_is_as_free_as_pip_has_it(entry_point: str, site: Site, discover: Discover) -> None:
    """Dashes, dots, underscores and case do not make two names (PEP 503), in blocking either."""
    site.install("mx-shout", storage("shout", "mx-shout"), entry_point=entry_point)

    assert "loaded" == info(discover(), "mx-shout").status
    assert "disabled" == info(discover(MX_DISABLED_PLUGINS="MX_Shout"), "mx-shout").status
    assert "loaded" == info(discover(MX_PLUGINS="mx.SHOUT"), "mx-shout").status


def test_two_distributions_with_one_entry_point_name_are_both_seen(
    site: Site, discover: Discover, caplog: pytest.LogCaptureFixture
) -> None:
    """The one that may have the name is used, the other is reported; neither is dropped in silence."""
    site.install("mx-shout", storage("shout", "mx-shout"))
    site.install("aa-shout", storage("whisper", "aa-shout"), entry_point="mx-shout")

    with caplog.at_level(logging.WARNING):
        manager = discover()

    assert "loaded" == info(manager, "mx-shout").status
    assert "broken" == info(manager, "aa-shout").status
    assert "mx-shout" == manager.table(STORAGE).lookup("shout").plugin.name
    assert "whisper" not in manager.table(STORAGE).schemes
    assert any("aa-shout" in line for line in warnings(caplog)), warnings(caplog)


def test_an_impostor_does_not_hide_the_state_of_the_plugin_it_imitates(site: Site, discover: Discover) -> None:
    """A distribution that names its entry point after core is refused; core is still reported as loaded."""
    site.install("aa-shout", storage("whisper", "aa-shout"), entry_point=CORE)

    for environ in ({}, {"MX_DISABLED_PLUGINS": "aa-shout"}, {"MX_PLUGINS": "mx-other"}):
        manager = discover(**environ)

        assert "loaded" == info(manager, CORE).status, environ
        assert "loaded" != info(manager, "aa-shout").status, environ
        assert "loaded" == manager.table(STORAGE).lookup("file").plugin.status, environ


def test_every_entry_point_of_a_distribution_is_accounted_for(site: Site, discover: Discover) -> None:
    """The one that is named rightly works, though a misnamed one stands beside it."""
    text = f"[{ENTRY_POINT_GROUP}]\naaa = mx_shout.plugin\nmx-shout = mx_shout.plugin\nzzz = mx_shout.plugin\n"
    site.install("mx-shout", storage("shout", "mx-shout"), entry_points_txt=text.encode())

    manager = discover()
    of_it = [plugin for plugin in manager.plugins if plugin.name.startswith("mx-shout")]

    assert "mx-shout" == manager.table(STORAGE).lookup("shout").plugin.name
    assert ["broken", "broken", "loaded"] == sorted(plugin.status for plugin in of_it)


def test_a_distribution_twice_on_the_path_is_one_plugin(
    make_site: Callable[[str], Site], discover: Discover, caplog: pytest.LogCaptureFixture
) -> None:
    """The first one on the path counts, as it does for the import of its module."""
    make_site("far").install("mx-shout", storage("far", "mx-shout"), version="1.0")
    make_site("near").install("mx-shout", storage("near", "mx-shout"), version="2.0")

    with caplog.at_level(logging.WARNING):
        manager = discover()

    assert "2.0" == info(manager, "mx-shout").version
    assert {"storage": ("near",)} == info(manager, "mx-shout").schemes
    assert [] == warnings(caplog)


# -- blocking --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({"MX_DISABLED_PLUGINS": "mx-other, mx-blocked"}, "MX_DISABLED_PLUGINS"),
        ({"MX_PLUGINS": "mx-allowed"}, "MX_PLUGINS"),
        ({"MX_PLUGINS": "mx-blocked,mx-allowed", "MX_DISABLED_PLUGINS": "mx-blocked"}, "MX_DISABLED_PLUGINS"),
    ],
    ids=["disabled", "not allowed", "disabled though allowed"],
)
def test_blocking_comes_before_the_import(
    environ: dict[str, str], reason: str, site: Site, discover: Discover, tmp_path: Path
) -> None:
    """A blocked plugin's module is not executed: blocking must help against one that hurts when imported."""
    sentinel = tmp_path / "imported"
    site.install("mx-blocked", f"import pathlib; pathlib.Path({str(sentinel)!r}).touch()\nraise RuntimeError")
    site.install("mx-allowed", storage("allowed", "mx-allowed"))

    manager = discover(**environ, MX_STRICT_PLUGINS="1")

    blocked = info(manager, "mx-blocked")
    assert "disabled" == blocked.status
    assert reason in blocked.reason
    assert not sentinel.exists()
    assert "mx_blocked" not in sys.modules
    assert "mx_blocked.plugin" not in sys.modules
    assert "allowed" in manager.table(STORAGE).schemes


def test_built_ins_stay_under_an_allow_list(site: Site, discover: Discover) -> None:
    """``MX_PLUGINS`` chooses among what is installed; what core brings is always there."""
    site.install("mx-shout", storage("shout", "mx-shout"))
    site.install("mx-whisper", storage("whisper", "mx-whisper"))

    manager = discover(MX_PLUGINS="mx-whisper")

    assert ("file", "memory", "whisper") == manager.table(STORAGE).schemes


def test_settings_that_make_no_sense_are_named(discover: Discover) -> None:
    """A bad ``MX_PREFER`` stops discovery with an error of the settings, not of a plugin."""
    with pytest.raises(SettingsError, match="MX_PREFER"):
        discover(MX_PREFER="s3")


# -- conflicts between distributions ---------------------------------------------------------------


def test_two_distributions_that_claim_one_scheme_conflict(site: Site, discover: Discover) -> None:
    """Using the scheme raises and names both and the setting; whatever else they offer works."""
    site.install("mx-a", storage("shout", "a"))
    two = "[StorageProvider('b', ('shout',), print), StorageProvider('c', ('quiet',), print)]"
    site.install("mx-b", f"@hookimpl\ndef mx_register_storages():\n    return {two}")

    manager = discover()
    with pytest.raises(PluginConflictError) as caught:
        manager.table(STORAGE).lookup("shout")

    text = str(caught.value)
    for part in ("mx-a", "mx-b", "MX_PREFER=shout=mx-a", "MX_PREFER=shout=mx-b"):
        assert part in text, text
    assert "mx-b" == manager.table(STORAGE).lookup("quiet").plugin.name
    assert CORE == manager.table(STORAGE).lookup("file").plugin.name
    assert "mx-b" == discover(MX_PREFER="shout=mx-b").table(STORAGE).lookup("shout").plugin.name
    assert "mx-a" == discover(MX_PREFER="shout=mx-a").table(STORAGE).lookup("shout").plugin.name


def test_strict_mode_raises_on_a_conflict(site: Site, discover: Discover) -> None:
    """A conflict stops discovery in strict mode, unless ``MX_PREFER`` settles it."""
    site.install("mx-a", storage("shout", "a"))
    site.install("mx-b", storage("shout", "b"))

    with pytest.raises(PluginConflictError, match="shout"):
        discover(MX_STRICT_PLUGINS="1")
    settled = discover(MX_STRICT_PLUGINS="1", MX_PREFER="shout=mx-a")

    assert "mx-a" == settled.table(STORAGE).lookup("shout").plugin.name


def test_strict_mode_accepts_alternatives(site: Site, discover: Discover) -> None:
    """A record that is used only on request conflicts with nothing."""
    site.install("mx-a", storage("shout", "a"))
    site.install("mx-b", storage("shout", "b", "alternative=True"))
    site.install("mx-c", storage("lonely", "c", "alternative=True"))

    assert "mx-a" == discover(MX_STRICT_PLUGINS="1").table(STORAGE).lookup("shout").plugin.name


@pytest.mark.slow
def test_the_order_on_the_path_does_not_matter(
    make_site: Callable[[str], Site], discover: Discover, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every order of five distributions on the path gives the same plugins, tables and errors.

    Among them are a conflict, a preferred one, an alternative and a broken one.
    """
    sites = {name: make_site(name) for name in ("clash-a", "clash-b", "pick-a", "pick-b", "broken")}
    sites["clash-a"].install("mx-clash-a", storage("clash", "a"))
    sites["clash-b"].install("mx-clash-b", storage("clash", "b"))
    sites["pick-a"].install("mx-pick-a", storage("pick", "a"))
    sites["pick-b"].install("mx-pick-b", storage("pick", "b", "alternative=True"))
    sites["broken"].install("mx-broken", "raise RuntimeError('broken')")
    roots = [str(each.root) for each in sites.values()]
    rest = [entry for entry in sys.path if entry not in roots]

    outcomes = set()
    for order in itertools.permutations(roots):
        monkeypatch.setattr(sys, "path", [*order, *rest])
        manager = discover(MX_PREFER="pick=mx-pick-b")
        with pytest.raises(PluginConflictError) as conflict:
            manager.table(STORAGE).lookup("clash")
        outcomes.add((repr(manager.plugins), repr(manager.table(STORAGE).schemes), str(conflict.value)))
        assert "mx-pick-b" == manager.table(STORAGE).lookup("pick").plugin.name

    assert 1 == len(outcomes), outcomes
