"""What routes are given, from the state that `create_api` sets."""

from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request

from service.api.admission import Admission
from service.inference import Inference
from service.settings import Settings
from service.store.database import Database


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


def _inference(request: Request) -> Inference:
    inference: Inference = request.app.state.inference
    return inference


def _admission(request: Request) -> Admission:
    admission: Admission = request.app.state.admission
    return admission


SettingsDep = Annotated[Settings, Depends(_settings)]
DatabaseDep = Annotated[Database, Depends(_database)]
InferenceDep = Annotated[Inference, Depends(_inference)]
AdmissionDep = Annotated[Admission, Depends(_admission)]

IdInPath = Annotated[str, Path(pattern=r"^\w{1,64}$")]
IdInQuery = Annotated[str | None, Query(pattern=r"^\w{1,64}$")]
Limit = Annotated[int, Query(ge=1, le=1000)]
Cursor = Annotated[str | None, Query(max_length=256)]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255)]
