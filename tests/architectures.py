"""Tiny random models of the supported architectures."""

from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": 1,
}


def tiny(architecture: str) -> Any:
    """Four layers, with a sliding window, experts or both where the architecture has them."""
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**SIZES)).eval()
