"""Which build of Errata this is: a digest of its own sources.

Processes of one service must be of one build: what they send each other is its business alone.
"""

import hashlib
from functools import cache
from pathlib import Path

from service.errors import ConfigurationError

ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("service/**/*.py", "workers/**/*.py", "workers/hparams/*.yaml")


@cache
def source_digest() -> str:
    """sha256 over the names and contents of the sources that this process runs."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in _SOURCES for file in ROOT.glob(pattern)):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(ROOT)} {content}\n".encode())
    return digest.hexdigest()


def require_build(expected: str, node: str) -> None:
    """Raises `ConfigurationError`, naming `node`, unless this process is of that build."""
    if (found := source_digest()) != expected:
        raise ConfigurationError(
            f"image: node {node} runs another build of errata ({found[:12]}) than the one that was "
            f"deployed ({expected[:12]}); give every node, head and workers, the same image"
        )
