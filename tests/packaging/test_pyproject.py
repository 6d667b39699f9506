"""What the packages promise in their pyproject.toml: extras, versions that move together, one layout for all."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools.packages import ROOT, discover, pyproject
from modelexpress_core.known_schemes import KNOWN_SCHEMES
from modelexpress_core.plugins import ENTRY_POINT_GROUP

_CORE = pyproject(ROOT)
_EXTRAS: dict[str, list[str]] = _CORE["project"]["optional-dependencies"]
_MEMBERS = [package.directory for package in discover()]
_FIRST_PARTY = [ROOT, *_MEMBERS]
_PLUGINS = [member for member in _MEMBERS if ENTRY_POINT_GROUP in pyproject(member)["project"].get("entry-points", {})]


def named(directory: Path) -> str:
    return "root" if directory == ROOT else directory.name


def requirements(directory: Path) -> list[str]:
    project = pyproject(directory)["project"]
    extras = project.get("optional-dependencies", {}).values()
    return [*project.get("dependencies", []), *(each for extra in extras for each in extra)]


def package(member: Path) -> Path:
    return member / "src" / pyproject(member)["project"]["name"].replace("-", "_")


def test_there_are_members() -> None:
    """Without any, the tests below would hold of nothing; the workspace of uv has the same ones."""
    workspace = {
        path.parent
        for pattern in _CORE["tool"]["uv"]["workspace"]["members"]
        for path in ROOT.glob(f"{pattern}/pyproject.toml")
    }

    assert "mx-s3" in [member.name for member in _PLUGINS]
    assert workspace == set(_MEMBERS)


def test_the_extras_are_the_ones_that_are_documented() -> None:
    """Each backend, the server and its spans, the integration, the contract kit, and the two that collect."""
    expected = {
        "azure",
        "gcs",
        "grpc",
        "hf",
        "kubernetes",
        "nixl",
        "s3",
        "server",
        "otel",
        "vllm",
        "testing",
        "dev",
        "all",
    }

    assert expected == set(_EXTRAS)


def test_extras_refer_to_extras_that_exist() -> None:
    """``dev`` and ``all`` collect others by name, which pip would ignore with a warning were it misspelt."""
    referred = {
        name.strip()
        for requirement in requirements(ROOT)
        for match in re.findall(r"^modelexpress-core\[(.*?)\]", requirement)
        for name in match.split(",")
    }

    assert referred
    assert set() == referred - set(_EXTRAS)


def test_a_known_scheme_can_be_installed() -> None:
    """A message never advises what cannot be installed."""
    packages = {pyproject(each)["project"]["name"] for each in _FIRST_PARTY}

    for scheme, known in KNOWN_SCHEMES.items():
        assert known.distribution in packages, scheme
        if known.extra:
            assert known.distribution in [re.split(r"[=<>~]", each)[0] for each in _EXTRAS[known.extra]], scheme


def test_every_extra_can_be_installed() -> None:
    """What it requires of ours is a package of this repository."""
    packages = {pyproject(each)["project"]["name"] for each in _FIRST_PARTY}
    required = {re.split(r"[\[=<>~ ]", each)[0] for each in requirements(ROOT)}

    assert {"mx-azure", "mx-s3", "mx-vllm"} <= packages
    assert set() == {name for name in required if name.startswith("mx-")} - packages


def hints() -> Iterator[tuple[str, str]]:
    """Every command in code and pages that installs something of ours, with the file that it is in."""
    roots = [ROOT / "modelexpress_core", ROOT / "docs", ROOT / "examples", *_MEMBERS]
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    files += [path for root in roots for pattern in ("**/*.py", "**/*.md") for path in sorted(root.glob(pattern))]
    for path in files:
        for requirement in re.findall(
            r"(?:modelexpress-core|mx-vllm)\[[a-z0-9,_-]+\]", path.read_text(encoding="utf-8")
        ):
            yield requirement, str(path.relative_to(ROOT))
        for arguments in re.findall(r"pip install (?:-U )?([^`\n{}]+)", path.read_text(encoding="utf-8")):
            for word in re.findall(r"\b(?:modelexpress-core|mx-[a-z0-9-]+)(?:\[[a-z0-9,_-]+\])?", arguments):
                yield word, str(path.relative_to(ROOT))


def test_every_hint_names_what_can_be_installed() -> None:
    """Package and extras of every `pip install` and install hint exist in this repository."""
    extras = {
        pyproject(each)["project"]["name"]: pyproject(each)["project"].get("optional-dependencies", {})
        for each in [*_FIRST_PARTY, ROOT / "examples" / "mx-hello"]
    }
    found = list(hints())

    assert len(found) > 10
    for requirement, path in found:
        name, _, listed = requirement.rstrip("]").partition("[")
        assert name in extras, (requirement, path)
        assert set() == {extra for extra in listed.split(",") if extra} - set(extras[name]), (requirement, path)


@pytest.mark.parametrize("directory", _FIRST_PARTY, ids=named)
def test_versions_move_together(directory: Path) -> None:
    """One version for all first-party packages, and where they require one another it is that one."""
    version = _CORE["project"]["version"]
    ours = {pyproject(each)["project"]["name"] for each in _FIRST_PARTY}
    pins = [each.split("#")[0].strip() for each in requirements(directory)]
    pins = [each for each in pins if re.split(r"[\[=<>~! ]", each)[0] in ours and "[" not in each]

    assert version == pyproject(directory)["project"]["version"]
    assert [] == [pin for pin in pins if not pin.endswith(f"=={version}")]
    assert directory == ROOT or any(pin.startswith("modelexpress-core==") for pin in pins)


@pytest.mark.parametrize("member", _PLUGINS, ids=named)
def test_every_plugin_has_the_same_files(member: Path) -> None:
    """Who knows one plugin knows all of them."""
    source = (package(member) / "plugin.py").read_text(encoding="utf-8")
    expected = {"__init__.py", "plugin.py", "py.typed", "settings.py"}
    expected |= {"_errors.py", "_storage.py"} if "mx_register_storages" in source else set()
    expected |= {"_errors.py", "_transport.py"} if "mx_register_transports" in source else set()

    missing = expected - {path.name for path in package(member).iterdir()}

    assert set() == missing
    assert (member / "README.md").read_text(encoding="utf-8").strip()
    assert [] != list((member / "tests").glob("test_*.py"))


@pytest.mark.parametrize("member", _PLUGINS, ids=named)
def test_every_plugin_is_announced_by_its_own_name(member: Path) -> None:
    """Entry point, distribution and directory have one name, and the entry point is the module ``plugin``.

    The directory of an integration has the name of what it integrates with.
    """
    project = pyproject(member)["project"]
    name = project["name"]

    assert name == (member.name if member.parent.name == "plugins" else f"mx-{member.name}")
    assert {name: f"{package(member).name}.plugin"} == project["entry-points"][ENTRY_POINT_GROUP]


@pytest.mark.parametrize("member", _PLUGINS, ids=named)
def test_a_package_of_an_extra_comes_from_the_workspace(member: Path) -> None:
    """What an extra of core requires is this repository's own, until it is released."""
    name = pyproject(member)["project"]["name"]
    required = any(each.startswith(f"{name}==") for each in requirements(ROOT))

    assert required == (name in _CORE["tool"]["uv"]["sources"])


@pytest.mark.parametrize("path", [ROOT / "modelexpress_core", *map(package, _PLUGINS)], ids=lambda path: path.name)
def test_plugin_modules_hold_hooks_and_nothing_heavy(path: Path) -> None:
    """Every public function is a marked hook, and what is imported at the top is core or the standard library."""
    tree = ast.parse((path / "plugin.py").read_text(encoding="utf-8"))
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    imported = {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    roots = {name.partition(".")[0] for name in imported}

    assert public
    assert [] == [node.name for node in public if not node.name.startswith("mx_")]
    assert [] == [node.name for node in public if "hookimpl" not in ast.dump(node.decorator_list[0])]
    assert set() == roots - set(sys.stdlib_module_names) - {"modelexpress_core", path.name}


def test_core_announces_itself_like_a_plugin() -> None:
    """Built-ins come by the same entry point group, under core's own name."""
    assert {"modelexpress-core": "modelexpress_core.plugin"} == _CORE["project"]["entry-points"][ENTRY_POINT_GROUP]
