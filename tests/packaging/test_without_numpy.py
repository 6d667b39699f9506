"""numpy is optional, and nothing complains where it is missing."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import safetensors_file

pytestmark = pytest.mark.slow

#: As where numpy is not installed, for torch's C++ too.
_BLOCKED = "import sys; sys.modules['numpy'] = None\nimport modelexpress_core as mx\nuri = sys.argv[1]\n"

_CALLS = {
    "load_state_dict": "print(mx.load_state_dict(uri)['a'].tolist())",
    "load_into": "import torch; target = torch.zeros(2); mx.load_into({'a': target}, uri); print(target.tolist())",
    "deferred_weights": "import torch; target = torch.zeros(2)\n"
    "with mx.deferred_weights(uri, model={'a': target}) as weights:\n"
    "    for name, weight in weights: target.copy_(weight)\n"
    "print(target.tolist())",
}


@pytest.mark.parametrize("call", _CALLS)
def test_the_first_call_prints_no_warning(call: str, tmp_path: Path) -> None:
    """Only what it returns."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors_file({"a": ("F32", (2,), struct.pack("<2f", 1.0, 2.0))}))

    done = subprocess.run(
        [sys.executable, "-c", _BLOCKED + _CALLS[call], str(file)],
        env={name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ("[1.0, 2.0]\n", "") == (done.stdout, done.stderr)
