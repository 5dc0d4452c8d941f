"""Everything the offline side raises on purpose.

WorkersError
├── UnsupportedModel     the base model is not there, or not one that can be edited
├── UnknownParameter     a name to tune that the model does not have
├── BadHparams           hyperparameters that do not hold
├── BadLine              a line of a file that is not a JSON object
├── TrainingFailed       the run failed: a bad example, a loss that is not a number, a lost worker
├── StoreUnavailable     the version store does not answer; try again later
└── ArtifactError        a version in the store cannot be written or trusted
    ├── ManifestMissing  no manifest, so no version
    ├── ShardMissing     the manifest names a file that is not there
    ├── DigestMismatch   a file or tensor is not what the manifest says
    └── BaseMismatch     the version was made from another base model

All of them survive pickling; `detail` is fit for the user's eyes.
"""


class WorkersError(Exception):
    """Base of the offline side's own errors."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class UnsupportedModel(WorkersError): ...


class IncompleteModel(UnsupportedModel):
    """Some of its files are not there; they may be on their way."""


class UnknownParameter(WorkersError): ...


class BadHparams(WorkersError): ...


class BadLine(WorkersError): ...


class TrainingFailed(WorkersError): ...


class StoreUnavailable(WorkersError): ...


class ArtifactError(WorkersError): ...


class ManifestMissing(ArtifactError): ...


class ShardMissing(ArtifactError): ...


class BaseMismatch(ArtifactError): ...


class DigestMismatch(ArtifactError):
    """`name` is a file or a tensor; the digests are hexadecimal sha256."""

    def __init__(self, name: str, expected: str, found: str) -> None:
        super().__init__(
            f"{name}: expected sha256 {expected}, found {found}; its version is unusable"
        )
        self.args = (name, expected, found)
        self.name = name
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        return self.detail
