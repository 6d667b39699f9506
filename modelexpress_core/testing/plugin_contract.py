"""The contract of every plugin: its entry point, its files, the cost of its import, its hooks and settings."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import attrs
import pytest

from modelexpress_core import hookspecs
from modelexpress_core.contracts.storage import Storage
from modelexpress_core.hooks import PROJECT_NAME
from modelexpress_core.plugins import ENTRY_POINT_GROUP, KINDS, STORAGE, TRANSPORT, PluginManager
from modelexpress_core.providers import StorageProvider
from modelexpress_core.registry import Registered
from modelexpress_core.settings import describe
from modelexpress_core.testing.contract import Contract, violated
from modelexpress_core.uri import ModelURI

__all__ = ["PluginContract"]

#: Packages that a plugin may import only in its factory: they take seconds, or are not installed everywhere.
_HEAVY = frozenset(
    {
        *("azure", "boto3", "botocore", "google.cloud", "google.protobuf", "grpc", "huggingface_hub", "kubernetes"),
        *("nixl", "numpy", "redis", "torch", "transformers", "typer", "vllm"),
    }
)

#: Program for a separate process: imports and registers a plugin's module, and prints imported modules and I/O.
_PROBE = """
import json, os, sys

arguments = json.loads(sys.argv[1])
sys.path[:] = arguments["path"]
from modelexpress_core.plugins import PluginManager
import importlib

before, io_events, watching = set(sys.modules), [], []
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.mkdir")

def watch(event, args):
    if not watching:
        return
    if event.startswith(EVENTS) and event != "socket.gethostname":
        io_events.append(f"{event} {args!r}"[:200])
    elif event == "open" and (set(str(args[1] or "")) & set("wax+") or (args[2] or 0) & WRITES):
        io_events.append(f"open {args[0]!r} for writing"[:200])

