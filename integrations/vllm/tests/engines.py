"""Engines of real vLLM for small models, in the programs that the tests start."""

from __future__ import annotations

from typing import Any

__all__ = ["PROMPTS", "new_engine", "shut_down", "tokens_of"]

PROMPTS = [[5, 9, 33, 7], [101, 2, 77, 250, 13, 64], [3]]


def new_engine(**options: Any) -> Any:
    """Return an ``LLM`` that starts soon and takes little memory."""
    from vllm import LLM

    small = {
        "enforce_eager": True,
        "gpu_memory_utilization": 0.3,  # vLLM refuses to start if less than this share of memory is free
        "max_model_len": 64,
    }
    return LLM(**small, **options)


def tokens_of(llm: Any, adapter: str = "") -> list[list[tuple[int, float]]]:
    """Return the tokens after each prompt, each with its log probability, which depends on every weight.

    Args:
        llm: The engine.
        adapter: Directory of a LoRA adapter to use; empty for none.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1),
        use_tqdm=False,
        lora_request=LoRARequest("adapter", 1, adapter) if adapter else None,
    )
    found = []
    for output in outputs:
        first = output.outputs[0]
        chosen = zip(first.token_ids, first.logprobs, strict=True)
        found.append([(token, round(logprobs[token].logprob, 4)) for token, logprobs in chosen])
    return found


def shut_down(llm: Any) -> None:
    """End an engine, so that another can start in this process."""
    llm.llm_engine.engine_core.shutdown()
