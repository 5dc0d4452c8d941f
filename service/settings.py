"""The service's settings: one frozen value, built in `main`, never at import."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from workers.contract import Device, Offload

GIB = 1 << 30
DEMO_MODEL = Path(__file__).resolve().parent.parent / "deploy" / "demo" / "model"


class Settings(BaseSettings):
    """Every field is also `ERRATA_<NAME>` in the environment or in `.env`."""

    model_config = SettingsConfigDict(
        env_prefix="ERRATA_", env_file=".env", extra="ignore", frozen=True
    )

    model: str = "demo"
    """`demo`, a directory, or a hub id."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    behind_proxy: bool = False
    """Whatever reaches the port was authenticated by a proxy before it; only then may it be open
    beyond this machine."""
    data_dir: Path = Path(".errata")
    database_url: str | None = Field(default=None, repr=False)
    """PostgreSQL URL; none: an embedded server under the data directory."""
    version_store: str | None = None
    """fsspec URL; none: under the data directory."""

    replicas: int = Field(default=2, ge=1)
    """Inference replicas at the start; always, unless `replicas_min` or `replicas_max` is set."""
    replicas_min: int | None = Field(default=None, ge=0)
    """Autoscaling: the fewest replicas; 0 lets an idle service go without any."""
    replicas_max: int | None = Field(default=None, ge=1)
    """Autoscaling: the most replicas."""
    replica_queries: float = Field(default=16.0, gt=0)
    """Autoscaling: queries in flight that a replica should have."""
    scale_down_after_s: float = Field(default=300.0, ge=0)
    """Autoscaling: with too few queries for so long, a replica is ended."""
    replica_cpus: float = Field(default=0.0, ge=0)
    """CPUs of the Ray cluster that each replica reserves."""
    replica_gpus: float = Field(default=0.0, ge=0, le=1)
    """GPUs that each replica reserves; 0: it computes on CPUs. The engine runs on one GPU."""
    api_replicas: int = Field(default=1, ge=1)
    api_cpus: float = Field(default=0.0, ge=0)
    """CPUs that each Api, and the coordinator, reserves: above 0, none is on a head without any."""
    cluster_wait_s: float = Field(default=600.0, ge=0)
    """How long a deployment waits for nodes with the GPUs that a replica needs; a minute of it at
    most for a database, a version store and nodes that are not reached."""
    train_workers: int = Field(default=2, ge=1)
    """Training ranks, at most."""
    train_workers_min: int | None = Field(default=None, ge=1)
    """Elastic: training starts, or goes on, with as few ranks as these; none: only with all."""
    train_device: Device = "auto"
    """`cuda`: a GPU for each rank, waited for; `cpu`: none; `auto`: GPUs if there are as many."""
    train_cache_gb: float = Field(default=8.0, ge=0)
    """Host memory per rank, in GiB, for what the frozen layers computed; the rest is in files."""
    offload: Offload = "none"
    """Where frozen weights are kept between uses in training."""
    runner_timeout_s: float = Field(default=900.0, ge=0)
    """A job of `errata jobs run --here` that nobody has trained for so long fails."""
    checkpoint_every_s: float = Field(default=30.0, ge=0)
    """At least so long between two checkpoints of a training run."""
    hparams: Path | None = None
    """YAML file; none: the file of the model's family in `workers/hparams`."""

    anchors: Path | None = None
    """Prompts for `hparams.anchor_prompts`: JSON lines with `prompt` and, if known, `answer`, or
    one prompt a line."""
    recheck: int = Field(default=100, ge=0, le=1_000_000)
    """How many earlier edits are asked again of a job's version, unless the job says so."""

    resident_versions: int = Field(default=4, ge=2)
    """How many versions a replica holds beside the base."""
    resident_gb: float | None = Field(default=None, gt=0)
    """Memory in GiB for the versions a replica holds beside the base; none: bounded by number."""
    version_cache_gb: float = Field(default=50.0, gt=0)
    """Disk in GiB, per node, for versions downloaded from a store that is not a local folder."""
    fetch_timeout_s: float = Field(default=60.0, gt=0)
    """One attempt to read a piece of a file of the version store takes at most so long."""
    fetch_attempts: int = Field(default=4, ge=1)
    """How often a piece of a file is asked for before the version store counts as away."""
    replica_threads: int = Field(default=1, ge=1)
    """CPU threads a replica computes with."""
    kv_tokens: int = Field(default=8192, ge=256)
    """KV cache of a replica, in tokens, shared by its versions; also bounds prompt plus answer."""
    max_new_tokens: int = Field(default=512, ge=1)
    """The most tokens one completion may ask for."""
    stage_timeout_s: float = Field(default=60.0, gt=0)
    """A replica that has not acknowledged by then is fenced."""
    gate_edits: int = Field(default=20, ge=0)
    """Before a version is first committed, so many of its edits, drawn anew, are asked of it."""
    gate_reliability: float = Field(default=0.9, ge=0, le=1)
    """The share of those that must be answered with their target; else the version is rejected."""
    gate_prompts: Path | None = None
    """Prompts whose answers no version may change, else it is rejected: as in `anchors`."""
    heartbeat_s: float = Field(default=1.0, gt=0)
    lease_s: float = Field(default=10.0, gt=0)
    """A replica whose heartbeat is older is not live."""

    job_after_edits: int | None = Field(default=None, ge=1)
    """Start a job by itself once so many edits are queued; none: only when asked."""
    job_after_s: float | None = Field(default=None, gt=0)
    """Start a job by itself once the oldest queued edit is so old; none: only when asked."""

    @field_validator("train_workers_min")
    @classmethod
    def _within_train_workers(cls, value: int | None, info: ValidationInfo) -> int | None:
        most = info.data.get("train_workers")
        if value is not None and most is not None and value > most:
            raise ValueError(f"{value} is more than train_workers, {most}; lower it or raise those")
        return value

    @model_validator(mode="after")
    def _replicas_in_range(self) -> "Settings":
        least, most = self.replica_range
        if not least <= self.replicas <= most:
            raise ValueError(
                f"replicas is {self.replicas}, but replicas_min to replicas_max is {least} to "
                f"{most}; choose a number between them"
            )
        return self

    @field_validator("anchors", "gate_prompts")
    @classmethod
    def _is_a_file(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_file():
            raise ValueError(f"{value} is not a file; name one with prompts, or none")
        return value

    @property
    def replica_range(self) -> tuple[int, int]:
        """The fewest and the most inference replicas."""
        least = self.replicas if self.replicas_min is None else self.replicas_min
        most = self.replicas if self.replicas_max is None else self.replicas_max
        return least, most

    @property
    def resident_bytes(self) -> int | None:
        return None if self.resident_gb is None else int(self.resident_gb * GIB)

    @property
    def version_cache_bytes(self) -> int:
        return int(self.version_cache_gb * GIB)

    @property
    def train_cache_bytes(self) -> int:
        return int(self.train_cache_gb * GIB)

    @property
    def model_path(self) -> str:
        """Directory or hub id to load the base model from."""
        return str(DEMO_MODEL) if self.model == "demo" else self.model

    @property
    def version_store_url(self) -> str:
        return self.version_store or str(self.data_dir.resolve() / "store")

    def replace(self, **changes: Any) -> "Settings":
        """A copy with some fields changed; the changes are validated."""
        return Settings.model_validate({**self.model_dump(), **changes})


def problems(error: ValidationError) -> str:
    """What is wrong with which fields, a line each."""
    return "\n".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
