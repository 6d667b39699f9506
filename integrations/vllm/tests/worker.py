"""One engine of real vLLM that waits for steps; the tests start several of them beside each other.

The argument is JSON: options of the engine. Each line of stdin is a step as in ``reload.py``; each
answer is a line of stdout that begins with ``ANSWER``. The first answer says that the engine is ready.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from engines import new_engine, shut_down
from reload import run


def answer(result: Any) -> None:
    sys.stdout.write(f"\nANSWER {json.dumps(result)}\n")
    sys.stdout.flush()


def main() -> None:
    options = json.loads(sys.argv[1])
    try:
        llm = new_engine(**{"max_num_seqs": 4, "dtype": "bfloat16", "seed": 0, **options})
    except Exception as exc:  # noqa: BLE001 - the test compares it
        answer({"error": f"{type(exc).__name__}: {exc}"})
        return
    answer("ready")
    for line in sys.stdin:
        try:
            answer(run(llm, json.loads(line)))
        except Exception as exc:  # noqa: BLE001 - as above
            answer({"error": f"{type(exc).__name__}: {exc}"})
    shut_down(llm)


if __name__ == "__main__":
    main()
