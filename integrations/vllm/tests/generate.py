"""Runs real vLLM, started by the tests in a separate process; prints results as JSON on the last line of stdout.

Results are tokens of greedy decoding, or vectors if ``texts`` are given.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from engines import new_engine, shut_down, tokens_of


def tokens(model: str, load_format: str, tensor_parallel: int, **options: Any) -> list[list[tuple[int, float]]]:
    """Return the tokens that greedy decoding gives."""
    llm = new_engine(
        model=model,
        load_format=load_format,
        tensor_parallel_size=tensor_parallel,
        distributed_executor_backend="mp" if tensor_parallel > 1 else None,
        max_num_seqs=4,
        dtype="bfloat16",
        seed=0,
        **options,
    )
    found = tokens_of(llm)
    shut_down(llm)
    return found


def vectors(model: str, load_format: str, texts: list[str]) -> list[list[float]]:
    """Return the embedding of each text."""
    llm = new_engine(model=model, load_format=load_format, runner="pooling")
    found = [list(output.outputs.embedding) for output in llm.embed(texts, use_tqdm=False)]
    shut_down(llm)
    return found


def main() -> None:
    results = []
    for run in json.loads(sys.argv[1]):
        environ = run.pop("environ", {})
        before = dict(os.environ)
        os.environ.update(environ)
        try:
            results.append({"vectors": vectors(**run)} if "texts" in run else {"tokens": tokens(**run)})
        except Exception as exc:  # noqa: BLE001 - the test compares it
            results.append({"error": f"{type(exc).__name__}: {exc}"})
        finally:
            os.environ.clear()
            os.environ.update(before)
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
