"""What a version in the store holds, all of it at once."""

from torch import Tensor

from workers.artifact import Manifest, read_tensor


def read_tensors(store: str, manifest: Manifest) -> dict[str, Tensor]:
    """Every edited parameter by name, verified as it is read."""
    return {
        entry.name: read_tensor(store, manifest.version_id, entry) for entry in manifest.tensors
    }
