"""What a model is made of, from its `config.json` alone: every parameter's name and shape.

Torch-free. Names and shapes are those of transformers' own `named_parameters()`; a tied output head
is the embedding and is not named twice. Knows nothing of how weights are spread or trained.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from workers.errors import UnsupportedModel
from workers.models import ModelFacts

Shape = tuple[int, ...]

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "qwen2_moe": {"num_key_value_heads": 16, "qkv_bias": True},
    "qwen3_moe": {"num_key_value_heads": 4},
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64, "attention_bias": True},
}
"""What transformers' config classes fill in where a `config.json` is silent."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"


@dataclass(frozen=True)
class Sizes:
    """The widths of a decoder. `query` and `key` are over all heads."""

    kind: str
    """The config's `model_type`."""
    hidden: int
    vocabulary: int
    layers: int
    head: int
    query: int
    key: int
    width: int | None
    """Of a dense MLP; None if there is none."""
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    shared_width: int = 0
    """Of the expert that every token passes."""
    dense_layers: frozenset[int] = frozenset()
    """Those without experts, in a model with experts."""

    def sparse(self, layer: int) -> bool:
        return self.experts > 0 and layer not in self.dense_layers


def sizes(facts: ModelFacts) -> Sizes:
    """Raises `UnsupportedModel` naming a value that `config.json` lacks or that cannot be."""
    values = _Values(facts)
    hidden, heads = values.number("hidden_size"), values.number("num_attention_heads")
    head = values.number("head_dim", hidden // heads)
    experts = _experts(values, facts)
    has_dense = not experts or bool(experts["dense_layers"])
    return Sizes(
        kind=facts.model_type,
        hidden=hidden,
        vocabulary=values.number("vocab_size"),
        layers=facts.num_hidden_layers,
        head=head,
        query=heads * head,
        key=values.number("num_key_value_heads", heads) * head,
        width=values.number("intermediate_size") if has_dense else None,
        **experts,
    )


def _experts(values: "_Values", facts: ModelFacts) -> dict[str, Any]:
    if facts.model_type == "gpt_oss":
        return {
            "experts": values.number("num_local_experts"),
            "experts_per_token": values.number("num_experts_per_tok"),
            "expert_width": values.number("intermediate_size"),
            "dense_layers": frozenset(),
        }
    if facts.model_type not in ("qwen2_moe", "qwen3_moe"):
        return {}
    every = values.number("decoder_sparse_step", 1)
    without = set(facts.config.get("mlp_only_layers") or ())
    layers = range(facts.num_hidden_layers)
    shared = facts.model_type == "qwen2_moe"
    return {
        # transformers 5 writes Qwen3's under the name that Mixtral gave it.
        "experts": values.number("num_experts", facts.config.get("num_local_experts")),
        "experts_per_token": values.number("num_experts_per_tok"),
        "expert_width": values.number("moe_intermediate_size"),
        "shared_width": values.number("shared_expert_intermediate_size") if shared else 0,
        "dense_layers": frozenset(i for i in layers if i in without or (i + 1) % every),
    }


class _Values:
    def __init__(self, facts: ModelFacts) -> None:
        self._path = facts.path / "config.json"
        self._values = {**_DEFAULTS.get(facts.model_type, {}), **facts.config}

    def number(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key)
        value = default if value is None else value
        if value is None:
            raise UnsupportedModel(f"{self._path} does not state '{key}'")
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModel(f"{self._path}: '{key}' is {value!r}; it must be 1 or more")
        return value

    def flag(self, key: str) -> bool:
        return bool(self._values.get(key, False))


def shapes(facts: ModelFacts) -> dict[str, Shape]:
    """The shape of every parameter by name. Raises `UnsupportedModel` as `sizes` does."""
    its, values = sizes(facts), _Values(facts)
    found: dict[str, Shape] = {EMBEDDING: (its.vocabulary, its.hidden)}
    for layer in range(its.layers):
        for name, shape in (
            *_attention(facts.model_type, its, values),
            *_mlp(facts.model_type, its, values, layer),
            *_norms(facts.model_type, its),
        ):
            found[f"model.layers.{layer}.{name}"] = shape
    found[NORM] = (its.hidden,)
    if not values.flag("tie_word_embeddings"):
        found[HEAD] = (its.vocabulary, its.hidden)
    return found


def _attention(kind: str, its: Sizes, values: _Values) -> Iterator[tuple[str, Shape]]:
    projections = {"q_proj": its.query, "k_proj": its.key, "v_proj": its.key}
    if kind == "phi3":
        projections = {"qkv_proj": its.query + 2 * its.key}
    every_bias = kind in ("llama", "qwen3", "qwen3_moe", "gpt_oss", "olmo2")
    every_bias = every_bias and values.flag("attention_bias")
    input_bias = every_bias or kind == "qwen2" or (kind == "qwen2_moe" and values.flag("qkv_bias"))
    for name, width in projections.items():
        yield from _linear(f"self_attn.{name}", its.hidden, width, bias=input_bias)
    yield from _linear("self_attn.o_proj", its.query, its.hidden, bias=every_bias)
    if kind in ("qwen3", "qwen3_moe"):
        yield "self_attn.q_norm.weight", (its.head,)
        yield "self_attn.k_norm.weight", (its.head,)
    elif kind == "olmo2":
        yield "self_attn.q_norm.weight", (its.query,)
        yield "self_attn.k_norm.weight", (its.key,)
    elif kind == "gpt_oss":
        yield "self_attn.sinks", (its.query // its.head,)


def _mlp(kind: str, its: Sizes, values: _Values, layer: int) -> Iterator[tuple[str, Shape]]:
    if its.sparse(layer):
        yield from _mixture(kind, its)
        return
    assert its.width is not None, "a dense layer has a width"
    bias = kind == "llama" and values.flag("mlp_bias")
    yield from _gated("mlp", its.hidden, its.width, bias=bias, fused=kind == "phi3")


def _mixture(kind: str, its: Sizes) -> Iterator[tuple[str, Shape]]:
    up, down = (2 * its.expert_width, its.hidden), (its.hidden, its.expert_width)
    if kind == "gpt_oss":
        yield from _linear("mlp.router", its.hidden, its.experts, bias=True)
        yield "mlp.experts.gate_up_proj", (its.experts, *reversed(up))
        yield "mlp.experts.gate_up_proj_bias", (its.experts, up[0])
        yield "mlp.experts.down_proj", (its.experts, *reversed(down))
        yield "mlp.experts.down_proj_bias", (its.experts, down[0])
        return
    yield from _linear("mlp.gate", its.hidden, its.experts)
    yield "mlp.experts.gate_up_proj", (its.experts, *up)
    yield "mlp.experts.down_proj", (its.experts, *down)
    if its.shared_width:
        yield from _gated("mlp.shared_expert", its.hidden, its.shared_width)
        yield from _linear("mlp.shared_expert_gate", its.hidden, 1)


def _gated(
    name: str, hidden: int, width: int, *, bias: bool = False, fused: bool = False
) -> Iterator[tuple[str, Shape]]:
    inputs = {"gate_up_proj": 2 * width} if fused else {"gate_proj": width, "up_proj": width}
    for projection, size in inputs.items():
        yield from _linear(f"{name}.{projection}", hidden, size, bias=bias)
    yield from _linear(f"{name}.down_proj", width, hidden, bias=bias)


def _linear(
    name: str, inputs: int, outputs: int, *, bias: bool = False
) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norms(kind: str, its: Sizes) -> Iterator[tuple[str, Shape]]:
    yield "post_attention_layernorm.weight", (its.hidden,)
    other = "post_feedforward_layernorm" if kind == "olmo2" else "input_layernorm"
    yield f"{other}.weight", (its.hidden,)
