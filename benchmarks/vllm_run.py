"""Starts vLLM once and measures the load of each rank; ``benchmarks.vllm`` runs it in vLLM's environment.

vLLM spawns its ranks, and each imports this module first, so that its import patches all of them. The ranks write
results as lines of JSON to the file in ``BENCHMARK_RESULTS``.
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


def _write_result(**figures: Any) -> None:  # noqa: ANN401 - JSON
    with Path(os.environ["BENCHMARK_RESULTS"]).open("a") as file:
        file.write(json.dumps(figures) + "\n")


def _of_this_process(file: str, name: str) -> int:
    """Return a figure of this process from proc(5)."""
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
    """Wrap ``loader`` to measure from its first call until the weights are loaded."""
    load_model, load_weights = loader.load_model, loader.load_weights
    before: dict[str, float] = {}

    def measured_load_model(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - passed on
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before.update(_usage(), begun=time.monotonic())
        return load_model(*arguments, **options)

    def measured_load_weights(*arguments: Any) -> None:  # noqa: ANN401 - passed on
        load_weights(*arguments)
        after = _usage()
        _write_result(
            begun=before["begun"],
            seconds=after["seconds"] - before["seconds"],
            read_bytes=after["read_bytes"] - before["read_bytes"],
            before_bytes=before["resident_bytes"],
            peak_bytes=after["peak_bytes"],
        )

    loader.load_model, loader.load_weights = measured_load_model, measured_load_weights
    return loader


if os.environ.get("BENCHMARK_UNPACKED"):
    from integrations.vllm.tests.unpacked_plugin import keep_parameters

    keep_parameters()

_loader_of_vllm = model_loader.get_model_loader
model_loader.get_model_loader = lambda load_config: _measured(_loader_of_vllm(load_config))


def _download(bucket: str, prefix: str, directory: str) -> float:
    """Download all objects below ``prefix`` with boto3's default settings; return the seconds."""
    import boto3

    client = boto3.client("s3")
    begun = time.perf_counter()
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]:
        client.download_file(bucket, entry["Key"], str(Path(directory) / Path(entry["Key"]).name))
    return time.perf_counter() - begun


def main(request: Mapping[str, Any]) -> None:
    """Start vLLM, and generate a few tokens."""
    from vllm import LLM, SamplingParams, __version__

    imported = time.monotonic()
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
    # The log probabilities depend on every weight.
    tokens = [(token, round(logprobs[token].logprob, 4)) for token, logprobs in chosen]
    _write_result(ready=ready, imported=imported, download_seconds=download_seconds, tokens=tokens, version=__version__)
    if request.get("stay"):
        sys.stdin.read()
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
