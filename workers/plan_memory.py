"""How much memory a job takes, by kind: formulas over the numbers of a `Division`, in bytes.

Torch-free. All figures are per GPU unless a function says otherwise; what is spread over the ranks
is counted as the fullest rank has it. Knows nothing of time.
"""

import math
from dataclasses import dataclass

from workers.contract import Offload
from workers.plan_division import Division

FLOAT32 = 4
ROW_CELLS = 64
"""Of one row of packed samples; as in `examples`."""
CHUNK_TOKENS = 8192
"""In one pass through a prefix layer; as in `frozen_prefix`."""
REUSE_DISTANCE = 1_000_000_000
"""DeepSpeed keeps a gathered parameter if it is used again before so many others are (its
`stage3_max_reuse_distance`)."""
CONTEXT_BYTES = 2_000_000_000
"""Allowance per GPU: CUDA context, NCCL's buffers, workspaces, fragmentation."""
PROCESS_BYTES = 3_000_000_000
"""Allowance of host memory per rank: Python, torch and CUDA's libraries."""
NVME_BUFFER_PARAMETERS = 500_000_000
"""Pinned by each rank to read from disk (DeepSpeed's default: 5 buffers of 100 million)."""


@dataclass(frozen=True)
class Load:
    """What a job asks of the ranks."""

    ranks: int
    ranks_per_host: int
    weight_bytes: int
    """Per weight: 2 in bfloat16, 4 in float32."""
    edits: int
    samples: int
    """Edits times formats."""
    batch_size: int
    tokens: int
    """Read per sample."""
    target_tokens: int
    """Learnt per sample."""
    offload: Offload
    cache_budget_bytes: int

    @property
    def share(self) -> int:
        """Samples of a batch that one rank takes."""
        return math.ceil(min(self.batch_size, self.samples) / self.ranks)

    @property
    def kept(self) -> int:
        """Samples whose hidden states one rank keeps."""
        return math.ceil(self.samples / self.ranks)


def training(division: Division, load: Load) -> dict[str, int]:
    """While epochs run over the suffix.

    A tuned weight costs its place among the weights and, in float32, a master copy, Adam's two
    moments and a gradient, all spread over the ranks (ZeRO-3). Its gradient is whole on each rank
    until it is reduced, in float32 beside the weights' own type.
    """
    tuned, ranks = division.tuned_parameters, load.ranks
    frozen = division.suffix - tuned if load.offload == "none" else 0
    return {
        "frozen suffix weights": load.weight_bytes * _part(frozen, ranks),
        "gathered weights": gathered(division, load),
        "tuned weights": load.weight_bytes * _part(tuned, ranks),
        "tuned weights, float32 copy": FLOAT32 * _part(tuned, ranks),
        "Adam moments": 2 * FLOAT32 * _part(tuned, ranks),
        "gradient": FLOAT32 * _part(tuned, ranks),
        "gradient before reduction": (FLOAT32 + load.weight_bytes) * tuned,
        "activations": activations(division, load),
        "logits": logits(division, load),
        "CUDA context": CONTEXT_BYTES,
    }


def prefix(division: Division, load: Load) -> dict[str, int]:
    """While the layers below the tuned one are made, run and released, one by one."""
    layer = load.weight_bytes * division.largest_of_prefix
    return {
        "prefix layer": _part(layer, load.ranks) if load.offload == "none" else 0,
        # Whole even on one rank, before ZeRO-3 takes its partition of it.
        "gathered prefix layer": layer,
        "prefix activations": prefix_activations(division, load),
        "CUDA context": CONTEXT_BYTES,
    }


def host(division: Division, load: Load) -> dict[str, int]:
    """Of one host, over all its ranks.

    `samples as tokens`: every rank has all samples, at 8 bytes a token and as much again for
    Python's objects. `while loading`: the rank's part of the largest tensor, as read from its file.
    """
    cache = cache_bytes(division, load)
    tokens = load.samples * (load.tokens + load.target_tokens)
    per_rank = {
        "hidden states": cache if cache <= load.cache_budget_bytes else 0,
        "offloaded weights": _offloaded(division, load) if load.offload == "cpu" else 0,
        "disk buffers": NVME_BUFFER_PARAMETERS * load.weight_bytes * (load.offload == "nvme"),
        "samples as tokens": 16 * tokens,
        "while loading": load.weight_bytes * _part(division.largest, load.ranks),
        "processes": PROCESS_BYTES,
    }
    return {kind: amount * load.ranks_per_host for kind, amount in per_rank.items()}


def files(division: Division, load: Load) -> dict[str, int]:
    """On one host's disk, over all its ranks, besides the model itself."""
    cache = cache_bytes(division, load)
    per_rank = {
        "hidden states": cache if cache > load.cache_budget_bytes else 0,
        "offloaded weights": _offloaded(division, load) if load.offload == "nvme" else 0,
    }
    return {kind: amount * load.ranks_per_host for kind, amount in per_rank.items()}


