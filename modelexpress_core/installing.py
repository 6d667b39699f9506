"""The commands that messages print to install a package of this repository, or of another.

The packages of this repository are not released yet: the commands name the checkout that core was installed from.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

__all__ = ["PACKAGES", "install_command"]

_CORE = "modelexpress-core"

#: The packages of this repository besides core: the folder of each, and the extra of core that installs it, or "".
PACKAGES: Mapping[str, tuple[str, str]] = {
    "mx-azure": ("plugins/mx-azure", "azure"),
    "mx-gcs": ("plugins/mx-gcs", "gcs"),
    "mx-grpc-stream": ("plugins/mx-grpc-stream", "grpc"),
    "mx-hf": ("plugins/mx-hf", "hf"),
    "mx-kubernetes": ("plugins/mx-kubernetes", "kubernetes"),
    "mx-nixl": ("plugins/mx-nixl", "nixl"),
    "mx-s3": ("plugins/mx-s3", "s3"),
    "mx-streamer": ("plugins/mx-streamer", ""),  # no extra of core: its wheels need a newer glibc than core's
    "mx-vllm": ("integrations/vllm", "vllm"),
}


def install_command(requirement: str, *, upgrade: bool = False) -> str:
    """Return the command that installs ``requirement`` in this environment.

    Args:
        requirement: A name with or without extras: ``modelexpress-core[server]``, or a package of others.
        upgrade: Whether an installed version is replaced by a newer one.
    """
    pip = f"{_pip_install()}{' -U' if upgrade else ''}"
    match = re.fullmatch(r"([a-z0-9-]+)(?:\[([a-z0-9,-]+)\])?", requirement)
    if match is None or match[1] not in {_CORE, *PACKAGES}:
        return f"{pip} '{requirement}'"
    checkout, option = _checkout()
    paths = " ".join(option + shlex.quote(path) for path in _paths(checkout or ".", match[1], match[2] or ""))
    if checkout is None:
        return f"in a checkout of ModelExpress, whose packages are not released yet, {pip} {paths}"
    return f"{pip} {paths}"


def _paths(checkout: str, name: str, extras: str) -> Iterator[str]:
    """Yield what pip installs: core first, since the other packages require it."""
    wanted = f"[{extras}]" if extras else ""
    yield checkout + (wanted if name == _CORE else "")
    for package, (folder, extra) in PACKAGES.items():
        if package == name:
            yield f"{checkout}/{folder}{wanted}"
        elif name == _CORE and extra and extra in extras.split(","):
            yield f"{checkout}/{folder}"


def _checkout() -> tuple[str | None, str]:
    """Return the checkout that core was installed from, None if there is none, and pip's option for its packages."""
    try:
        text = importlib.metadata.distribution(_CORE).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        text = None
    if text is None:
        return None, ""
    origin = json.loads(text)
    path = url2pathname(urlsplit(origin["url"]).path)
    if "dir_info" not in origin or not Path(path, "pyproject.toml").is_file():
        return None, ""
    return path, "-e " if origin["dir_info"].get("editable") else ""


def _pip_install() -> str:
    """Return the start of the command for this environment, which the user may not have activated."""
    if importlib.util.find_spec("pip") is None:  # an environment of uv
        return f"uv pip install --python {shlex.quote(sys.executable)}"
    found = shutil.which("pip")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return "pip install"
    return f"{shlex.quote(sys.executable)} -m pip install"
