"""The contract of plugins finds plugins that are wrong in one way each, as they would be installed."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from attrs import field, frozen

from modelexpress_core.testing import PluginContract

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("contract kit of plugins")]

_PLUGIN = """
from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import StorageProvider

def open_it(uri, settings):
    from modelexpress_core.storage.memory import MemoryStorage
    return MemoryStorage()

@hookimpl
def mx_register_storages():
    return [StorageProvider("{distribution}", ("{scheme}",), open_it)]
"""

_SETTINGS = """
from attrs import frozen
from modelexpress_core.settings import env

@frozen
class Settings:
    colour: str = env("MX_{name}_COLOUR", "{name}_COLOUR", default="red", help={help!r})
"""


@frozen
class Case:
    """A plugin, and the tests of the contract that have to fail for it.

    Attributes:
        fails: Names without ``test_``.
        code: The module ``plugin``.
        entry_point: What ``entry_points.txt`` says.
        typed: The package has ``py.typed``.
        readme: Its description.
        attributes: Of the contract's subclass.
        files: More files of the package.
    """

    fails: set[str] = field(factory=set)
    code: str = _PLUGIN
    entry_point: str = "{distribution} = {package}.plugin"
    typed: bool = True
    readme: str = "It reads MX_{name}_COLOUR, or {name}_COLOUR."
    attributes: str = "pass"
    files: dict[str, str] = field(factory=dict)


_WITH_SETTINGS = (
    _PLUGIN.replace("open_it)", "open_it, settings=Settings)") + "\nfrom {package}.settings import Settings\n"
)


def _declaring(capabilities: str) -> str:
    """The plugin, with capabilities in its record."""
    code = _PLUGIN.replace("import StorageProvider", "import StorageCapabilities, StorageProvider")
    return code.replace("open_it)", f"open_it, capabilities=StorageCapabilities({capabilities}))")


_CASES = {
    "right": Case(
        code=_WITH_SETTINGS,
        attributes="sdks, first_party = ('bigsdk',), True",
        files={"settings.py": _SETTINGS.replace("{help!r}", "'Its colour.'"), "_storage.py": "", "_errors.py": ""},
    ),
    "misnamed": Case(
        {"the_entry_point_has_the_name_of_the_distribution", "the_plugin_is_found_and_handles_its_schemes"},
        entry_point="mx-other = {package}.plugin",
    ),
    "twice": Case(
        {"the_entry_point_has_the_name_of_the_distribution"},
        entry_point="{distribution} = {package}.plugin\nmx-more = {package}.plugin",
    ),
    "attribute": Case(
        {"the_entry_point_has_the_name_of_the_distribution"}, entry_point="{distribution} = {package}.plugin:open_it"
    ),
    "untyped": Case({"the_package_is_typed"}, typed=False),
    "heavy": Case(
        {"importing_it_brings_nothing_heavy"}, code="import bigsdk\n" + _PLUGIN, attributes="sdks = ('bigsdk',)"
    ),
    "sdks": Case({"importing_it_brings_nothing_heavy"}, attributes="sdks = ('no_such_sdk',)"),
    "talks": Case(
        {"registering_does_no_io"},
        code=_PLUGIN.replace("    return [", "    import socket\n    socket.socket().close()\n    return ["),
    ),
    "writes": Case({"registering_does_no_io"}, code="import os\nopen(os.devnull, 'w').close()\n" + _PLUGIN),
    "starts": Case(
        {"registering_does_no_io"},
        code="import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])\n" + _PLUGIN,
    ),
    "moody": Case(
        {"registering_twice_gives_the_same"},
        code="import itertools\nn = itertools.count()\n" + _PLUGIN.replace('"{scheme}"', 'f"{scheme}{{next(n)}}"'),
    ),
    "unmarked": Case(
        {"every_hook_is_marked_and_exists", "its_records_are_accepted"}, code=_PLUGIN.replace("@hookimpl\n", "")
    ),
    "unmarked_and_misspelt": Case(
        {"every_hook_is_marked_and_exists"}, code=_PLUGIN + "\ndef mx_register_storage(): return []\n"
    ),
    "misspelt": Case(
        {"every_hook_is_marked_and_exists", "its_records_are_accepted"},
        code=_PLUGIN.replace("mx_register_storages", "mx_register_storage"),
    ),
    "one_record": Case(
        {"its_records_are_accepted"},
        code=_PLUGIN.replace("return [StorageProvider", "return (StorageProvider").replace("open_it)]", "open_it))"),
    ),
    "takes_file": Case({"the_plugin_is_found_and_handles_its_schemes"}, code=_PLUGIN.replace("{scheme}", "file")),
    "undocumented": Case(
        {"its_settings_are_documented"},
        code=_WITH_SETTINGS,
        readme="It reads MX_{name}_COLOUR.",
        files={"settings.py": _SETTINGS.replace("{help!r}", "'Its colour.'")},
    ),
    "helpless": Case(
        {"its_settings_are_documented"},
        code=_WITH_SETTINGS,
        files={"settings.py": _SETTINGS.replace("{help!r}", "' '")},
    ),
    "opens_nothing": Case({"the_factory_opens_a_storage"}, code=_PLUGIN.replace("MemoryStorage()", "object()")),
    "promises_patience": Case({"capabilities_are_what_the_storage_has"}, code=_declaring("patience=True")),
    "promises_diagnosis": Case({"capabilities_are_what_the_storage_has"}, code=_declaring("diagnosis=True")),
    "promises_recheck": Case({"capabilities_are_what_the_storage_has"}, code=_declaring("recheck=True")),
    "promises_runs": Case({"capabilities_are_what_the_storage_has"}, code=_declaring("read_runs=True")),
    "hides_patience": Case(
        {"capabilities_are_what_the_storage_has"},
        code=_PLUGIN.replace("return MemoryStorage()", "return FaultyStorage(MemoryStorage(), FaultPolicy())").replace(
            "    from", "    from modelexpress_core.testing import FaultPolicy, FaultyStorage\n    from"
        ),
    ),
    "hides_runs": Case(
        {"capabilities_are_what_the_storage_has"},
        code=_PLUGIN.replace("memory import Memory", "file import File").replace("MemoryStorage()", "FileStorage()"),
    ),
    "hides_diagnosis": Case(
        {"capabilities_are_what_the_storage_has"},
        code=_PLUGIN.replace(
            "    return MemoryStorage()",
            "    class Diagnosable(MemoryStorage):\n"
            "        endpoint = credentials = lambda self: None\n    return Diagnosable()",
        ),
    ),
    "keeps_promises": Case(
        code=_declaring("read_runs=True, recheck=True")
        .replace("memory import Memory", "file import File")
        .replace("MemoryStorage()", "FileStorage()"),
    ),
    "layout": Case({"the_files_have_the_usual_names"}, attributes="first_party = True"),
    "empty": Case({"its_records_are_accepted"}, code=""),
}


def install(site: Path, case: str, plugin: Case) -> str:
    """Write ``plugin`` as pip would, and return the contract's subclass for it."""
    package = f"mx_{case}"
    names = {
        "package": package,
        "distribution": package.replace("_", "-"),
        "scheme": case.replace("_", "-"),
        "name": case.upper(),
    }
    files = {f"{package}/__init__.py": "", f"{package}/plugin.py": plugin.code.format(**names)}
    files |= {f"{package}/{name}": text.format(**names) for name, text in plugin.files.items()}
    files |= {f"{package}/py.typed": ""} if plugin.typed else {}
    info = f"{package}-1.0.dist-info"
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {names['distribution']}\nVersion: 1.0\n\n{plugin.readme.format(**names)}\n"
    )
    files[f"{info}/entry_points.txt"] = f"[modelexpress.plugins]\n{plugin.entry_point.format(**names)}\n"
    for name, text in files.items():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(text)
    return (
        f"class Test_{case}(PluginContract):\n    distribution = {names['distribution']!r}\n"
        f"    example_uri = '{names['scheme']}://somewhere/model'\n    {plugin.attributes}\n\n"
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, set[str]], str]:
    """The tests that failed for each plugin, all in one process, and what was printed."""
    directory = tmp_path_factory.mktemp("plugins")
    site = directory / "site"
    site.mkdir()
    (site / "bigsdk.py").touch()
    classes = [install(site, case, plugin) for case, plugin in _CASES.items()]
    (directory / "test_plugins.py").write_text(
        "from modelexpress_core.testing import PluginContract\n\n" + "".join(classes)
    )
    report = directory / "report.xml"
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MX_"))}
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", "--tb=short", "-c", os.devnull]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(directory), str(directory)],
        cwd=directory,
        env={**environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    ended: dict[str, set[str]] = {case: set() for case in _CASES}
    for test in ET.parse(report).iter("testcase"):
        if any(child.tag in {"failure", "error"} for child in test):
            ended[test.get("classname", "").rpartition("Test_")[2]].add(test.get("name", "").removeprefix("test_"))
    return ended, done.stdout + done.stderr


@pytest.mark.parametrize("case", _CASES)
def test_wrong_plugins_are_caught_and_the_right_one_is_not(
    outcomes: tuple[dict[str, set[str]], str], case: str
) -> None:
    """By the tests that are about their fault."""
    ended, printed = outcomes

    assert set() == _CASES[case].fails - ended[case], printed
    assert _CASES[case].fails or not ended[case], printed


def test_no_rule_is_without_a_plugin_that_breaks_it() -> None:
    """A test that cannot fail is a defect."""
    rules = {name.removeprefix("test_") for name in dir(PluginContract) if name.startswith("test_")}

    assert rules == set().union(*(case.fails for case in _CASES.values()))
