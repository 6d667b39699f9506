"""Generate the modules of the wire protocol from the proto files: ``python -m devtools.wire_code``.

With ``--check`` it writes nothing; the exit code is 1 if a committed file differs from the generated one.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["generated"]

_ROOT = Path(__file__).resolve().parents[1]
_PROTOS = _ROOT / "modelexpress_core" / "wire" / "proto" / "modelexpress"

#: Generated code accepts only runtimes of its own major version and the next. This check is removed, because the code
#: works with all runtimes from 5 to 7, as a test shows.
_RUNTIME_CHECK = re.compile(
    r"^from google\.protobuf import runtime_version as _runtime_version\n"
    r"|^_runtime_version\.ValidateProtobufRuntimeVersion\(\n(?: .*\n)*\)\n",
    re.MULTILINE,
)


def generated() -> Mapping[Path, str]:
    """Return the text of every generated file, by path."""
    protos = sorted(_PROTOS.glob("*.proto"))
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "grpc_tools.protoc",
                f"--proto_path={_ROOT}",
                f"--python_out={temporary}",
                f"--pyi_out={temporary}",
                *(str(proto.relative_to(_ROOT)) for proto in protos),
            ],
            cwd=_ROOT,
            check=True,
        )
        files = sorted(file for file in Path(temporary).rglob("*_pb2.py*"))
        return {_ROOT / file.relative_to(temporary): _RUNTIME_CHECK.sub("", file.read_text()) for file in files}


def main() -> int:
    """Write the files, or with ``--check`` compare them."""
    check = "--check" in sys.argv[1:]
    texts = generated()
    different = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    for path in different:
        print(path.relative_to(_ROOT))
        if not check:
            path.write_text(texts[path])
    return 1 if check and different else 0


if __name__ == "__main__":
    raise SystemExit(main())
