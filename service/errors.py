"""Everything the service raises on purpose.

ErrataError
├── InvalidInput        a user's mistake; names fields                  422
├── NotFound            no such edit, job, version, model              404
├── Conflict            the request contradicts the present state      409
├── Unavailable         cannot be served now; try again later          503
│   └── VersionUnavailable  this replica cannot hold the version now   503
├── ConfigurationError  the service cannot start as configured         500
│   └── NotYet              but may soon: what it needs is not there   500
└── VersionRejected     a version failed verification                  409

`service.api.problems` maps them to HTTP. All of them survive pickling.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class FieldError:
    """One bad field, as `edits.0.prompt`, and what is wrong with it."""

    field: str
    message: str


class ErrataError(Exception):
    """Base of the service's own errors; `detail` is fit for the user's eyes."""

    def __init__(self, detail: str, errors: tuple[FieldError, ...] = ()) -> None:
        super().__init__(detail, errors)
        self.detail = detail
        self.errors = errors

    def __str__(self) -> str:
        return self.detail


class InvalidInput(ErrataError): ...


class NotFound(ErrataError): ...


class Conflict(ErrataError): ...


class Unavailable(ErrataError): ...


class VersionUnavailable(Unavailable): ...


class ConfigurationError(ErrataError): ...


class NotYet(ConfigurationError): ...


class VersionRejected(ErrataError): ...
