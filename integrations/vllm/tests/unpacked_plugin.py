"""A general plugin of vLLM: its build for CPUs then leaves weights in their parameters, as GPUs do.

vLLM calls ``keep_parameters_and_experts`` in each of its processes, before a model is built.
"""

from __future__ import annotations

from typing import Any

__all__ = ["keep_parameters", "keep_parameters_and_experts"]


def keep_parameters() -> None:
    """Switch off the packing of weights into handles of kernels, which leaves parameters without elements on CPUs."""
    import vllm._custom_ops as ops
    import vllm.model_executor.layers.utils as layers

    ops._supports_onednn = False
    layers.check_cpu_sgl_kernel = lambda *_: False


def keep_parameters_and_experts() -> None:
    """Also compute experts with torch, from weights that have the layout in which they were loaded."""
    keep_parameters()
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    import mx_vllm._vllm as ours

    for cls in (CPUUnquantizedExperts, *CPUUnquantizedExperts.__subclasses__()):
        cls.process_weights_after_loading = lambda _self, _layer: None
        cls.apply = _apply_experts
    with_experts = ours.layers_with_packed_copies

    def layers_with_packed_copies(model: Any) -> list[str]:
        modules = dict(model.named_modules())
        return [name for name in with_experts(model) if getattr(modules[name], "w13_weight", None) is None]

    ours.layers_with_packed_copies = layers_with_packed_copies


def _apply_experts(
    _self: Any,
    output: Any,
    hidden_states: Any,
    w1: Any,
    w2: Any,
    topk_weights: Any,
    topk_ids: Any,
    activation: Any,
    global_num_experts: int,
    expert_map: Any,
    *_: object,
    **__: object,
) -> None:
    import torch

    if expert_map is not None:
        topk_ids = expert_map[topk_ids.long()]  # below zero for experts of other ranks
    found = torch.zeros_like(hidden_states, dtype=torch.float32)
    for number, (up, down) in enumerate(zip(w1, w2, strict=True)):
        tokens, places = torch.where(topk_ids == number)
        gate, value = (hidden_states[tokens] @ up.T).chunk(2, dim=-1)
        made = (torch.nn.functional.silu(gate) * value) @ down.T
        found.index_add_(0, tokens, made.float() * topk_weights[tokens, places, None])
    output.copy_(found)
