"""A worker that offers tensors over ``nixl``, in a process of its own: ``python nixl_worker.py MIB``.

It prints its port and serves until it is ended. The reader makes the same random bytes with the same seed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping

import torch

import modelexpress_core as mx
from modelexpress_core.contracts.identity import SourceIdentity
from tests.support.peers import serving_worker

TENSORS = 24


def tensors_of(mib: int) -> Mapping[str, torch.Tensor]:
    """Tensors of ``mib`` MiB together, and a few bytes more."""
    generator = torch.Generator().manual_seed(mib)
    return {
        f"layers.{number}.weight": torch.randint(
            0, 256, ((mib << 20) // TENSORS + number,), dtype=torch.uint8, generator=generator
        )
        for number in range(TENSORS)
    }


def identity_of(tensors: Mapping[str, torch.Tensor]) -> SourceIdentity:
    """Their identity, for both sides."""
    return mx.own_identity("acme/model", tensors, content_version="1")


def main() -> None:
    tensors = tensors_of(int(sys.argv[1]))
    with serving_worker(tensors, ["nixl"], source_id=identity_of(tensors).source_id) as worker:
        sys.stdout.write(f"{worker.port}\n")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main()
