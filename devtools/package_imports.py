"""Check which modules of core the plugins and integrations import: ``python -m devtools.package_imports``.

``[tool.modelexpress.imports]`` in ``pyproject.toml`` lists the modules that core offers to every package, those that
packages with a transport may use besides, and those of single packages. All other modules of core are forbidden, new
ones included, and core imports no package. The rules are written as a configuration of import-linter, which checks and
reports them. Type-only imports count.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from importlinter.cli import lint_imports

from devtools.packages import ROOT, Package, discover, modules, pyproject

__all__ = ["CORE", "configuration", "is_offered"]

CORE = "modelexpress_core"


def is_offered(module: str, offered: Iterable[str]) -> bool:
    """Return whether ``offered`` contains ``module``; ``package.*`` stands for all modules below a package."""
    return any(module.startswith(name[:-1]) if name.endswith(".*") else module == name for name in offered)


def configuration(root: Path = ROOT) -> str:
    """Return the rules for every package below ``root``, as the text of a configuration of import-linter.

    Raises:
        ValueError: ``pyproject.toml`` offers a module that does not exist, or names a package that does not exist.
    """
    packages = discover(root)
    core = list(modules(root, CORE))
    imports = pyproject(root)["tool"]["modelexpress"]["imports"]
    more: dict[str, list[str]] = imports.get("more", {})
    transports: list[str] = imports.get("transports", [])
    _check(core, [*imports["all"], *transports, *(name for names in more.values() for name in names)])
    unknown = sorted(set(more) - {package.distribution for package in packages})
    if unknown:
        message = (
            f"[tool.modelexpress.imports.more] in pyproject.toml names no package of this repository: {unknown[0]}"
        )
        raise ValueError(message)
    lines = ["[importlinter]", *_list("root_packages", [CORE, *(package.module for package in packages)])]
    for package in packages:
        offered = [*imports["all"], *more.get(package.distribution, [])]
        lines += _contract(package, core, [*offered, *(transports if _registers_transports(package) else ())])
    lines += ["[importlinter:contract:core]", "name = core imports no plugin", "type = forbidden"]
    lines += [*_list("source_modules", [CORE]), *_list("forbidden_modules", [package.module for package in packages])]
    return "\n".join([*lines, ""])


def _registers_transports(package: Package) -> bool:
    plugin = package.source / package.module / "plugin.py"
    return plugin.is_file() and "mx_register_transports" in plugin.read_text(encoding="utf-8")


def _check(core: list[str], offered: list[str]) -> None:
    for name in offered:
        if not any(is_offered(module, [name]) for module in core):
            message = f"[tool.modelexpress.imports] in pyproject.toml offers a module that does not exist: {name}"
            raise ValueError(message)


def _contract(package: Package, core: list[str], offered: list[str]) -> Iterator[str]:
    yield f"[importlinter:contract:{package.distribution}]"
    yield f"name = {package.distribution} imports only what core offers"
    yield "type = forbidden"
    yield "as_packages = False"
    yield "allow_indirect_imports = True"  # the layers of core constrain the imports of core's modules
    yield from _list("source_modules", modules(package.source, package.module))
    yield from _list("forbidden_modules", [module for module in core if not is_offered(module, offered)])


def _list(name: str, values: Iterable[str]) -> Iterator[str]:
    yield f"{name} ="
    yield from (f"    {value}" for value in values)


def main() -> int:
    """Check all packages; return the exit status."""
    # Check the files of this tree, not those of installed packages.
    sys.path[:0] = [str(ROOT), *(str(package.source) for package in discover())]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "importlinter.ini")
        path.write_text(configuration(), encoding="utf-8")
        return lint_imports(config_filename=str(path), no_logo=True)


if __name__ == "__main__":
    sys.exit(main())
