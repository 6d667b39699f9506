"""A worker that offers tensors over ``nixl``, in a process of its own: ``python nixl_worker.py MIB``.

It prints its port and serves until it is ended. The reader makes the same tensors.
"""

from __future__ import annotations

import sys
import threading

from tests.support.peers import identity_of, serving_worker, tensors_of


def main() -> None:
    tensors = tensors_of(int(sys.argv[1]))
    with serving_worker(tensors, ["nixl"], source_id=identity_of(tensors).source_id) as worker:
        sys.stdout.write(f"{worker.port}\n")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main()