sys.addaudithook(watch)
watching.append(True)
module = importlib.import_module(arguments["module"])
PluginManager().register(module, name=arguments["name"])
watching.clear()
print("\\n" + json.dumps({"modules": sorted(set(sys.modules) - before), "io_events": io_events}))
"""

#: Capability -> attributes that a storage with this capability has.
_CAPABILITY_ATTRIBUTES: Mapping[str, Sequence[str]] = {
    "read_batch": ("read_batch",),
    "read_runs": ("read_runs",),
    "recheck": ("check_unchanged",),
    "patience": ("patience_seconds",),
    "compares": ("compared", "check_unchanged"),
    "diagnosis": ("endpoint", "credentials"),
    "restriction": ("is_restricted",),
}

_FIRST_PARTY_FILES = frozenset({"__init__.py", "_errors.py", "plugin.py", "py.typed", "settings.py"})


class PluginContract(Contract, contract=True):
    """The rules for every installed plugin.

    Example:
        >>> class TestHelloPlugin(PluginContract):
        ...     distribution = "mx-hello"
        ...     example_uri = "hello://127.0.0.1:8080/model"

    Attributes:
        distribution: Name of the installed distribution.
        sdks: Packages that its factories import and its module must not import.
        example_uri: A URI of one of its storages; if set, tests open the storage, and read nothing.
        example_settings: The settings for the factory.
        first_party: Whether the plugin belongs to this project, whose plugins all have the same file names.
    """

    distribution: ClassVar[str] = ""
    sdks: ClassVar[tuple[str, ...]] = ()
    example_uri: ClassVar[str] = ""
    example_settings: ClassVar[Mapping[str, str]] = {}
    first_party: ClassVar[bool] = False

    # -- fixtures -----------------------------------------------------------------------------------------------------

    @pytest.fixture
    def readme(self) -> str:
        """The text that documents the plugin's variables: by default its description on PyPI."""
        return str(importlib.metadata.metadata(self._name()).json.get("description", ""))

    @pytest.fixture
    def entry_point(self) -> importlib.metadata.EntryPoint:
        """The plugin's entry point."""
        name = self._name()
        points = [
            point for point in importlib.metadata.distribution(name).entry_points if point.group == ENTRY_POINT_GROUP
        ]
        if len(points) != 1:
            violated(f"{name} has {len(points)} entry points in the group {ENTRY_POINT_GROUP}; it must have one")
        return points[0]

    @pytest.fixture
    def plugin(self, entry_point: importlib.metadata.EntryPoint) -> ModuleType:
        """The module that the entry point names."""
        return importlib.import_module(entry_point.module)

    @pytest.fixture
    def manager(self, plugin: ModuleType) -> PluginManager:
        """A manager with only this plugin."""
        manager = PluginManager()
        manager.register(plugin, name=self._name())
        return manager

    # -- entry point and files ----------------------------------------------------------------------------------------

    def test_the_entry_point_has_the_name_of_the_distribution(self, entry_point: importlib.metadata.EntryPoint) -> None:
        """The entry point names a module, and has the distribution's name, which users disable the plugin by."""
        name = self._name()
        if _normalised(entry_point.name) != _normalised(name):
            violated(f"the entry point is named {entry_point.name!r}; give it the distribution's name, {name!r}")
        if entry_point.attr:
            violated(f"the entry point is {entry_point.value!r}; it must name a module: {entry_point.module!r}")

    def test_the_plugin_is_found_and_handles_its_schemes(self, manager: PluginManager) -> None:
        """The installed plugin loads without a warning, and each scheme of its records selects it."""
        name = _normalised(self._name())
        for kind in (kind for kind in KINDS if kind.by_scheme):
            for record in manager.table(kind).records:
                for scheme in record.provider.schemes:
                    environ = {"MX_PLUGINS": name, "MX_STRICT_PLUGINS": "1"}
                    if record.provider.alternative:
                        environ["MX_PREFER"] = f"{scheme}={record.provider.name}"
                    found = PluginManager.discover(environ).table(kind).lookup(scheme)
                    if found.plugin.name != name:
                        violated(f"the {found.label} handles {scheme}, not {name}")
        PluginManager.discover({"MX_PLUGINS": name, "MX_STRICT_PLUGINS": "1"})

    def test_the_package_is_typed(self, plugin: ModuleType) -> None:
        """The package contains ``py.typed`` (PEP 561), so that type checkers use its annotations."""
        package = _directory(plugin)
        if not (package / "py.typed").is_file():
            violated(f"{package.name} has no py.typed: add an empty file of that name to the package")

    def test_the_files_have_the_usual_names(self, plugin: ModuleType, manager: PluginManager) -> None:
        """All first-party plugins have the same file names."""
        if not self.first_party:
            pytest.skip("only first-party plugins have the same file names (first_party is False)")
        expected = set(_FIRST_PARTY_FILES)
        expected |= {"_storage.py"} if manager.table(STORAGE).records else set()
        expected |= {"_transport.py"} if manager.table(TRANSPORT).records else set()
        missing = sorted(expected - {path.name for path in _directory(plugin).iterdir()})
        if missing or not plugin.__name__.endswith(".plugin"):
            violated(
                f"{plugin.__name__} does not have the files of other plugins; missing: {', '.join(missing) or '-'}"
            )

    # -- import and registration --------------------------------------------------------------------------------------

    def test_importing_it_brings_nothing_heavy(self, entry_point: importlib.metadata.EntryPoint) -> None:
        """Listing plugins imports all of them, so only factories import SDKs and torch."""
        for sdk in self.sdks:
            if importlib.util.find_spec(sdk) is None:
                violated(f"sdks names {sdk}, which is not installed here, so that the test would check nothing")
        imported = self._probed(entry_point)["modules"]
        heavy = sorted(name for name in {*_HEAVY, *self.sdks} if name in imported)
        if heavy:
            violated(f"importing {entry_point.module} imports {', '.join(heavy)}: move that into the factory")

    def test_registering_does_no_io(self, entry_point: importlib.metadata.EntryPoint) -> None:
        """Import and register hooks open no socket, start no process and write no file."""
        events = self._probed(entry_point)["io_events"]
        if events:
            violated(
                f"importing and registering {entry_point.module} did I/O: {'; '.join(events)}. Do it in the factory"
            )

    def test_registering_twice_gives_the_same(self, plugin: ModuleType) -> None:
        """Register hooks are pure: they always return the same records."""
        first, second = ([_comparable(record) for record in _records(plugin)] for _ in range(2))
        if first != second:
            violated(f"the register hooks of {plugin.__name__} returned {first}, and then {second}")

    # -- hooks, records and settings ----------------------------------------------------------------------------------

    def test_every_hook_is_marked_and_exists(self, plugin: ModuleType) -> None:
        """A function named ``mx_...`` has the name of a hook and is marked with ``hookimpl``, or it is never called."""
        for name, value in vars(plugin).items():
            if not name.startswith("mx_") or not callable(value):
                continue
            if not hasattr(value, f"{PROJECT_NAME}_impl"):
                violated(f"{plugin.__name__}.{name} is not marked: have you forgotten @hookimpl above it?")
            if not hasattr(hookspecs, name) and not getattr(value, f"{PROJECT_NAME}_impl")["optionalhook"]:
                violated(f"{plugin.__name__}.{name} is not a hook; modelexpress_core.hookspecs defines the hooks")

    def test_its_records_are_accepted(self, plugin: ModuleType) -> None:
        """Core registers the plugin, and the plugin implements at least one hook."""
        manager = PluginManager()
        info = manager.register(plugin, name=self._name())
        marked = [value for value in vars(plugin).values() if hasattr(value, f"{PROJECT_NAME}_impl")]
        if info.status != "loaded" or not marked:
            violated(f"{plugin.__name__} implements no hook: mark functions with modelexpress_core.hooks.hookimpl")

    def test_the_factory_opens_a_storage(self, manager: PluginManager) -> None:
        """The factory returns a Storage for ``example_uri``, and the storage closes."""
        if not self.example_uri:
            pytest.skip("example_uri is not set")
        _, storage = self._open_example(manager)
        try:
            if not isinstance(storage, Storage):
                violated(f"the factory returned {type(storage).__name__}, which has not all methods of Storage")
        finally:
            storage.close()

    def test_capabilities_are_what_the_storage_has(self, manager: PluginManager) -> None:
        """A storage has exactly the capabilities that its record declares: core uses only declared ones."""
        if not self.example_uri:
            pytest.skip("example_uri is not set")
        registered, storage = self._open_example(manager)
        try:
            for capability, names in _CAPABILITY_ATTRIBUTES.items():
                declared = getattr(registered.provider.capabilities, capability)
                lacking = [name for name in names if not hasattr(storage, name)]
                if declared and lacking:
                    violated(
                        f"the {registered.label} declares the capability {capability}, but its storage, "
                        f"{type(storage).__name__}, has no {' and no '.join(lacking)}"
                    )
                if not declared and not lacking:
                    violated(
                        f"{type(storage).__name__} has {' and '.join(names)}, but core ignores it: declare it with "
                        f"capabilities=StorageCapabilities({capability}=True)"
                    )
        finally:
            storage.close()

    def test_its_settings_are_documented(self, manager: PluginManager, readme: str) -> None:
        """Every variable has a help text and a valid default, and is named in the README."""
        for owner, settings in manager.settings_classes():
            for setting in describe(settings, {}, owner=owner):
                if not setting.help.strip():
                    violated(f"{setting.name} has no help: describe it in one sentence")
                names = (setting.name, *setting.aliases)
                missing = [name for name in names if not re.search(rf"\b{name}\b", readme)]
                if missing:
                    violated(f"the README does not name {', '.join(missing)}")

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _name(self) -> str:
        if not self.distribution:
            violated(f'{type(self).__name__} does not name the plugin to test: set distribution = "mx-..."')
        return self.distribution

    def _open_example(self, manager: PluginManager) -> tuple[Registered[StorageProvider], Storage]:
        """Open ``example_uri``; an alternative as a user does, who names it in ``MX_PREFER``."""
        uri = ModelURI.parse(self.example_uri)
        records = [
            record.provider for record in manager.table(STORAGE).records if uri.scheme in record.provider.schemes
        ]
        if records and all(record.alternative for record in records):
            prefer = {"MX_PREFER": f"{uri.scheme}={records[0].name}", "MX_STRICT_PLUGINS": "1"}
            manager = PluginManager.discover(prefer)
        return manager.open(STORAGE, uri, self.example_settings)

    def _probed(self, entry_point: importlib.metadata.EntryPoint) -> Mapping[str, Sequence[str]]:
        """Import and register the plugin in a new process; return the imported modules and the I/O."""
        return _probed(entry_point.module, self._name(), tuple(sys.path))


