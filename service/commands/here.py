"""`errata jobs run --here`: the job is trained on the Ray cluster where the command runs.

That is the one that RAY_ADDRESS names, or one of its own on this machine. Owns what must be
configured, the signals and the output; `service.runner` does the work.
"""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from service import display, runner
from service.api.schemas import JobIn, JobOut
from service.client import JSON
from service.coordinator.pipeline import BaseModel
from service.errors import ConfigurationError, Unavailable
from service.jobs import Job
from service.node import ray_cluster
from service.settings import Settings
from service.store import jobs
from service.store.database import Database
from service.store.migrate import upgrade
from workers import presets
from workers.contract import ProgressSink, TrainRequest, TrainResult
from workers.errors import WorkersError

T = TypeVar("T")


def run_here(body: JSON, wait: bool, quiet: bool) -> JSON:
    """Trains a job, and with `wait` follows it to its end; what GET /jobs/{id} would answer.

    `body` is as POST /jobs takes it. Raises `ConfigurationError` before anything is claimed if
    the settings cannot work.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger(runner.__name__).setLevel(logging.INFO)
    # As Ctrl-C: whatever was started is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings, asked = Settings(), JobIn.model_validate(body)
    url = _database_url(settings)
    from service.app import base_model
    from service.preflight import require_nodes

    upgrade(url)
    base = base_model(settings)
    asyncio.run(_check(url, base))
    with display.watching(quiet=quiet) as show:

        def show_job(job: Job) -> None:
            show(_json(job))

        with ray_cluster(settings):
            require_nodes(settings)
            job = _run(
                _train(url, settings, base, asked, show_job),
                "the job stays; `errata jobs run --here` goes on with it",
            )
        if wait:
            job = _run(_ended(url, job.id, show_job), "the service goes on with the job")
    return _json(job)


def _database_url(settings: Settings) -> str:
    if settings.database_url is None:
        raise ConfigurationError(
            "database_url: none is set; a job that is trained here is one of a service that "
            "serves elsewhere: set ERRATA_DATABASE_URL to its PostgreSQL"
        )
    if settings.version_store is None:
        raise ConfigurationError(
            "version_store: none is set; the replicas read what is trained here from the version "
            "store of their service: set ERRATA_VERSION_STORE to the same one"
        )
    return settings.database_url


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[Database]:
    database = Database(url, pool_size=4)
    try:
        yield database
    finally:
        await database.dispose()


async def _check(url: str, base: BaseModel) -> None:
    async with _connected(url) as database:
        await runner.check_base(database, base.fingerprint)


async def _train(
    url: str, settings: Settings, base: BaseModel, asked: JobIn, show: runner.Show
) -> Job:
    # Recorded whole: where the edits are claimed and examined, the same ones hold.
    hparams = presets.load(base.facts, settings.hparams, asked.checked_hparams())

    async def create(conn: AsyncConnection, runner_id: str) -> Job:
        return await jobs.create(
            conn,
            kind=asked.kind,
            activate=asked.activate,
            max_edits=asked.max_edits,
            hparams=hparams.model_dump(mode="json"),
            recheck=asked.rechecked(settings.recheck),
            runner_id=runner_id,
        )

    async with _connected(url) as database:
        return await runner.Runner(database, url, settings, base, _on_ray, show).run(create)


async def _ended(url: str, job_id: str, show: runner.Show) -> Job:
    async with _connected(url) as database:
        return await runner.ended(database, job_id, show)


async def _on_ray(request: TrainRequest, sink: ProgressSink) -> TrainResult:
    """Trains in a task, which ends with this process."""
    import ray
    from ray.exceptions import RayError

    from workers.job import train

    here = ray.get_runtime_context()
    # As for the coordinator: a machine may have several clusters.
    environment = {"env_vars": {"RAY_ADDRESS": here.gcs_address}}
    task: Any = ray.remote(num_cpus=0, max_retries=0, runtime_env=environment)(train)
    try:
        result: TrainResult = await task.remote(request, sink)
    except RayError as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, WorkersError):
            raise cause from None
        raise Unavailable(
            f"the training of job {request.job_id} was lost ({type(cause).__name__}: {cause}); "
            "`errata jobs run --here` goes on with it"
        ) from error
    return result


def _run(work: Coroutine[Any, Any, T], otherwise: str) -> T:
    """To its end, or until SIGINT or SIGTERM; says what happens `otherwise`."""

    async def interruptible() -> T:
        task, loop = asyncio.create_task(work), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        return await task

    try:
        return asyncio.run(interruptible())
    except asyncio.CancelledError:
        logging.getLogger(runner.__name__).warning("interrupted: %s", otherwise)
        raise typer.Exit(1) from None


def _json(job: Job) -> JSON:
    return JobOut.of(job).model_dump(mode="json")
