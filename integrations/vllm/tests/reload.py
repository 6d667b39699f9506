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

import torch
from engines import new_engine, shut_down, tokens_of
from unpacked_plugin import keep_parameters


def replace(source: str, directory: str) -> None:
    """Replace the weights in ``directory`` by those in ``source``."""
    for file in Path(directory).glob("*.safetensors*"):
        file.unlink()
    for file in Path(source).glob("*.safetensors*"):
        shutil.copy(file, directory)


def damage(model: Any) -> None:
    """Flip one bit in each weight, which nobody notices who does not compare bytes."""
    for parameter in model.parameters():
        parameter.data.view(-1)[:1].view(dtype=torch.uint8)[0] ^= 1


#: What steps do with the model. Requests of a refused ``tokens`` would stay in an engine of this process.
_OF_MODEL = {"forward": lambda model: str(model()), "damage": damage}


def run(llm: Any, step: list[Any]) -> Any:
    what, *arguments = step
    if what == "tokens":
        llm.reset_prefix_cache()
        return tokens_of(llm, *arguments)
    if what == "call":
        method, *options = arguments
        return llm.collective_rpc(method, kwargs=options[0] if options else {})
    if what == "replace":
        return replace(*arguments)
    if what in _OF_MODEL:
        return llm.apply_model(_OF_MODEL[what])
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
        llm = new_engine(max_num_seqs=4, dtype="bfloat16", seed=0, **engine)
        found = []
        for step in steps:
            try:
                found.append(run(llm, step))
            except Exception as exc:  # noqa: BLE001 - the test compares it
                found.append({"error": f"{type(exc).__name__}: {exc}"})
        results.append(found)
        shut_down(llm)
        del llm
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
