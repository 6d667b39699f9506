"""Every ``pip install`` of a page or a message works in a checkout, although no package is released."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools.packages import ROOT, discover, pyproject
from modelexpress_core.installing import PACKAGES, install_command
from modelexpress_core.known_schemes import KNOWN_SCHEMES

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("install-commands")]

_OURS = ["modelexpress-core", "mx-hello", *(package.distribution for package in discover())]
_PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("plugins/*/README.md"),
    *ROOT.glob("integrations/*/README.md"),
    *ROOT.glob("examples/*/README.md"),
]


def arguments_in(text: str) -> Iterator[str]:
    """Yield what follows each ``pip install`` in ``text``."""
    for found in re.findall(r"pip install +([^`\n]+)", text):
        yield shlex.join(shlex.split(found, comments=True))


def of_pages() -> list[str]:
    """Return the arguments of all commands in pages, each once."""
    return sorted({arguments for page in _PAGES for arguments in arguments_in(page.read_text())})


def of_messages() -> list[str]:
    """Return what code asks ``install_command`` for, directly or in a record: requirements of ours, by name."""
    hints = {known.install_hint for known in KNOWN_SCHEMES.values()}
    for source in ("modelexpress_core", *(folder for folder, _ in PACKAGES.values())):
        for path in (ROOT / source).rglob("*.py"):
            hints.update(re.findall(r"\"(modelexpress-core(?:\[[a-z0-9,]+\])?)\"", path.read_text()))
    return sorted({*PACKAGES, *filter(None, hints)})


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has all packages of others, and none of ours."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False, symlinks=True)
    (site,) = (root / "lib").glob("python*/site-packages")
    ours = tuple(name.replace("-", "_") for name in _OURS)
    for library in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(library).iterdir():
            if not path.name.lstrip("_").startswith(ours):
                (site / path.name).symlink_to(path)
    return root / "bin" / "python"


def would_install(python: Path, arguments: str) -> set[str]:
    """Return the packages that ``pip install`` would install, with no index to ask.

    Options ``-e`` are left out: they change nothing in what is resolved, and need a package of hatchling's.
    """
    paths = [each.replace(str(ROOT), ".").removeprefix("./") for each in shlex.split(arguments) if each != "-e"]
    return resolved(python, *paths)


@functools.cache
def resolved(python: Path, *paths: str) -> set[str]:
    """Return the packages that pip would install for ``paths``, relative to the checkout; each list is tried once."""
    paths = tuple(each if each.startswith(".") else f"./{each}" for each in paths)
    offline = ("--dry-run", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    done = subprocess.run(
        [python, "-m", "pip", "install", *offline, *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, f"pip install {shlex.join(paths)}\n{done.stdout}{done.stderr}"
    names = re.search(r"^Would install (.*)$", done.stdout, re.MULTILINE)
    return set() if names is None else {re.sub(r"-[\d.]+$", "", name) for name in names[1].split()}


def test_there_are_commands() -> None:
    """Without any, the tests below would hold of nothing."""
    assert len(of_pages()) > 5
    assert {"modelexpress-core[server]", "modelexpress-core[s3]", "modelexpress-core[otel]"} <= set(of_messages())


@pytest.mark.parametrize("arguments", [each for each in of_pages() if "--index-url" not in each])
def test_a_command_of_a_page_works(python: Path, arguments: str) -> None:
    """It needs no package of ours from an index."""
    would = would_install(python, arguments)

    assert "modelexpress-core" in would
    assert set() == would - set(_OURS)


@pytest.mark.parametrize("requirement", of_messages())
def test_a_command_of_a_message_works(python: Path, requirement: str) -> None:
    """It names the checkout that core was installed from."""
    (arguments,) = arguments_in(install_command(requirement))

    would = would_install(python, arguments)

    assert "modelexpress-core" in would
    assert str(ROOT) in arguments


@pytest.mark.parametrize("requirement", of_messages())
def test_a_message_without_a_checkout_says_that_one_is_needed(
    requirement: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As for a wheel that somebody built. The command is the same, relative to the checkout."""
    (absolute,) = arguments_in(install_command(requirement))
    built = tmp_path / "modelexpress_core-0.1.0.dist-info"
    built.mkdir()
    (built / "METADATA").write_text("Metadata-Version: 2.4\nName: modelexpress-core\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    command = install_command(requirement)

    assert command.startswith("in a checkout of ModelExpress, whose packages are not released yet, ")
    (arguments,) = arguments_in(command)
    assert absolute.replace(str(ROOT), ".").replace("-e ", "") == arguments


def test_no_text_installs_a_package_of_ours_by_its_name() -> None:
    """An index does not have it."""
    folders = ("modelexpress_core", "plugins", "integrations", "devtools", "examples")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if "tests" not in path.parts]
    ours = rf"pip install [^`\n]*?(?<![\w/-])({'|'.join(_OURS)})(?![\w/-])"
    named = {str(path.relative_to(ROOT)): re.findall(ours, path.read_text()) for path in [*_PAGES, *sources]}

    assert {} == {path: names for path, names in named.items() if names}


def test_every_package_is_known() -> None:
    """The folder and the extra of each package of this repository, as its pyproject.toml and core's have them."""
    core = pyproject(ROOT)["project"]
    version, extras = core["version"], core["optional-dependencies"]
    expected = {
        package.distribution: (
            str(package.directory.relative_to(ROOT)),
            next((extra for extra, each in extras.items() if f"{package.distribution}=={version}" in each), ""),
        )
        for package in discover()
    }

    assert expected == PACKAGES


def test_packages_of_others_come_from_an_index() -> None:
    """By their name."""
    assert install_command("mx-shelf[sdk]").endswith("install 'mx-shelf[sdk]'")
    assert install_command("mx-shelf", upgrade=True).endswith("install -U 'mx-shelf'")


def test_the_command_is_for_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is not activated, and where it has no pip."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    activated = install_command("x")
    monkeypatch.setenv("PATH", "/usr/bin")
    not_activated = install_command("x")
    monkeypatch.setitem(sys.modules, "pip", None)
    without_pip = install_command("x")

    assert "pip install 'x'" == activated
    assert f"{shlex.quote(sys.executable)} -m pip install 'x'" == not_activated
    assert f"uv pip install --python {shlex.quote(sys.executable)} 'x'" == without_pip
