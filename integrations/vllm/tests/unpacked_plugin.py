"""A general plugin of vLLM: its build for CPUs then leaves weights in their parameters, as GPUs do.

vLLM calls ``keep_parameters`` in each of its processes, before a model is built.
"""

from __future__ import annotations

__all__ = ["keep_parameters"]


def keep_parameters() -> None:
    """Switch off the packing of weights into handles of kernels, which leaves parameters without elements on CPUs."""
    import vllm._custom_ops as ops
    import vllm.model_executor.layers.utils as layers

    ops._supports_onednn = False
    layers.check_cpu_sgl_kernel = lambda *_: False
