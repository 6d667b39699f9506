"""Runs real vLLM, started by the tests in a separate process; prints results as JSON on the last line of stdout.

Results are tokens of greedy decoding, or vectors if ``texts`` are given.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

PROMPTS = [[5, 9, 33, 7], [101, 2, 77, 250, 13, 64], [3]]


def tokens(model: str, load_format: str, tensor_parallel: int, **options: Any) -> list[list[tuple[int, float]]]:
    """Return the tokens after each prompt, each with its log probability, which depends on every weight."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        load_format=load_format,
        tensor_parallel_size=tensor_parallel,
        distributed_executor_backend="mp" if tensor_parallel > 1 else None,
        enforce_eager=True,
        gpu_memory_utilization=0.3,  # vLLM refuses to start if less than this share of memory is free
        max_model_len=64,
        max_num_seqs=4,
        dtype="bfloat16",
        seed=0,
        **options,
    )
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1), use_tqdm=False
    )
    found = []
    for output in outputs:
        first: Any = output.outputs[0]
        chosen = zip(first.token_ids, first.logprobs, strict=True)
        found.append([(token, round(logprobs[token].logprob, 4)) for token, logprobs in chosen])
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return found


def vectors(model: str, load_format: str, texts: list[str]) -> list[list[float]]:
    """Return the embedding of each text."""
    from vllm import LLM

    llm = LLM(
        model=model,
        load_format=load_format,
        runner="pooling",
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        max_model_len=64,
    )
    found = [list(output.outputs.embedding) for output in llm.embed(texts, use_tqdm=False)]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
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
