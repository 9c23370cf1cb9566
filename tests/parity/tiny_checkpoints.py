"""Tiny random checkpoints of the real layout, one per family and variant that a warm start reads."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 50
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 48,
    "eos_token_id": 49,
    "tie_word_embeddings": False,
}
_ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
_LLAMA3 = {  # so short an original context that kept, mixed and stretched frequencies all occur in 64 tokens
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**_SIZES, rope_parameters=_ROPE),
    "llama_one_group": transformers.LlamaConfig(**_SIZES | {"num_key_value_heads": 4}, rope_parameters=_ROPE),
    "llama_wide_heads": transformers.LlamaConfig(**_SIZES, head_dim=16, rope_parameters=_ROPE),
    "llama31_tied": transformers.LlamaConfig(**_SIZES | {"tie_word_embeddings": True}, rope_parameters=_LLAMA3),
    "qwen2": transformers.Qwen2Config(**_SIZES, rope_parameters=_ROPE),
    "qwen2_tied": transformers.Qwen2Config(**_SIZES | {"tie_word_embeddings": True}, rope_parameters=_ROPE),
    "qwen3": transformers.Qwen3Config(**_SIZES, head_dim=16, rope_parameters=_ROPE),
    "qwen3_tied": transformers.Qwen3Config(
        **_SIZES | {"tie_word_embeddings": True}, head_dim=16, rope_parameters=_ROPE
    ),
}


def checkpoint(variant: str, **changes: Any) -> Any:
    """The transformers model, with weights so large that a wrong rotation, bias or norm shows."""
    config = copy.deepcopy(VARIANTS[variant])
    for key, value in changes.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.3 if weight.ndim == 2 else 1.0))
    return model


def saved(folder: Path, variant: str, **changes: Any) -> tuple[Path, Any]:
    """The folder that `save_pretrained` makes, and the model."""
    model = checkpoint(variant, **changes)
    model.save_pretrained(folder)
    return folder, model
