"""`create_api`: the HTTP interface as a FastAPI application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from service.api import completions, edits, health, jobs, problems, serving, versions
from service.api.admission import Admission
from service.inference import Inference
from service.settings import Settings
from service.store.database import Database


def create_api(settings: Settings, database: Database, inference: Inference) -> FastAPI:
    """The application; its lifespan follows the committed version and closes `database`."""

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
    problems.install(app)
    for module in (edits, jobs, versions, serving, completions, health):
        app.include_router(module.router)
    return app
