"""Errors as `application/problem+json` (RFC 9457): one table, one shape."""

import logging
from collections.abc import Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from service.errors import (
    Conflict,
    ErrataError,
    FieldError,
    InvalidInput,
    NotFound,
    Unavailable,
    VersionRejected,
)

RETRY_AFTER_S = 1
STATUS: dict[type[ErrataError], HTTPStatus] = {
    InvalidInput: HTTPStatus.UNPROCESSABLE_ENTITY,
    NotFound: HTTPStatus.NOT_FOUND,
    Conflict: HTTPStatus.CONFLICT,
    VersionRejected: HTTPStatus.CONFLICT,
    Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
}

log = logging.getLogger(__name__)


def install(app: FastAPI) -> None:
    """Turn every error of `app` into a problem."""
    app.add_exception_handler(ErrataError, _on_own)
    app.add_exception_handler(RequestValidationError, _on_bad_request)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_unexpected)


def problem(
    status: int,
    detail: str,
    errors: Sequence[FieldError] = (),
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An error response; `errors` names the bad fields."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    listed = [{"field": error.field, "message": error.message} for error in errors]
    return JSONResponse(
        {**body, "detail": detail, **({"errors": listed} if listed else {})},
        status,
        headers,
        media_type="application/problem+json",
    )


async def _on_own(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ErrataError)
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), None)
    if status is None:
        return await _on_unexpected(_request, error)
    away = status is HTTPStatus.SERVICE_UNAVAILABLE
    headers = {"Retry-After": str(RETRY_AFTER_S)} if away else None
    return problem(status, error.detail, error.errors, headers)


async def _on_bad_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(one["type"] == "json_invalid" for one in found):
        place = found[0]["loc"][-1]
        return problem(400, f"the body is not JSON: {found[0]['ctx']['error']} at {place}")
    sent_as = request.headers.get("content-type", "none")
    if any(one["loc"] == ("body",) and one["input"] for one in found) and "json" not in sent_as:
        return problem(415, f"Content-Type is {sent_as}; send JSON as application/json")
    errors = [
        FieldError(_field(one["loc"]), one["msg"].removeprefix("Value error, ")) for one in found
    ]
    named = ", ".join(dict.fromkeys(error.field for error in errors[:5]))
    return problem(422, f"the request is not valid: {named}", errors)


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, UnicodeDecodeError):
        return problem(400, f"the body is not UTF-8: byte {error.__cause__.start} cannot be read")
    details = {
        404: f"no such address: {request.url.path}",
        405: f"{request.method} is not possible here",
    }
    detail = details.get(error.status_code, error.detail)
    return problem(error.status_code, detail, headers=dict(error.headers or {}))


async def _on_unexpected(_request: Request, error: Exception) -> JSONResponse:
    log.error("unexpected error", exc_info=error)
    return problem(500, "an internal error; the service's log says more")


def _field(location: Sequence[str | int]) -> str:
    """`edits.0.prompt` for `("body", "edits", 0, "prompt")`."""
    return ".".join(str(part) for part in location[1:]) or str(location[0])
