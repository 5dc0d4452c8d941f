"""How many bytes a job moves between GPUs, and an estimate of how long it takes.

Torch-free. Formulas over the numbers of a `Division`; nothing here was measured. Start-up, reading
the model from disk, evaluation and publishing are not counted.
"""

import math

from pydantic import Field

from workers.contract import Record
from workers.plan_division import Division
from workers.plan_memory import FLOAT32, Load, cache_bytes, kept_for_backward


class Speed(Record):
    """What the hardware does. The defaults are an H100's: peak from NVIDIA's data sheet, NVLink 4
    in one direction, one 400 Gbit/s port per GPU between hosts."""

    peak_tflops: float = Field(default=989.0, gt=0, allow_inf_nan=False)
    """Of one GPU, dense, in bfloat16."""
    efficiency: float = Field(default=0.3, gt=0, le=1)
    """Share of the peak that is reached (model FLOPs utilization)."""
    link_gb_per_s: float = Field(default=450.0, gt=0, allow_inf_nan=False)
    """Into one GPU from others of its host."""
    node_link_gb_per_s: float = Field(default=50.0, gt=0, allow_inf_nan=False)
    """Into one host from others, per GPU of the host."""
    host_gb_per_s: float = Field(default=20.0, gt=0, allow_inf_nan=False)
    """Between one GPU and its host, or the disk that its weights are offloaded to."""


class Traffic(Record):
    """Bytes that one GPU receives from the others."""

    step: int
    """One batch that takes a step."""
    epoch: int
    prefix: int
    """Once per job."""
    job: int
    epoch_without_prefix_cache: int
    """If the prefix ran in every step: what plain ZeRO-3 training moves."""
    job_without_prefix_cache: int
    offloaded_epoch: int
    """Bytes that one GPU reads of offloaded weights."""


class Duration(Record):
    """Estimated seconds, at the stated `Speed`; computing and moving do not overlap."""

    prefix: float
    step_compute: float
    step_traffic: float
    epoch: float
    edit_epoch: float
    """An epoch's, per edit."""
    job: float
    """With as many epochs as are allowed; a run that has learnt its edits stops before."""
    epoch_without_prefix_cache: float
    job_without_prefix_cache: float


def steps_per_epoch(load: Load) -> int:
    return math.ceil(load.samples / load.batch_size)


def traffic(division: Division, load: Load, epochs: int) -> Traffic:
    """ZeRO-3: to have P weights whole, a rank of R receives P (R - 1) / R of them.

    A step gathers the suffix twice, for the forward and the backward pass, but for the top, which
    is kept from one to the other; and it reduces the tuned tensors' float32 gradient, of which each
    rank receives its part from all others: as many bytes as gathering it. It also gets its
    samples' hidden states from the ranks that keep them. Without the cache, the prefix is gathered
    for each forward pass instead.
    """
    gathered = _gathered_per_step(division, load)
    prefix = _received(load.weight_bytes * division.prefix, load)
    gradient = _received(FLOAT32 * division.tuned_parameters, load)
    hidden = _received(load.share * load.tokens * division.sizes.hidden, load) * load.weight_bytes
    weights, steps = _received(gathered, load) + gradient, steps_per_epoch(load)
    step, plain = weights + hidden, (weights + prefix) * steps
    read = 0 if load.offload == "none" else math.ceil(gathered / load.ranks) * steps
    return Traffic(
        step=step,
        epoch=step * steps,
        prefix=prefix,
        job=prefix + step * steps * epochs,
        epoch_without_prefix_cache=plain,
        job_without_prefix_cache=plain * epochs,
        offloaded_epoch=read,
    )


def duration(division: Division, load: Load, epochs: int, speed: Speed) -> Duration:
    """A matrix product of P weights costs 2 P operations per token, and again for the gradient of
    its input; a tuned weight as much again for its own. Attention over ~20 tokens is left out, as
    are the hidden states of a step. In the prefix they go to the host and back for every layer.
    """
    peak = speed.peak_tflops * 1e12 * speed.efficiency
    moved = traffic(division, load, epochs)
    forward = 2 * division.active_prefix * load.tokens
    head = 4 * division.head * load.target_tokens
    suffix = (4 * division.active_suffix + 2 * division.tuned_parameters) * load.tokens + head
    steps = steps_per_epoch(load)
    gathers = _gathered_per_step(division, load) + FLOAT32 * division.tuned_parameters
    transfer = _seconds(gathers, load, speed)
    transfer += moved.offloaded_epoch / steps / (speed.host_gb_per_s * 1e9)
    compute = load.share * suffix / peak
    prefix_transfer = _seconds(load.weight_bytes * division.prefix, load, speed)
    stored = 2 * division.depth * cache_bytes(division, load) / (speed.host_gb_per_s * 1e9)
    prefix = load.kept * forward / peak + prefix_transfer + stored
    plain = compute + transfer + load.share * forward / peak + prefix_transfer
    epoch = steps * (compute + transfer)
    return Duration(
        prefix=prefix,
        step_compute=compute,
        step_traffic=transfer,
        epoch=epoch,
        edit_epoch=epoch / load.edits,
        job=prefix + epochs * epoch,
        epoch_without_prefix_cache=steps * plain,
        job_without_prefix_cache=epochs * steps * plain,
    )


def _gathered_per_step(division: Division, load: Load) -> int:
    return load.weight_bytes * (2 * division.suffix - kept_for_backward(division))


def _received(size: int, load: Load) -> int:
    return size * (load.ranks - 1) // load.ranks


def _seconds(size: int, load: Load, speed: Speed) -> float:
    """To bring `size` bytes together on every rank: over the slower of the two kinds of link.

    What comes from other hosts enters a host once, over the ports of all its GPUs.
    """
    hosts = load.ranks // load.ranks_per_host
    inside = _received(size, load) / (speed.link_gb_per_s * 1e9)
    ports = load.ranks_per_host * speed.node_link_gb_per_s * 1e9
    return max(inside, size * (hosts - 1) / hosts / ports)
