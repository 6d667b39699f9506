"""Tiny checkpoints of real architectures, with random weights, in several shards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["ARCHITECTURES", "QUANTIZED", "write"]

_SIZES: Mapping[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_SIZES))


def _padded() -> Any:
    """Llama with a vocabulary that vLLM pads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**_SIZES, "vocab_size": 520}))


def _qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=64, tie_word_embeddings=True))


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **_SIZES, head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, decoder_sparse_step=1
    )
    return Qwen3MoeForCausalLM(config)


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2))


def _phi3() -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**_SIZES, pad_token_id=0))


def _gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**_SIZES, head_dim=64, query_pre_attn_scalar=64))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=2, n_head=4, n_positions=128, vocab_size=512))


def _opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=512,
        vocab_size=512,
        max_position_embeddings=128,
        word_embed_proj_dim=256,
    )
    return OPTForCausalLM(config)


def _int8(model: Any) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
    """Return configuration and tensors of ``model`` in 8 bits with a scale per row, in compressed-tensors format."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "_proj" not in name:
            tensors[name] = tensor
            continue
        scale = tensor.float().abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (tensor.float() / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale.to(torch.bfloat16)
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return config, tensors


def _gptq(model: Any) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
    """Return configuration and tensors of ``model`` in 4 bits, eight packed in an int32, in GPTQ format."""
    size = 128
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "_proj" not in name:
            tensors[name] = tensor
            continue
        start = name.removesuffix("weight")
        rows = tensor.float().T.contiguous()  # inputs by outputs
        groups = rows.view(-1, size, rows.shape[1])
        scales = groups.abs().amax(dim=1) / 7
        fours = ((groups / scales[:, None]).round().clamp(-8, 7) + 8).to(torch.int32).view(rows.shape)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        tensors[f"{start}qweight"] = (fours.view(-1, 8, rows.shape[1]) << shifts[None, :, None]).sum(
            1, dtype=torch.int32
        )
        # All zero points are 8; GPTQ stores them minus one.
        tensors[f"{start}qzeros"] = torch.full((scales.shape[0], rows.shape[1] // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{start}scales"] = scales.to(torch.float16)
        tensors[f"{start}g_idx"] = torch.arange(rows.shape[0], dtype=torch.int32) // size
    config = {"quant_method": "gptq", "bits": 4, "group_size": size, "desc_act": False, "sym": True}
    return config, tensors


ARCHITECTURES: Mapping[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama-padded": _padded,
    "qwen3": _qwen3,
    "qwen3-moe": _qwen3_moe,
    "mixtral": _mixtral,
    "phi3": _phi3,
    "gemma2": _gemma2,
    "gpt2": _gpt2,
    "opt": _opt,
}

#: Name -> architecture, and a function that returns configuration and tensors of the quantised model.
QUANTIZED: Mapping[str, tuple[str, Callable[[Any], tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]]]] = {
    "llama-int8": ("llama", _int8),
    "llama-gptq": ("llama", _gptq),
}


def write(name: str, directory: Path) -> Path:
    """Write a checkpoint of ``name``, an architecture or a quantised model, with a tokenizer into ``directory``."""
    torch.manual_seed(1)
    architecture, quantize = QUANTIZED.get(name, (name, None))
    model = ARCHITECTURES[architecture]()
    with torch.no_grad():  # large enough that tokens depend on every weight, not only on the prompt's embedding
        for key, parameter in model.named_parameters():
            scale = 0.01 if "embed_tokens" in key and model.config.tie_word_embeddings else 0.08
            parameter.copy_(torch.randn_like(parameter) * scale + (1.0 if parameter.dim() == 1 else 0.0))
    model.to(torch.bfloat16)
    if quantize is None:
        model.save_pretrained(directory, max_shard_size="1MB")
    else:
        from huggingface_hub import save_torch_state_dict

        model.config.quantization_config, tensors = quantize(model)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        save_torch_state_dict(dict(tensors), directory, max_shard_size="1MB")
    _write_tokenizer(directory)
    return directory


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(512)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", eos_token="t1", pad_token="t2")
    fast.save_pretrained(directory)


def main() -> None:
    """Write every checkpoint below a directory."""
    for name in (*ARCHITECTURES, *QUANTIZED):
        write(name, Path(sys.argv[1], name))


if __name__ == "__main__":
    main()
