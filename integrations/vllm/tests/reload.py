"""Runs steps on one engine of real vLLM, started by the tests in a separate process; prints results as JSON.

A step is a list: what to do, and arguments. The result of ``tokens`` is what greedy decoding gives, that of ``call``
what each worker answers. An error of a step is its result.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

PROMPTS = [[5, 9, 33, 7], [101, 2, 77, 250, 13, 64], [3]]


def keep_parameters() -> None:
    """Switch off the packing of weights into handles of kernels, which leaves parameters without elements on CPUs."""
    import vllm._custom_ops as ops
    import vllm.model_executor.layers.utils as layers

    ops._supports_onednn = False
    layers.check_cpu_sgl_kernel = lambda *_: False


def tokens(llm: Any) -> list[list[tuple[int, float]]]:
    """Return the tokens after each prompt with their log probabilities, which depend on every weight."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1),
        use_tqdm=False,
    )
    found = []
    for output in outputs:
        chosen = zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
        found.append([(token, round(logprobs[token].logprob, 4)) for token, logprobs in chosen])
    return found


def replace(source: str, directory: str) -> None:
    """Replace the weights in ``directory`` by those in ``source``."""
    for file in Path(directory).glob("*.safetensors*"):
        file.unlink()
    for file in Path(source).glob("*.safetensors*"):
        shutil.copy(file, directory)


def run(llm: Any, step: list[Any]) -> Any:
    what, *arguments = step
    if what == "tokens":
        return tokens(llm)
    if what == "call":
        method, *options = arguments
        return llm.collective_rpc(method, kwargs=options[0] if options else {})
    if what == "replace":
        return replace(*arguments)
    if what == "write":
        return Path(*arguments).touch()
    if what == "environ":
        return os.environ.update(*arguments)  # "" counts as not set
    raise ValueError(what)


def main() -> None:
    results = []
    for engine in json.loads(sys.argv[1]):
        steps, packed = engine.pop("steps"), engine.pop("packed", False)
        os.environ.update(engine.pop("environ", {}))
        if not packed:
            keep_parameters()
        from vllm import LLM

        llm = LLM(
            enforce_eager=True,
            gpu_memory_utilization=0.3,  # vLLM refuses to start if less than this share of memory is free
            max_model_len=64,
            max_num_seqs=4,
            dtype="bfloat16",
            seed=0,
            **engine,
        )
        found = []
        for step in steps:
            try:
                found.append(run(llm, step))
            except Exception as exc:  # noqa: BLE001 - the test compares it
                found.append({"error": f"{type(exc).__name__}: {exc}"})
        results.append(found)
        llm.llm_engine.engine_core.shutdown()
        del llm
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
