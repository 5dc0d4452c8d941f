"""Folders of an fsspec store. Torch-free; knows nothing of what is in their files."""

import io
import os
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from uuid import uuid4

import fsspec

from workers.errors import ArtifactError, StoreUnavailable

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_CERTAIN = (FileNotFoundError, FileExistsError, PermissionError, StoreUnavailable)
"""What a store says, as opposed to that it says nothing; and what is told of already."""

P = ParamSpec("P")
R = TypeVar("R")


def _asks(
    method: "Callable[Concatenate[Folder, P], R]",
) -> "Callable[Concatenate[Folder, P], R]":
    """`StoreUnavailable` for whatever the driver of a remote store raises: each has its own."""

    @wraps(method)
    def asking(folder: "Folder", /, *args: P.args, **options: P.kwargs) -> R:
        try:
            return method(folder, *args, **options)
        except _CERTAIN:
            raise
        except Exception as error:
            if folder.local:
                raise
            raise StoreUnavailable(
                f"the version store does not answer: {folder}: {type(error).__name__}: {error}"
            ) from error

    return asking


class Folder:
    """A folder of a store: an fsspec URL and path components, each a plain name.

    A remote store that is away is a `StoreUnavailable`, from every method that asks it.
    """

    def __init__(self, store: str, *parts: str) -> None:
        for part in parts:
            check_plain(part)
        self.fs, root = fsspec.core.url_to_fs(store)
        self.path = "/".join([root.rstrip("/"), *parts])
        self.local = "file" in self.fs.protocol

    def __str__(self) -> str:
        return self.path

    @_asks
    def has(self, file: str) -> bool:
        return self._exists(f"{self.path}/{file}")

    @_asks
    def make(self) -> None:
        self.fs.makedirs(self.path, exist_ok=True)

    @_asks
    def remove(self) -> None:
        if self._exists(self.path):
            self.fs.rm(self.path, recursive=True)

    @_asks
    def files(self) -> list[str]:
        """Names of the files in it."""
        return [e["name"].rsplit("/", 1)[1] for e in self._entries() if e["type"] == "file"]

    @_asks
    def remove_file(self, name: str) -> None:
        self.fs.rm_file(f"{self.path}/{name}")

    @_asks
    def remove_folder(self, name: str) -> None:
        self.fs.rm(f"{self.path}/{name}", recursive=True)

    @_asks
    def folders(self) -> list[str]:
        """Names of the folders in it, in order."""
        found = self._entries()
        return sorted(e["name"].rsplit("/", 1)[1] for e in found if e["type"] == "directory")

    @_asks
    def read(self, file: str) -> bytes:
        payload: bytes = self.fs.cat_file(f"{self.path}/{file}")
        return payload

    @_asks
    def open(self, file: str) -> io.FileIO | io.BytesIO:
        """For reading from its beginning; what is not a local file is in memory then."""
        if self.local:
            return open(f"{self.path}/{file}", "rb", buffering=0)
        return io.BytesIO(self.read(file))

    @_asks
    def write(self, file: str, payload: bytes) -> None:
        """Durably, where the file system can."""
        with self.fs.open(f"{self.path}/{file}", "wb") as stream:
            stream.write(payload)
            if self.local:
                stream.flush()
                os.fsync(stream.fileno())

    @_asks
    def write_last(self, file: str, payload: bytes) -> None:
        """Whole or not at all, and once: `FileExistsError` if it is there, whoever wrote it.

        A local file is linked into place; of other stores, those that can refuse to replace one.
        """
        if not self.local:
            self.fs.pipe_file(f"{self.path}/{file}", payload, mode="create")
            return
        unfinished = f"{self.path}/.{file}.{uuid4().hex}.partial"
        self.write(unfinished.rpartition("/")[2], payload)
        try:
            os.link(unfinished, f"{self.path}/{file}")
        finally:
            os.unlink(unfinished)
        self._sync()

    def _entries(self) -> list[dict[str, Any]]:
        if not self._exists(self.path):
            return []
        found: list[dict[str, Any]] = self.fs.ls(self.path, detail=True, refresh=True)
        return found

    def _exists(self, path: str) -> bool:
        # Other processes may have written or removed it since this one last listed its folder.
        self.fs.invalidate_cache(path)
        return bool(self.fs.exists(path))

    def _sync(self) -> None:
        """A rename is durable only once its folder is."""
        if not self.local:
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_plain(name: str) -> None:
    """Raises `ArtifactError` unless it names a file or folder, and no way to another."""
    if not _PLAIN_NAME.fullmatch(name):
        raise ArtifactError(f"{name!r} is not a plain name")
