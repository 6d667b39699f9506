"""What each package adds to an installation of core, and to an import: ``python -m devtools.package_costs``.

Prints the table of ``docs/packages.md``. The dependencies are those that the ``pyproject.toml`` of the packages and the
metadata of what is installed name; sizes are those of the installed files, without byte code, which an installer may
write or not. An import is that of the module ``plugin``, in a new interpreter that has imported core.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from attrs import frozen
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from devtools.packages import ROOT, discover, pyproject

__all__ = ["ROWS", "Cost", "cost_of", "import_ms", "main", "needs", "table"]

_CORE = "modelexpress-core"

#: Extras of packages that have a row of their own.
_EXTRAS = {"mx-streamer": ("s3", "gcs", "azure")}

#: What can be installed besides core: packages, with an extra if there is one.
ROWS = tuple(
    row
    for package in discover()
    for row in (
        package.distribution,
        *(f"{package.distribution}[{extra}]" for extra in _EXTRAS.get(package.distribution, ())),
    )
)

_IMPORT = """
import time
import modelexpress_core.plugin
import modelexpress_core.providers
begun = time.process_time()
import {module}
print((time.process_time() - begun) * 1000)
"""


@frozen
class Cost:
    """What a package adds to core.

    Attributes:
        row: Name of the package, with its extra.
        needs: Distributions that come with it and not with core, sorted; other packages of this repository included.
        size_mb: Size of its files and of theirs, in MB.
        import_ms: CPU time of the import of its module ``plugin``, in ms.
    """

    row: str
    needs: tuple[str, ...]
    size_mb: float
    import_ms: float


@cache
def _own() -> Mapping[str, Path]:
    """Folders of the packages of this repository, by distribution."""
    return {_CORE: ROOT, **{package.distribution: package.directory for package in discover()}}


def _requirements(name: str, extras: Iterable[str]) -> Iterator[Requirement]:
    """What ``name`` requires directly, in this interpreter."""
    if name in _own():
        project = pyproject(_own()[name])["project"]
        optional = project.get("optional-dependencies", {})
        texts = [*project.get("dependencies", []), *(each for extra in extras for each in optional[extra])]
    else:
        texts = importlib.metadata.requires(name) or []
    for text in texts:
        required = Requirement(text)
        if required.marker is None or any(required.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield required


def _closure(row: str) -> set[str]:
    """All distributions that come with ``row``, itself included."""
    first = Requirement(row)
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    left = [(canonicalize_name(first.name), frozenset(first.extras))]
    while left:
        name, extras = left.pop()
        found.add(name)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        left += [(canonicalize_name(each.name), frozenset(each.extras)) for each in _requirements(name, extras)]
    return found


def needs(row: str) -> tuple[str, ...]:
    """Distributions that come with ``row`` and not with core, without itself."""
    return tuple(sorted(_closure(row) - _closure(_CORE) - {canonicalize_name(Requirement(row).name)}))


def _size_bytes(name: str) -> int:
    """Size of the files of an installed distribution, without byte code.

    Raises:
        importlib.metadata.PackageNotFoundError: It is not installed.
    """
    if name in _own():
        files: Iterable[Path] = (_own()[name] / "src").rglob("*")
    else:
        files = (Path(str(file.locate())) for file in importlib.metadata.files(name) or ())
    return sum(path.stat().st_size for path in files if path.suffix != ".pyc" and path.is_file())


def import_ms(module: str, times: int = 5) -> float:
    """CPU time of the import of ``module`` after that of core, in ms; the best of several."""
    code = _IMPORT.format(module=module)
    runs = (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(times)
    )
    return min(float(run.stdout) for run in runs)


def cost_of(row: str) -> Cost:
    """What ``row`` adds to core.

    Raises:
        importlib.metadata.PackageNotFoundError: Something that it needs is not installed.
    """
    name = canonicalize_name(Requirement(row).name)
    added = needs(row)
    size = sum(_size_bytes(each) for each in (name, *added))
    return Cost(row, added, size / 1e6, import_ms(f"{name.replace('-', '_')}.plugin"))


def table(costs: Iterable[Cost]) -> Iterator[str]:
    """The lines of a table in Markdown."""
    yield "| package | adds to core | MB | import, ms |"
    yield "|---|---|---|---|"
    for cost in costs:
        added = ", ".join(cost.needs) or "nothing"
        yield f"| `{cost.row}` | {added} | {cost.size_mb:.1f} | {cost.import_ms:.0f} |"


def parsed(text: str) -> dict[str, Cost]:
    """The costs that a table in Markdown states, by row."""
    rows = re.findall(r"^\| `([\w\[\]-]+)` \| ([\w, -]+) \| ([\d.]+) \| (\d+) \|$", text, re.MULTILINE)
    return {
        row: Cost(row, () if added == "nothing" else tuple(added.split(", ")), float(size), float(ms))
        for row, added, size, ms in rows
    }


def main() -> None:
    """Print the table."""
    sys.stdout.write("\n".join([*table(cost_of(row) for row in ROWS), ""]))


if __name__ == "__main__":
    main()
