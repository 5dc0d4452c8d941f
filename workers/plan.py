"""`plan`: what a job would take on given hardware, from the model's `config.json` alone.

Torch-free. Owns what is asked and answered; the formulas are in `plan_memory` and `plan_traffic`,
the counts of parameters in `plan_division`. Knows nothing of files.
"""

from collections.abc import Iterator, Mapping
from typing import get_args

from pydantic import Field

from workers import plan_memory, plan_traffic
from workers.contract import Format, Hparams, Offload, Record, TrainRequest
from workers.models import ModelFacts
from workers.plan_division import Division, divide
from workers.plan_memory import Load
from workers.plan_traffic import Duration, Speed, Traffic

GB = 1_000_000_000
MOST_GPUS = 4096
"""A remedy with more is none."""


class Cluster(Record):
    """The hardware: hosts that are alike. A GB is 10^9 bytes."""

    gpus: int = Field(ge=1, le=1024)
    """Per host."""
    gpu_memory_gb: float = Field(gt=0, allow_inf_nan=False)
    nodes: int = Field(default=1, ge=1, le=100_000)
    offload: Offload = "none"


class Work(Record):
    """The edits, as far as they matter."""

    edits: int = Field(default=1_000, ge=1, le=1_000_000_000)
    tokens_per_edit: int = Field(default=24, ge=1, le=1_000_000)
    """Read in one format: the prompt and the target."""
    target_tokens: int = Field(default=5, ge=1, le=1_000_000)
    """Learnt in one format: the target and EOS."""
    cache_budget_bytes: int = Field(
        default=TrainRequest.model_fields["cache_budget_bytes"].default, ge=0
    )
    """Host memory of one rank for hidden states; beyond it they are in files."""


class Plan(Record):
    """What a job takes; memory in bytes by kind."""

    architecture: str
    parameters: int
    """Of the model."""
    layers: int
    prefix_layers: int
    tuned: tuple[str, ...]
    tuned_parameters: int
    hparams: Hparams
    formats: int
    """In how many each edit is trained."""
    cluster: Cluster
    work: Work
    speed: Speed
    gpu_memory: Mapping[str, int]
    """Of one GPU while epochs run."""
    gpu_memory_prefix: Mapping[str, int]
    """Of one GPU while the frozen prefix runs, before the epochs."""
    host_memory: Mapping[str, int]
    """Of one host."""
    files: Mapping[str, int]
    """Of one host, on disk, besides the model itself."""
    gpu_peak_bytes: int
    fits: bool
    largest: str
    """The kind that takes most of the peak."""
    remedies: tuple[str, ...]
    """With what it would fit, if it does not."""
    steps_per_epoch: int
    traffic: Traffic
    duration: Duration


def plan(
    facts: ModelFacts,
    hparams: Hparams,
    cluster: Cluster,
    work: Work | None = None,
    speed: Speed | None = None,
) -> Plan:
    """Memory, bytes moved and estimated time of a job.

    Raises `UnknownParameter`, `BadHparams` or `UnsupportedModel` naming what is wrong.
    """
    work, speed = work or Work(), speed or Speed()
    division = divide(facts, hparams)
    load = _load(hparams, cluster, work)
    training, prefix = plan_memory.training(division, load), plan_memory.prefix(division, load)
    fullest = max(training, prefix, key=lambda memory: sum(memory.values()))
    fits = sum(fullest.values()) <= cluster.gpu_memory_gb * GB
    return Plan(
        architecture=facts.architecture,
        parameters=division.total,
        layers=division.sizes.layers,
        prefix_layers=division.depth,
        tuned=tuple(division.tuned),
        tuned_parameters=division.tuned_parameters,
        hparams=hparams,
        formats=formats(hparams),
        cluster=cluster,
        work=work,
        speed=speed,
        gpu_memory=training,
        gpu_memory_prefix=prefix,
        host_memory=plan_memory.host(division, load),
        files=plan_memory.files(division, load),
        gpu_peak_bytes=sum(fullest.values()),
        fits=fits,
        largest=max(fullest, key=lambda kind: fullest[kind]),
        remedies=() if fits else tuple(_remedies(division, hparams, cluster, work)),
        steps_per_epoch=plan_traffic.steps_per_epoch(load),
        traffic=plan_traffic.traffic(division, load, hparams.max_epochs),
        duration=plan_traffic.duration(division, load, hparams.max_epochs, speed),
    )


def formats(hparams: Hparams) -> int:
    """In how many formats each edit is trained; without a choice in all, as a chat model can."""
    return len(set(hparams.formats or get_args(Format)))


def _load(hparams: Hparams, cluster: Cluster, work: Work) -> Load:
    return Load(
        ranks=cluster.gpus * cluster.nodes,
        ranks_per_host=cluster.gpus,
        weight_bytes=2 if hparams.dtype == "bfloat16" else 4,
        edits=work.edits,
        samples=work.edits * formats(hparams),
        batch_size=hparams.batch_size,
        tokens=work.tokens_per_edit,
        target_tokens=work.target_tokens,
        offload=cluster.offload,
        cache_budget_bytes=work.cache_budget_bytes,
    )


def _remedies(division: Division, hparams: Hparams, cluster: Cluster, work: Work) -> Iterator[str]:
    """More GPUs, hosts, offload, a smaller batch: each alone, as far as it helps."""

    def fits(changed: Cluster, settings: Hparams = hparams) -> bool:
        load = _load(settings, changed, work)
        peak = max(
            sum(memory(division, load).values())
            for memory in (plan_memory.training, plan_memory.prefix)
        )
        return peak <= cluster.gpu_memory_gb * GB

    def change(**values: object) -> Cluster:
        return cluster.model_copy(update=values)

    if cluster.nodes == 1:
        for gpus in range(cluster.gpus + 1, 9):
            if fits(change(gpus=gpus)):
                yield f"{gpus} such GPUs"
                break
    nodes = cluster.nodes * 2
    while nodes * cluster.gpus <= MOST_GPUS:
        if fits(change(nodes=nodes)):
            yield f"{nodes} nodes of {cluster.gpus} such GPUs"
            break
        nodes *= 2
    if cluster.offload == "none" and fits(change(offload="cpu")):
        yield "offloading the frozen weights to host memory (--offload cpu)"
    batch = hparams.batch_size
    while (batch := batch // 2) >= 1:
        if fits(cluster, hparams.model_copy(update={"batch_size": batch})):
            yield f"a batch of {batch} (--batch-size {batch})"
            break