def gathered(division: Division, load: Load) -> int:
    """Whole weights in flight: two neighbouring layers, or what is kept for the backward pass with
    the layer below.

    One rank that holds all weights on its GPU uses them where they are.
    """
    if load.ranks == 1 and load.offload == "none":
        return 0
    largest = max(division.layers[division.depth :], default=0)
    kept = min(kept_for_backward(division) + largest, division.suffix)
    return load.weight_bytes * max(division.largest_pair_of_suffix, kept)


def kept_for_backward(division: Division) -> int:
    """Parameters that are still whole from the forward pass when the backward pass gets to them:
    the topmost, those above which are passed twice within the reuse distance."""
    above = 0
    for parameters in (division.head, *reversed(division.layers[division.depth :])):
        if 2 * above > REUSE_DISTANCE:
            break
        above += parameters
    return above


def activations(division: Division, load: Load) -> int:
    """What autograd keeps of one rank's share of a batch, and as much as one layer of gradients.

    Frozen linear layers keep nothing: their input's gradient needs their weights only. Nothing is
    kept below the lowest tuned module; of the lowest layer that is its input if only
    down-projections are tuned there.
    """
    above = range(division.depth + 1, division.sizes.layers)
    kept = sum(layer_activations(division, load, layer) for layer in above)
    kept += max((layer_activations(division, load, layer) for layer in above), default=0)
    kept += _lowest_layer(division, load)
    kept += FLOAT32 * division.sizes.hidden + 2 * load.weight_bytes * division.sizes.head
    rows = math.ceil(load.share * load.tokens / ROW_CELLS)
    return kept * rows * ROW_CELLS


def layer_activations(division: Division, load: Load, layer: int) -> int:
    """Kept by one frozen layer for each cell of the batch.

    The inputs of its norms, in float32; of attention the queries, keys, values (repeated to as
    many heads), output, log-sum and mask; of the MLP gate, its activation and up, in a mixture
    for each expert that a token passes, with that expert's output.
    """
    its, width = division.sizes, load.weight_bytes
    heads = its.query // its.head
    norms = FLOAT32 * (2 * its.hidden + 2)
    if its.kind in ("qwen3", "qwen3_moe", "olmo2"):
        norms += FLOAT32 * (its.query + its.key)
    attention = width * (4 * its.query + ROW_CELLS) + FLOAT32 * heads
    if its.kind == "gpt_oss":
        # Attention with sinks is written out: its probabilities are kept.
        attention += 2 * width * heads * ROW_CELLS
    return norms + attention + width * _mlp(division, layer)


def _mlp(division: Division, layer: int) -> int:
    its = division.sizes
    if not its.sparse(layer):
        return 3 * (its.width or 0)
    # An activation that clamps and interleaves keeps five tensors where the usual one keeps three.
    kept = 5 if its.kind == "gpt_oss" else 3
    experts = its.experts_per_token * (kept * its.expert_width + its.hidden)
    shared = 3 * its.shared_width + its.hidden if its.shared_width else 0
    return experts + shared + 3 * its.experts


def _lowest_layer(division: Division, load: Load) -> int:
    """Kept for each cell by the lowest tuned layer: the inputs of what is tuned, and the layer."""
    inputs, whole = 0, False
    for name, shape in division.tuned.items():
        if name.startswith(f"model.layers.{division.depth}."):
            times = division.sizes.experts_per_token if ".experts." in name else 1
            inputs += load.weight_bytes * shape[-1] * times
            whole = whole or "down_proj" not in name
    return inputs + (layer_activations(division, load, division.depth) if whole else 0)


def prefix_activations(division: Division, load: Load) -> int:
    """The widest point of a frozen layer's forward pass over one chunk of samples."""
    its = division.sizes
    cells = min(CHUNK_TOKENS, max(load.kept * load.tokens, ROW_CELLS))
    mlp = max((_mlp(division, layer) for layer in range(division.depth)), default=0)
    widest = max(mlp, 4 * its.query)
    return cells * (load.weight_bytes * (widest + 3 * its.hidden) + FLOAT32 * its.hidden)


def logits(division: Division, load: Load) -> int:
    """At learnt positions only: in the weights' type, and three times in float32 (the logits, their
    log-softmax, its gradient)."""
    own = load.weight_bytes if load.weight_bytes < FLOAT32 else 0
    positions = load.share * load.target_tokens
    return positions * division.sizes.vocabulary * (3 * FLOAT32 + own)


def cache_bytes(division: Division, load: Load) -> int:
    """One rank's hidden states: of each token that its samples read."""
    return load.kept * load.tokens * division.sizes.hidden * load.weight_bytes


def _offloaded(division: Division, load: Load) -> int:
    return load.weight_bytes * _part(division.suffix - division.tuned_parameters, load.ranks)


def _part(count: int, ranks: int) -> int:
    return math.ceil(count / ranks)
