"""Run by ``benchmarks.vllm`` in vLLM's environment: one start of vLLM, and what each of its ranks says of its load.

vLLM spawns its ranks, and each of them imports this module before anything else, so that what is done at its import
holds in all of them. What they say goes as lines of JSON to the file that ``BENCHMARK_RESULTS`` names.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.model_executor import model_loader

_PROMPT = [5, 9, 33, 7]


def _tell(**what: Any) -> None:  # noqa: ANN401 - JSON
    with Path(os.environ["BENCHMARK_RESULTS"]).open("a") as file:
        file.write(json.dumps(what) + "\n")


def _of_this_process(file: str, name: str) -> int:
    """A figure of proc(5)."""
    match = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/self/{file}").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


def _usage() -> dict[str, float]:
    return {
        "seconds": time.perf_counter(),
        "read_bytes": _of_this_process("io", "read_bytes"),
        "resident_bytes": _of_this_process("status", "VmRSS") * 1024,
        "peak_bytes": _of_this_process("status", "VmHWM") * 1024,
    }


def _measured(loader: Any) -> Any:  # noqa: ANN401 - vLLM's, of any format
    """``loader``, which tells what it used from the first call of it until the weights are there."""
    load_model, load_weights = loader.load_model, loader.load_weights
    before: dict[str, float] = {}

    def measured_load_model(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - passed on
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before.update(_usage())
        return load_model(*arguments, **options)

    def measured_load_weights(*arguments: Any) -> None:  # noqa: ANN401 - passed on
        load_weights(*arguments)
        after = _usage()
        _tell(
            seconds=after["seconds"] - before["seconds"],
            read_bytes=after["read_bytes"] - before["read_bytes"],
            before_bytes=before["resident_bytes"],
            peak_bytes=after["peak_bytes"],
        )

    loader.load_model, loader.load_weights = measured_load_model, measured_load_weights
    return loader


_loader_of_vllm = model_loader.get_model_loader
model_loader.get_model_loader = lambda load_config: _measured(_loader_of_vllm(load_config))


def _download(bucket: str, prefix: str, directory: str) -> float:
    """Seconds that boto3 takes to download all objects below ``prefix``, with its own settings for that."""
    import boto3

    client = boto3.client("s3")
    begun = time.perf_counter()
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]:
        client.download_file(bucket, entry["Key"], str(Path(directory) / Path(entry["Key"]).name))
    return time.perf_counter() - begun


def main(request: Mapping[str, Any]) -> None:
    """Start vLLM, and have it say a few words."""
    from vllm import LLM, SamplingParams, __version__

    download_seconds = _download(*request["download"]) if request["download"] else 0.0
    llm = LLM(
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        seed=0,
        skip_tokenizer_init=True,
        **request["options"],
    )
    ready = time.monotonic()
    prompts: Any = [{"prompt_token_ids": _PROMPT}]
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1, detokenize=False)
    first: Any = llm.generate(prompts, sampling, use_tqdm=False)[0].outputs[0]
    chosen = zip(first.token_ids, first.logprobs, strict=True)
    # The logarithmic probabilities depend on every weight.
    said = [(token, round(logprobs[token].logprob, 4)) for token, logprobs in chosen]
    _tell(ready=ready, download_seconds=download_seconds, said=said, version=__version__)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
