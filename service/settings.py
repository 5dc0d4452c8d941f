"""The service's settings: one frozen value, built in `main`, never at import."""

from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

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
    hparams: Path | None = None
    """YAML file; none: the file of the model's family in `workers/hparams`."""

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
