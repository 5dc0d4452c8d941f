"""`python -m deploy.host_cache`: copies a base model from a volume to a disk of the node, once.

Run by an init container. Several may run on one node: the first one copies. Knows files only.
"""

import argparse
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path


class CacheError(Exception):
    """The model cannot be copied; the message says why, and what to do."""


def fill(source: Path, cache: Path) -> int:
    """Copies the files of the folder `source` that are not in `cache`; returns their bytes.

    A file is there under its name only when it is whole. Raises `CacheError`.
    """
    files = [f for f in sorted(source.glob("*")) if f.is_file() and not f.name.startswith(".")]
    if not (source / "config.json").is_file():
        raise CacheError(
            f"{source} holds no model (config.json is not there); fill the volume first: "
            "kubectl create job --from=cronjob/errata-models NAME"
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return sum(copy(file, cache / file.name) for file in files)
    except OSError as error:
        raise CacheError(
            f"{cache} cannot be filled ({error.strerror}: {error.filename}); it must be user "
            f"{os.getuid()}'s and have room for {sum(f.stat().st_size for f in files)} bytes"
        ) from error


def copy(file: Path, to: Path) -> int:
    """Copies a file unless one of the same size and time is there; returns the bytes copied."""
    wanted = file.stat()
    if to.is_file():
        there = to.stat()
        if (there.st_size, int(there.st_mtime)) == (wanted.st_size, int(wanted.st_mtime)):
            return 0
    partial = to.with_name(f".{to.name}.partial")
    shutil.copy2(file, partial)
    partial.replace(to)
    return wanted.st_size


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.host_cache", description=__doc__)
    parser.add_argument("source", type=Path, help="where the volume is mounted")
    parser.add_argument("cache", type=Path, help="where the node's disk is mounted")
    parser.add_argument("model", type=Path, help="the model's folder, by its name in the cache")
    given = parser.parse_args(arguments)
    if not given.model.is_relative_to(given.cache):
        parser.error(f"ERRATA_MODEL is {given.model}, which is not a folder below {given.cache}")
    began = time.monotonic()
    try:
        copied = fill(given.source / given.model.relative_to(given.cache), given.model)
    except CacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"copied {copied / 1e9:.1f} GB in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
