"""The packages of this repository besides core: each folder of ``plugins/`` or ``integrations/`` is one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import frozen

__all__ = ["ROOT", "Package", "discover", "modules", "pyproject"]

ROOT = Path(__file__).resolve().parents[1]

_PARENTS = ("plugins", "integrations")
_TOML = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


@frozen
class Package:
    """One plugin or integration.

    Attributes:
        directory: Its folder, which holds a ``pyproject.toml``.
        distribution: The name that pip installs, for example ``mx-s3``.
    """

    directory: Path
    distribution: str

    @property
    def module(self) -> str:
        """The name that Python imports, for example ``mx_s3``."""
        return self.distribution.replace("-", "_")

    @property
    def source(self) -> Path:
        """The directory that holds the module."""
        return self.directory / "src"


def pyproject(directory: Path) -> dict[str, Any]:
    """Return the content of the ``pyproject.toml`` in ``directory``."""
    text = (directory / "pyproject.toml").read_text(encoding="utf-8")
    content: dict[str, Any] = _TOML.loads(text)
    return content


def discover(root: Path = ROOT) -> list[Package]:
    """Return all packages below ``root``, sorted by folder."""
    found = sorted(path.parent for parent in _PARENTS for path in root.glob(f"{parent}/*/pyproject.toml"))
    return [Package(directory, pyproject(directory)["project"]["name"]) for directory in found]


def modules(source: Path, name: str) -> Iterator[str]:
    """Yield the names of the module ``name`` in the directory ``source`` and of all modules below it."""
    for path in sorted((source / name).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
