"""Registers ``mx explain-vllm`` and ``mx vllm``; imports neither vLLM nor torch."""

from __future__ import annotations

from collections.abc import Callable

from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import CommandProvider
from mx_vllm.settings import VllmSettings


def _explain() -> Callable[..., None]:
    from mx_vllm._explain import explain

    return explain


def _vllm() -> Callable[..., None]:
    from mx_vllm._serve import vllm

    return vllm


@hookimpl
def mx_register_commands() -> list[CommandProvider]:
    """Register ``mx explain-vllm`` and ``mx vllm``."""
    return [
        CommandProvider(
            "explain-vllm", _explain, help="Show where vLLM's weights would come from, and why.", settings=VllmSettings
        ),
        CommandProvider("vllm", _vllm, help="Serve the model at a URI with vLLM.", settings=VllmSettings),
    ]
