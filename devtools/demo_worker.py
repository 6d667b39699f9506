"""A worker of the demonstration, in a process of its own: ``python -m devtools.demo_worker URI MODEL [publish]``.

It makes a model with the layout that a file describes, loads it, and prints one line of JSON: the report, and the
SHA-256 of each tensor. With ``publish`` it then offers the model to other workers until its standard input ends.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import torch

import modelexpress_core as mx
from modelexpress_core.transport.tensor_bytes import bytes_of, host_memory

__all__ = ["sha256"]


def sha256(tensor: torch.Tensor) -> str:
    """The SHA-256 of the elements of a contiguous tensor."""
    return hashlib.sha256(host_memory(bytes_of("tensor", tensor.contiguous()).gathered())).hexdigest()


def _say(said: object) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Load, and publish."""
    uri, layout, *publish = sys.argv[1:]
    tensors = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype))
        for name, (dtype, shape) in json.loads(Path(layout).read_text()).items()
    }
    report = mx.load_into(tensors, uri, identity=mx.own_identity("demo", tensors))
    _say({"report": report.to_dict(), "sha256": {name: sha256(tensor) for name, tensor in tensors.items()}})
    if publish:
        identity = mx.own_identity("demo", tensors, content_version=report.content_version)
        with mx.publish(tensors, identity=identity) as offer:
            while offer.state.status != "ready":
                if offer.state.last_error:
                    raise SystemExit(offer.state.last_error)
                time.sleep(0.02)
            _say({"worker_id": offer.worker_id})
            sys.stdin.read()


if __name__ == "__main__":
    main()
