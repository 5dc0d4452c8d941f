"""A node's copy of versions from a remote store, shared by the replica processes of the node.

    <cache>/<digest of the store's URL>/versions/<id>/   as in the store; the manifest comes last
    <cache>/<digest of the store's URL>/locks/<id>       exclusive to write, shared to read

Each copy is a local version store itself. Locks are the kernel's and die with their process. Owns
place and exclusion; knows neither how a file comes here nor what is in it.
"""

import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
_AHEAD = ".manifest.json"
"""The manifest of a version whose shards are not all there."""


@dataclass(frozen=True)
class _Copy:
    folder: Path
    lock: Path
    bytes: int
    used_ns: int


class VersionCache:
    """Versions of one store. The bound holds for all stores that share the folder.

    What is in use is never removed, so the bound is exceeded when versions in use exceed it.
    """

    def __init__(self, cache: Path, store_url: str, capacity_bytes: int) -> None:
        self._cache = cache
        self._capacity_bytes = capacity_bytes
        self.store = cache / hashlib.sha256(store_url.encode()).hexdigest()[:16]
        (self.store / "versions").mkdir(parents=True, exist_ok=True)
        (self.store / "locks").mkdir(exist_ok=True)

    def manifest(self, version_id: str, fetch: Callable[[], bytes]) -> bytes:
        """The manifest file's content, from here or by `fetch`, by one process at a time."""
        with self._shared(version_id):
            if (content := self._manifest(version_id)) is not None:
                return content
        with self._exclusive(version_id):
            if (content := self._manifest(version_id)) is None:
                content = fetch()
                self._folder(version_id).mkdir(exist_ok=True)
                _put(self._folder(version_id) / _AHEAD, content)
            return content

    @contextmanager
    def reading(
        self, version_id: str, manifest: bytes, files: dict[str, int], fetch: Callable[[Path], None]
    ) -> Iterator[Path]:
        """The folder of a version, which stays as it is until the context ends.

        Of those that want the same version one fetches it into an empty folder, with room for its
        `files` (bytes by name), and the others wait. Raises as `fetch`, and is as before then.
        """
        folder = self._folder(version_id)
        while True:
            with self._shared(version_id):
                if (folder / MANIFEST).is_file():
                    _used_now(self._lock(version_id))
                    yield folder
                    return
            with self._exclusive(version_id):
                if not (folder / MANIFEST).is_file():
                    self._fetch(folder, manifest, files, fetch)

    def replace(self, version_id: str, file: str, fetch: Callable[[Path], None]) -> None:
        """Fetches a file again, in place of a damaged one; only while `reading` its version."""
        folder = self._folder(version_id)
        fetched = folder / f".{file}.{os.getpid()}-{threading.get_native_id()}"
        try:
            fetch(fetched)
            fetched.replace(folder / file)
        finally:
            fetched.unlink(missing_ok=True)

    def forget(self, version_id: str) -> None:
        """Removes what is here of a version, unless it is in use."""
        _remove(self._folder(version_id), self._lock(version_id))

    def _fetch(
        self, folder: Path, manifest: bytes, files: dict[str, int], fetch: Callable[[Path], None]
    ) -> None:
        try:
            with _locked(self._cache / "lock", fcntl.LOCK_EX):
                _clear(folder)
                self._make_room(sum(files.values()))
                # Room is taken by files of their full length, so that others see it taken.
                for file, size in files.items():
                    with (folder / file).open("wb") as reserved:
                        reserved.truncate(size)
            fetch(folder)
            _put(folder / MANIFEST, manifest)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _make_room(self, needed_bytes: int) -> None:
        copies = sorted(self._copies(), key=lambda copy: copy.used_ns)
        excess = sum(copy.bytes for copy in copies) + needed_bytes - self._capacity_bytes
        for copy in copies:
            if excess <= 0:
                return
            if _remove(copy.folder, copy.lock):
                excess -= copy.bytes

    def _copies(self) -> Iterator[_Copy]:
        for folder in self._cache.glob("*/versions/*"):
            lock = folder.parent.parent / "locks" / folder.name
            used_ns = lock.stat().st_mtime_ns if lock.exists() else 0
            yield _Copy(folder, lock, _bytes(folder), used_ns)

    def _manifest(self, version_id: str) -> bytes | None:
        for name in (MANIFEST, _AHEAD):
            path = self._folder(version_id) / name
            if path.is_file():
                return path.read_bytes()
        return None

    def _folder(self, version_id: str) -> Path:
        return self.store / "versions" / version_id

    def _lock(self, version_id: str) -> Path:
        return self.store / "locks" / version_id

    def _shared(self, version_id: str) -> AbstractContextManager[None]:
        return _locked(self._lock(version_id), fcntl.LOCK_SH)

    def _exclusive(self, version_id: str) -> AbstractContextManager[None]:
        return _locked(self._lock(version_id), fcntl.LOCK_EX)


@contextmanager
def _locked(path: Path, operation: int) -> Iterator[None]:
    """Holds the kernel's lock of a file, for this thread alone; waits for it, or raises
    `BlockingIOError` if `operation` says so."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)


def _used_now(lock: Path) -> None:
    # The kernel's own idea of now advances by milliseconds.
    now = time.time_ns()
    os.utime(lock, ns=(now, now))


def _remove(folder: Path, lock: Path) -> bool:
    """Whether it could be removed, as nobody was using it."""
    try:
        with _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if folder.exists():
                shutil.rmtree(folder)
            return True
    except BlockingIOError:
        return False


def _clear(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def _put(path: Path, content: bytes) -> None:
    """In place whole or not at all."""
    unfinished = path.with_name(f"{path.name}.partial")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _bytes(folder: Path) -> int:
    """0 if it is removed meanwhile."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return 0
