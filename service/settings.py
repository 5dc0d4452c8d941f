"""The service's settings: one frozen value, built in `main`, never at import."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from workers.contract import Offload

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
    data_dir: Path = Path(".errata")
    database_url: str | None = Field(default=None, repr=False)
    """PostgreSQL URL; none: an embedded server under the data directory."""
    version_store: str | None = None
    """fsspec URL; none: under the data directory."""

    replicas: int = Field(default=2, ge=1)
    api_replicas: int = Field(default=1, ge=1)
    train_workers: int = Field(default=2, ge=1)
    """Training ranks, at most."""
    train_workers_min: int | None = Field(default=None, ge=1)
    """Elastic: training starts, or goes on, with as few ranks as these; none: only with all."""
    train_cache_gb: float = Field(default=8.0, ge=0)
    """Host memory per rank, in GiB, for what the frozen layers computed; the rest is in files."""
    offload: Offload = "none"
    """Where frozen weights are kept between uses in training."""
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
    replica_threads: int = Field(default=1, ge=1)
    """CPU threads a replica computes with."""
    kv_tokens: int = Field(default=8192, ge=256)
    """KV cache of each version that has requests, in tokens; also bounds prompt plus answer."""
    max_new_tokens: int = Field(default=512, ge=1)
    """The most tokens one completion may ask for."""
    stage_timeout_s: float = Field(default=60.0, gt=0)
    """A replica that has not acknowledged by then is fenced."""
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

    @field_validator("anchors")
    @classmethod
    def _is_a_file(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_file():
            raise ValueError(f"{value} is not a file; name one with prompts, or none")
        return value

    @property
    def train_cache_bytes(self) -> int:
        return int(self.train_cache_gb * (1 << 30))

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
