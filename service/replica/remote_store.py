"""Reading files of a store that is not a local folder: bounded in time, tried again, verified.

Owns how a file comes over; knows neither what a version is nor where a file is kept.
"""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import sync

from service.errors import ConfigurationError
from service.replica.attempts import Attempts
from workers.errors import DigestMismatch

_PIECE_BYTES = 32 << 20


class RemoteStore:
    """The files under an fsspec URL. Used by many threads, and in a fork of its process."""

    def __init__(self, url: str, attempts: Attempts) -> None:
        self._url = url.rstrip("/")
        self._attempts = attempts

    def read(self, file: str) -> bytes:
        """A small file. Raises `FileNotFoundError`, or `Unavailable` after the last attempt."""
        content: bytes = self._ask("cat_file", file)
        return content

    def download(self, file: str, target: Path, sha256: str) -> None:
        """A file to a local path, verified as it is written.

        One with another digest is asked for once more, as it may have been damaged on its way.
        Raises `DigestMismatch`, `FileNotFoundError`, or `Unavailable` after the last attempt.
        """
        found = ""
        for _ in range(2):
            found = self._copy(file, target)
            if found == sha256:
                return
        raise DigestMismatch(self.url_of(file), sha256, found)

    def _copy(self, file: str, target: Path) -> str:
        """The digest of what was written to `target`, in pieces, each asked for by itself."""
        size = self._ask("info", file)["size"]
        digest = hashlib.sha256()
        # Room taken by a file of this name is not given back meanwhile.
        with target.open("r+b" if target.exists() else "wb") as written:
            for start in range(0, size, _PIECE_BYTES):
                piece = self._ask(
                    "cat_file", file, start=start, end=min(start + _PIECE_BYTES, size)
                )
                digest.update(piece)
                written.write(piece)
            written.truncate()
        return digest.hexdigest()

    def _ask(self, method: str, file: str, **options: Any) -> Any:
        def ask() -> Any:
            fs, root = url_to_fs(self._url)
            return _bounded(fs, method, f"{root}/{file}", self._attempts.timeout_s, **options)

        return self._attempts(self.url_of(file), ask)

    def url_of(self, file: str) -> str:
        return f"{self._url}/{file}"


def url_to_fs(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it; made again in a fork, where it is another.

    Raises `ConfigurationError` if the URL cannot be understood, or its driver is not installed.
    """
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        remedy = "pip install errata[s3]" if url.startswith("s3") else str(error)
        raise ConfigurationError(
            f"version_store is {url}, whose driver is not installed: {remedy}"
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"version_store is {url}, not a URL to read: {error}") from error
    return fs, root.rstrip("/")


def _bounded(fs: Any, method: str, path: str, timeout_s: float, **options: Any) -> Any:
    """Calls a file system's method. Raises `TimeoutError` at the timeout, whatever it does."""
    if fs.async_impl:
        return sync(fs.loop, getattr(fs, f"_{method}"), path, timeout=timeout_s, **options)
    return _on_a_thread(lambda: getattr(fs, method)(path, **options), timeout_s)


def _on_a_thread(call: Callable[[], Any], timeout_s: float) -> Any:
    """A blocking call cannot be ended from outside; at its timeout it is left to itself."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="read-store", daemon=True).start()
    return result.result(timeout_s)
