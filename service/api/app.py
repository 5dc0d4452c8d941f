"""`create_api`: the HTTP interface as a FastAPI application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from service.api import completions, edits, health, jobs, metrics, problems, serving, versions
from service.api.admission import Admission
from service.api.metrics import Exporters
from service.inference import Inference
from service.settings import Settings
from service.store.database import Database


def create_api(
    settings: Settings,
    database: Database,
    inference: Inference,
    exporters: Exporters = lambda: (),
) -> FastAPI:
    """The application; its lifespan follows the committed version and closes `database`.

    `exporters` tells where `/metrics` is gathered; none: nowhere.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        admission = Admission(database)
        app.state.admission = admission
        await admission.start()
        try:
            yield
        finally:
            await admission.stop()
            await database.dispose()

    app = FastAPI(
        title="Errata", description="Edits what a language model knows.", lifespan=lifespan
    )
    app.state.settings = settings
    app.state.database = database
    app.state.inference = inference
    app.state.exporters = exporters
    problems.install(app)
    for module in (edits, jobs, versions, serving, completions, health, metrics):
        app.include_router(module.router)
    return app
