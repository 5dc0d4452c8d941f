"""`errata plan`: counts as transformers has them, formulas by hand and against measurement."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from deploy.plans import __main__ as shipped
from workers import examples, frozen_prefix, plan_memory
from workers.contract import Hparams
from workers.errors import BadHparams, UnknownParameter, UnsupportedModel
from workers.models import SUPPORTED, ModelFacts, read_facts
from workers.plan import Cluster, Plan, Speed, Work, plan
from workers.plan_division import divide
from workers.plan_memory import Load
from workers.plan_parameters import shapes

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    ("MistralForCausalLM", {"num_key_value_heads": 4}),
    ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    ("Qwen3ForCausalLM", {"head_dim": 32}),
    ("Qwen3ForCausalLM", {"head_dim": 32, "attention_bias": True}),
    ("Qwen2MoeForCausalLM", {**EXPERTS, "shared_expert_intermediate_size": 96}),
    ("Qwen2MoeForCausalLM", {**EXPERTS, "qkv_bias": False, "mlp_only_layers": [1]}),
    ("Qwen3MoeForCausalLM", {**EXPERTS, "head_dim": 32}),
    ("Qwen3MoeForCausalLM", {**EXPERTS, "decoder_sparse_step": 2}),
    ("Phi3ForCausalLM", {}),
    (
        "GptOssForCausalLM",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    ("Olmo2ForCausalLM", {}),
]
TUNED = "model.layers.1.mlp.down_proj.weight"
QWEN_72B = shipped.CONFIG
MakeModel = Callable[..., tuple[Any, ModelFacts]]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """A model of an architecture, and what its saved config.json says; `meta`: without weights."""

    def make(architecture: str, device: str = "meta", **changes: Any) -> tuple[Any, ModelFacts]:
        kind = getattr(transformers, architecture)
        config = kind.config_class(**{**SIZES, **changes})
        config.architectures = [architecture]
        config.save_pretrained(tmp_path)
        with torch.device(device):
            model = kind(config)
        return model, read_facts(tmp_path / "config.json")

    return make


def hparams(*parameters: str, **changes: Any) -> Hparams:
    return Hparams(parameters=parameters or (TUNED,), learning_rate=1e-3, **changes)


@pytest.mark.parametrize(("architecture", "changes"), VARIANTS)
def test_names_and_shapes_are_the_models_own(
    architecture: str, changes: dict[str, Any], make_model: MakeModel
) -> None:
    model, facts = make_model(architecture, **changes)
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes(facts) == own


def test_every_supported_architecture_is_checked() -> None:
    assert {architecture for architecture, _ in VARIANTS} == set(SUPPORTED)


def test_a_config_that_is_silent_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """Published ones leave out what their class fills in."""
    kept = {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
    kept |= {"intermediate_size", "max_position_embeddings"}
    for architecture in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM"):
        kind = getattr(transformers, architecture)
        values = {name: 256 if name == "hidden_size" else SIZES[name] for name in kept}
        values |= {"num_attention_heads": 8, "model_type": kind.config_class.model_type}
        file = tmp_path / "config.json"
        file.write_text(json.dumps({**values, "architectures": [architecture]}))
        with torch.device("meta"):
            model = kind(kind.config_class.from_pretrained(tmp_path))
        own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert shapes(read_facts(file)) == own


def test_division(make_model: MakeModel) -> None:
    model, facts = make_model("Qwen2ForCausalLM")
    division = divide(facts, hparams("model.layers.1.mlp", "model.layers.2.input_layernorm"))
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    prefix = ("model.embed_tokens", "model.layers.0.")
    below = sum(count for name, count in counts.items() if name.startswith(prefix))
    assert division.depth == 1
    assert division.total == sum(counts.values())
    assert division.prefix == below
    assert division.suffix == division.total - below
    assert division.tuned_parameters == 3 * 64 * 176 + 64
    assert division.active_suffix == division.suffix - division.head


def test_a_tied_head_is_in_prefix_and_suffix(make_model: MakeModel) -> None:
    _, facts = make_model("Qwen2ForCausalLM", tie_word_embeddings=True)
    division = divide(facts, hparams())
    assert division.prefix + division.suffix == division.total + 96 * 64


def test_a_token_passes_some_of_the_experts(make_model: MakeModel) -> None:
    _, facts = make_model("Qwen3MoeForCausalLM", **EXPERTS)
    division = divide(facts, hparams("model.layers.1.mlp.experts.down_proj"))
    expert = 3 * 48 * 64
    assert division.layers[0] - division.active_layers[0] == (8 - 2) * expert


def load(**changes: Any) -> Load:
    values = {
        "ranks": 2,
        "ranks_per_host": 2,
        "weight_bytes": 4,
        "edits": 10,
        "samples": 40,
        "batch_size": 8,
        "tokens": 16,
        "target_tokens": 3,
        "offload": "none",
        "cache_budget_bytes": 1 << 30,
    }
    return Load(**{**values, **changes})


def test_memory_by_hand(make_model: MakeModel) -> None:
    _, facts = make_model("Qwen2ForCausalLM")
    division = divide(facts, hparams())
    tuned, frozen = 64 * 176, division.suffix - 64 * 176
    memory = plan_memory.training(division, load(weight_bytes=2))
    assert memory["frozen suffix weights"] == 2 * math.ceil(frozen / 2)
    assert memory["tuned weights"] == tuned
    assert memory["tuned weights, float32 copy"] == 2 * tuned
    assert memory["Adam moments"] == 4 * tuned
    assert memory["gradient"] == 2 * tuned
    assert memory["gathered weights"] == 2 * division.suffix
    assert memory["logits"] == 4 * 3 * 96 * 14
    host = plan_memory.host(division, load(weight_bytes=2))
    assert host["hidden states"] == 40 * 16 * 64 * 2


def test_where_weights_and_hidden_states_go(make_model: MakeModel) -> None:
    _, facts = make_model("Qwen2ForCausalLM")
    division = divide(facts, hparams())
    alone = plan_memory.training(division, load(ranks=1, ranks_per_host=1))
    assert alone["gathered weights"] == 0
    assert alone["frozen suffix weights"] == 4 * (division.suffix - 64 * 176)
    for offload, place in (("cpu", plan_memory.host), ("nvme", plan_memory.files)):
        given = load(offload=offload)
        assert plan_memory.training(division, given)["frozen suffix weights"] == 0
        assert place(division, given)["offloaded weights"] == alone["frozen suffix weights"]
    spilled = load(cache_budget_bytes=10)
    assert plan_memory.host(division, spilled)["hidden states"] == 0
    assert plan_memory.files(division, spilled)["hidden states"] == 40 * 16 * 64 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("architecture", "changes"), VARIANTS)
def test_activations_are_what_autograd_keeps(
    architecture: str, changes: dict[str, Any], dtype: torch.dtype, make_model: MakeModel
) -> None:
    """All that is kept of the forward pass through the suffix, but for its weights."""
    sizes = {**changes, "num_hidden_layers": 6, "max_position_embeddings": 64}
    model, facts = make_model(architecture, device="cpu", **sizes)
    model = model.to(dtype)
    tuned = [name for name in shapes(facts) if name.startswith("model.layers.1.mlp")]
    tuned = [name for name in tuned if "down_proj" in name and "bias" not in name]
    division = divide(facts, hparams(*tuned))
    given = load(ranks=1, ranks_per_host=1, weight_bytes=dtype.itemsize, tokens=64, batch_size=2)
    expected = plan_memory.activations(division, given)
    # The formula counts a layer's gradients too, of which the forward pass has none.
    expected -= 2 * 64 * plan_memory.layer_activations(division, given, 5)
    assert _kept(model, tuned, dtype) == pytest.approx(expected, rel=0.1)


def _kept(model: Any, tuned: list[str], dtype: torch.dtype) -> int:
    model.requires_grad_(False)
    for name in tuned:
        model.get_parameter(name).requires_grad_()
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    positions = torch.arange(16).repeat(2, 4)
    hidden = torch.randn(2, 64, 64, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(inputs_embeds=hidden, position_ids=positions, use_cache=False)
    return sum(kept.values())


def test_what_is_stated_twice_is_the_same() -> None:
    """The plan imports no torch, and so not these modules."""
    assert plan_memory.ROW_CELLS == examples.ROW_CELLS
    assert plan_memory.CHUNK_TOKENS == frozen_prefix.CHUNK_TOKENS


def test_traffic_by_hand(make_model: MakeModel) -> None:
    _, facts = make_model("Qwen2ForCausalLM")
    division = divide(facts, hparams())
    work = Work(edits=100, tokens_per_edit=16)
    settings = hparams(batch_size=50, max_epochs=3, formats=("raw", "qa"), dtype="bfloat16")
    planned = plan(facts, settings, Cluster(gpus=4, gpu_memory_gb=1), work)
    moved = planned.traffic
    assert planned.steps_per_epoch == 4
    # A suffix that is smaller than the reuse distance is gathered once a step.
    suffix, gradient = 2 * division.suffix * 3 // 4, 4 * 64 * 176 * 3 // 4
    hidden = 13 * 16 * 64 * 3 // 4 * 2
    assert moved.step == suffix + gradient + hidden
    assert moved.epoch == 4 * moved.step
    assert moved.prefix == 2 * division.prefix * 3 // 4
    assert moved.job == moved.prefix + 3 * moved.epoch
    plain = 4 * (suffix + gradient + moved.prefix)
    assert moved.epoch_without_prefix_cache == plain
    assert moved.job_without_prefix_cache == 3 * plain
    alone = plan(facts, settings, Cluster(gpus=1, gpu_memory_gb=1), work)
    assert alone.traffic.job == 0
    assert alone.duration.step_traffic == 0


def test_a_large_suffix_is_gathered_twice_a_step_but_for_its_top() -> None:
    planned = seventy_two(gpus=8)
    layer, head = 877_684_736, 152_064 * 8_192
    weights = 2 * (2 * 61 * layer + head) * 7 / 8
    assert planned.traffic.step == pytest.approx(weights + 242_221_056 * 4 * 7 / 8, rel=1e-4)
    assert planned.gpu_memory["gathered weights"] == pytest.approx(2 * (layer + head), rel=1e-4)


def test_time_follows_what_is_stated(make_model: MakeModel) -> None:
    _, facts = make_model("Qwen2ForCausalLM")
    cluster = Cluster(gpus=2, nodes=2, gpu_memory_gb=1)
    usual = plan(facts, hparams(), cluster).duration
    half = plan(facts, hparams(), cluster, speed=Speed(efficiency=0.15)).duration
    assert half.step_compute == pytest.approx(2 * usual.step_compute)
    slow = plan(facts, hparams(), cluster, speed=Speed(node_link_gb_per_s=0.5)).duration
    assert slow.step_traffic > 10 * usual.step_traffic
    assert usual.epoch == pytest.approx(40 * (usual.step_compute + usual.step_traffic))
    assert usual.edit_epoch == pytest.approx(usual.epoch / 1_000)
    assert usual.job == pytest.approx(usual.prefix + 25 * usual.epoch)
    assert usual.job_without_prefix_cache > usual.job


def seventy_two(**changes: Any) -> Plan:
    settings = hparams("model.layers.19.mlp.down_proj.weight", dtype="bfloat16")
    return plan(read_facts(QWEN_72B), settings, Cluster(**{"gpu_memory_gb": 80, **changes}))


def test_whether_it_fits_and_with_what_it_would() -> None:
    fitting = seventy_two(gpus=8)
    assert fitting.fits
    assert fitting.remedies == ()
    assert fitting.parameters == 72_706_203_648
    tight = seventy_two(gpus=1)
    assert not tight.fits
    assert tight.largest == "frozen suffix weights"
    assert tight.gpu_peak_bytes > 80e9
    gpus = int(tight.remedies[0].split()[0])
    assert seventy_two(gpus=gpus).fits
    assert not seventy_two(gpus=gpus - 1).fits
    assert any("--offload cpu" in remedy for remedy in tight.remedies)
    assert seventy_two(gpus=1, offload="cpu").gpu_memory["frozen suffix weights"] == 0


def test_more_edits_take_more_memory_on_the_host_only() -> None:
    few, many = shipped.plans()["8x80gb"][1_000], shipped.plans()["8x80gb"][10_000]
    assert few.gpu_memory == many.gpu_memory
    assert many.host_memory["hidden states"] == 10 * few.host_memory["hidden states"]


def test_shipped_plans_are_what_the_code_gives() -> None:
    files = shipped.files()
    assert len(files) == 4
    for name, text in files.items():
        assert (shipped.HERE / name).read_text(encoding="utf-8") == text, (
            f"{name} is stale; run python -m deploy.plans"
        )


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        (("model.layers.99.mlp",), UnknownParameter, r"no 'model\.layers\.99\.mlp'; close .*mlp\."),
        (("model.layers.1",), None, ""),
        (("model.layers.7.mlp.experts.down_proj",), UnknownParameter, r"layers\.\d.*down_proj"),
        (("model.embed_tokens",), BadHparams, "every prompt depends on"),
    ],
)
def test_parameters_that_the_model_has_and_has_not(
    parameters: tuple[str, ...],
    error: type[Exception] | None,
    message: str,
    make_model: MakeModel,
) -> None:
    _, facts = make_model("Qwen2ForCausalLM")
    if error is None:
        assert len(divide(facts, hparams(*parameters)).tuned) == 12
        return
    with pytest.raises(error, match=message):
        divide(facts, hparams(*parameters))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "does not state 'vocab_size'"),
        ({"num_attention_heads": "many"}, "'num_attention_heads' is 'many'"),
        ({"intermediate_size": -1}, "'intermediate_size' is -1"),
        ({"num_attention_heads": 0}, "'num_attention_heads' is 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 is wrong"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
    ],
)
def test_a_config_that_cannot_be(changes: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(QWEN_72B.read_text()), **changes}))
    with pytest.raises(UnsupportedModel, match=message) as caught:
        divide(read_facts(file), hparams())
    assert "\n" not in str(caught.value)
