"""Versions from the version store, verified, for the version bank.

A store that is a local folder is read where it is; any other is read through the node's cache,
into which each file is downloaded once. Owns which of both, and what a failure means for the
version; knows neither the engine nor what the versions are for.
"""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import NotFound, Unavailable, VersionRejected
from service.replica.attempts import Attempts
from service.replica.remote_store import RemoteStore, url_to_fs
from service.replica.version_cache import MANIFEST, VersionCache
from workers.errors import ArtifactError, DigestMismatch, ManifestMissing, ShardMissing

if TYPE_CHECKING:
    # They bring torch, which those who only import the deployment do not need.
    from torch import Tensor

    from workers.artifact import Manifest, TensorEntry
    from workers.slices import Shard

    Tensors = Generator[tuple[str, Tensor], None, None]

_STREAMS = 4
"""Files of a version that are downloaded at the same time."""


class Fetcher:
    """Versions from the store, verified; a node downloads each file once for all its replicas.

    Both methods block and may be called by several threads. They raise `NotFound` if the version
    was never published, `VersionRejected` if it fails verification or is of another base model,
    `Unavailable` if the store cannot be read now. Building it raises `ConfigurationError` if the
    store's URL cannot be understood.
    """

    def __init__(
        self,
        store_url: str,
        base_fingerprint: str,
        cache_dir: Path,
        *,
        cache_bytes: int,
        timeout_s: float,
        attempts: int,
    ) -> None:
        self._base_fingerprint = base_fingerprint
        tries = Attempts(attempts, timeout_s)
        self._source: _LocalStore | _NodeCopies
        fs, root = url_to_fs(store_url)
        if "file" in fs.protocol:
            self._source = _LocalStore(root, tries)
        else:
            cache = VersionCache(cache_dir, store_url, cache_bytes)
            self._source = _NodeCopies(RemoteStore(store_url, tries), cache)

    def manifest(self, version_id: str) -> "Manifest":
        """A version's manifest, which is of this base model."""
        with _told(version_id):
            return self._source.manifest(version_id, self._base_fingerprint)

    def tensors(self, manifest: "Manifest") -> "Tensors":
        """Every edited parameter, whole, on the CPU; each is verified before it is given out."""
        with _told(manifest.version_id):
            yield from self._source.tensors(manifest)


class _LocalStore:
    """A folder: read where it is."""

    def __init__(self, root: str, attempts: Attempts) -> None:
        self._root = root
        self._attempts = attempts

    def manifest(self, version_id: str, base_fingerprint: str) -> "Manifest":
        from workers import artifact

        with self._there():
            return self._attempts(
                f"{self._root}/versions/{version_id}/{MANIFEST}",
                lambda: artifact.read_manifest(self._root, version_id, base_fingerprint),
            )

    def tensors(self, manifest: "Manifest") -> "Tensors":
        from workers import artifact

        def read(entry: "TensorEntry") -> "Tensor":
            return artifact.read_tensor(self._root, manifest.version_id, entry)

        for entry in manifest.tensors:
            url = f"{self._root}/versions/{manifest.version_id}: {entry.name}"
            with self._there():
                tensor = self._attempts(url, partial(read, entry))
            yield entry.name, tensor

    @contextmanager
    def _there(self) -> Iterator[None]:
        """A file that is missing says nothing of its version when its store is not there."""
        try:
            yield
        except (ManifestMissing, ShardMissing) as error:
            if not Path(self._root).is_dir():
                raise Unavailable(f"The version store {self._root} is not there now") from error
            raise


class _NodeCopies:
    """A remote store, by way of the node's cache; in doubt the store's copy decides."""

    def __init__(self, remote: RemoteStore, cache: VersionCache) -> None:
        self._remote = remote
        self._cache = cache

    def manifest(self, version_id: str, base_fingerprint: str) -> "Manifest":
        from workers import artifact, folders

        folders.check_plain(version_id)
        file = f"versions/{version_id}/{MANIFEST}"

        path = self._remote.url_of(file)

        def fetch() -> bytes:
            try:
                return self._remote.read(file)
            except FileNotFoundError as error:
                raise ManifestMissing(f"no {path}: {error}") from error

        def read() -> "Manifest":
            content = self._cache.manifest(version_id, fetch)
            return artifact.parse_manifest(content, path, version_id, base_fingerprint)

        try:
            return read()
        except ManifestMissing:
            raise
        except ArtifactError:
            self._cache.forget(version_id)
            return read()

    def tensors(self, manifest: "Manifest") -> "Tensors":
        version_id = manifest.version_id
        content = manifest.model_dump_json(indent=2).encode()
        files = {shard.file: shard.bytes for e in manifest.tensors for shard in e.shards}
        try:
            with self._cache.reading(version_id, content, files, partial(self._download, manifest)):
                for entry in manifest.tensors:
                    yield entry.name, self._read(version_id, entry)
        except ArtifactError:
            self._cache.forget(version_id)
            raise

    def _download(self, manifest: "Manifest", folder: Path) -> None:
        shards = [shard for entry in manifest.tensors for shard in entry.shards]
        with ThreadPoolExecutor(_STREAMS, "download-shard") as streams:
            downloads = [
                streams.submit(
                    self._download_shard, manifest.version_id, shard, folder / shard.file
                )
                for shard in shards
            ]
            try:
                for download in downloads:
                    download.result()
            except Exception:
                streams.shutdown(wait=False, cancel_futures=True)
                raise

    def _download_shard(self, version_id: str, shard: "Shard", target: Path) -> None:
        file = f"versions/{version_id}/{shard.file}"
        try:
            self._remote.download(file, target, shard.sha256)
        except FileNotFoundError as error:
            self._check_published(version_id)
            path = self._remote.url_of(file)
            raise ShardMissing(f"{path} is named by the manifest and not there") from error

    def _check_published(self, version_id: str) -> None:
        """A file that is missing says nothing of its version when the manifest has gone too."""
        manifest = f"versions/{version_id}/{MANIFEST}"
        try:
            self._remote.read(manifest)
        except FileNotFoundError as error:
            url = self._remote.url_of(manifest)
            raise Unavailable(f"Its store, or all of it, has gone: no {url}") from error

    def _read(self, version_id: str, entry: "TensorEntry") -> "Tensor":
        from workers import artifact

        store = str(self._cache.store)
        try:
            return artifact.read_tensor(store, version_id, entry)
        except (DigestMismatch, ShardMissing):
            self._replace_damaged(version_id, entry)
            return artifact.read_tensor(store, version_id, entry)

    def _replace_damaged(self, version_id: str, entry: "TensorEntry") -> None:
        from workers.folders import Folder
        from workers.slices import read_shard

        folder = Folder(str(self._cache.store), "versions", version_id)
        for shard in entry.shards:
            try:
                read_shard(folder, entry.name, shard)
            except (DigestMismatch, ShardMissing):
                fetch = partial(self._download_shard, version_id, shard)
                self._cache.replace(version_id, shard.file, fetch)


@contextmanager
def _told(version_id: str) -> Iterator[None]:
    """What goes wrong with a version, in the service's errors."""
    try:
        yield
    except ManifestMissing as error:
        raise NotFound(f"Version {version_id} was never published: {error}") from error
    except ArtifactError as error:
        raise VersionRejected(f"Version {version_id} failed verification: {error}") from error
    except Unavailable as error:
        raise Unavailable(f"Version {version_id} cannot be had now. {error}") from error
    except OSError as error:
        raise Unavailable(f"Version {version_id} cannot be read now: {error}") from error