@functools.cache
def _probed(module: str, name: str, path: Sequence[str]) -> Mapping[str, Sequence[str]]:
    arguments = json.dumps({"path": path, "module": module, "name": name})
    done = subprocess.run(  # noqa: S603 - this interpreter, with our own program
        [sys.executable, "-B", "-c", _PROBE, arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        violated(f"importing and registering {module} in a new process failed:\n{done.stderr}")
    result: Mapping[str, Sequence[str]] = json.loads(done.stdout.splitlines()[-1])
    return result


def _normalised(name: str) -> str:
    """Normalise the name of a distribution (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _directory(plugin: ModuleType) -> Path:
    """Return the directory of the package that contains ``plugin``."""
    package = importlib.import_module(plugin.__name__.partition(".")[0])
    if not getattr(package, "__path__", None):
        violated(f"{package.__name__} is a module; a plugin must be a package, so that it can contain py.typed")
    return Path(next(iter(package.__path__)))


def _records(plugin: ModuleType) -> Iterator[Any]:
    """Yield the records that the register hooks return."""
    for name, function in sorted(vars(plugin).items()):
        if name.startswith("mx_register_") and hasattr(function, f"{PROJECT_NAME}_impl"):
            yield from function()


def _comparable(record: Any) -> object:  # noqa: ANN401 - any kind of record
    """Return the fields of a record, with the factory's name for the factory: an equal function may be a new object."""
    if not attrs.has(type(record)):
        return record
    fields = {field.name: getattr(record, field.name) for field in attrs.fields(type(record))}
    factory = fields.pop("factory", None)
    return type(record).__name__, fields, getattr(factory, "__qualname__", type(factory).__name__)
