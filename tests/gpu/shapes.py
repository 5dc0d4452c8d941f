"""Shapes of published models by name, and models of them with random weights.

The sizes are those of the models' own `config.json`; no weights of theirs are used.
"""

from typing import Any

import torch
import transformers

Shape = tuple[str, dict[str, Any]]
"""The architecture's name in transformers up to its kind, and its config."""


def _sizes(
    hidden: int, width: int, layers: int, heads: int, keys: int, vocabulary: int, *, tied: bool
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": 0,
    }


SHAPES: dict[str, Shape] = {
    "tiny": ("Llama", _sizes(64, 176, 6, 4, 2, 512, tied=False)),
    # Qwen2.5-0.5B's sizes with Llama's architecture and vocabulary; there is no Llama so small.
    "llama-0.5b": ("Llama", _sizes(896, 4864, 24, 14, 2, 128_256, tied=True)),
    "llama-1b": ("Llama", _sizes(2048, 8192, 16, 32, 8, 128_256, tied=True)),
    "llama-3b": ("Llama", _sizes(3072, 8192, 28, 24, 8, 128_256, tied=True)),
    "llama-8b": ("Llama", _sizes(4096, 14_336, 32, 32, 8, 128_256, tied=False)),
    "qwen2.5-0.5b": ("Qwen2", _sizes(896, 4864, 24, 14, 2, 151_936, tied=True)),
    "qwen2.5-1.5b": ("Qwen2", _sizes(1536, 8960, 28, 12, 2, 151_936, tied=True)),
    "qwen2.5-3b": ("Qwen2", _sizes(2048, 11_008, 36, 16, 2, 151_936, tied=True)),
    "qwen2.5-7b": ("Qwen2", _sizes(3584, 18_944, 28, 28, 4, 152_064, tied=False)),
}


TUNED_DEPTH = {"Llama": 22 / 32, "Qwen2": 6 / 28}
"""Where the paper tunes Llama-3-8B and Qwen2.5-7B, as a share of the depth."""


def layers_of(name: str) -> int:
    layers: int = SHAPES[name][1]["num_hidden_layers"]
    return layers


def tuned_layer(name: str) -> int:
    """The paper's, in proportion."""
    return round(layers_of(name) * TUNED_DEPTH[SHAPES[name][0]])


def make(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The same random weights at each call, made where and as they are used."""
    kind, sizes = SHAPES[name]
    torch.manual_seed(0)
    architecture = getattr(transformers, f"{kind}ForCausalLM")
    with torch.device(device):
        model = architecture._from_config(architecture.config_class(**sizes), dtype=dtype)
    return model.eval()
