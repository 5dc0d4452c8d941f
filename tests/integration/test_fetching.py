"""Versions from a real S3 server, over a network that fails, by several processes at once."""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from service.errors import NotFound, Unavailable, VersionRejected
from service.replica.fetching import Fetcher
from tests.proxy import TcpProxy
from tests.stored_tensors import read_tensors
from tests.tiny_model import TUNED, publish, tuned_tensor
from workers import artifact, checkpoint
from workers.artifact import Manifest
from workers.locft import State
from workers.slices import Writer

FINGERPRINT = "f" * 64
_numbers = count(1)

MakeFetcher = Callable[..., Fetcher]


@pytest.fixture(scope="module")
def server() -> Iterator[TcpProxy]:
    """An S3 server behind a proxy. One for all tests: a client takes half a second to be built."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    started = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    started.start()
    with TcpProxy(started.get_host_and_port()) as proxy, pytest.MonkeyPatch.context() as patched:
        host, port = proxy.address
        patched.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patched.setenv("AWS_ACCESS_KEY_ID", "test")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "test")
        S3FileSystem.clear_instance_cache()
        yield proxy
    S3FileSystem.clear_instance_cache()
    started.stop()


@pytest.fixture
def proxy(server: TcpProxy) -> Iterator[TcpProxy]:
    """Between every client and the server."""
    yield server
    server.answer = bytes
    server.release()


@pytest.fixture
def empty_store(proxy: TcpProxy) -> str:
    bucket = f"bucket-{next(_numbers)}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}/errata"


@pytest.fixture
def version(empty_store: str, proxy: TcpProxy) -> Manifest:
    manifest = publish(empty_store, "v1", FINGERPRINT)
    proxy.sent.clear()
    return manifest


@pytest.fixture
def fetcher(empty_store: str, tmp_path: Path) -> MakeFetcher:
    """A fetcher of the store's versions, each call another one, all on one node."""

    def make(timeout_s: float = 5.0, attempts: int = 2, cache_bytes: int = 1 << 30) -> Fetcher:
        return Fetcher(
            empty_store,
            FINGERPRINT,
            tmp_path / "cache",
            cache_bytes=cache_bytes,
            timeout_s=timeout_s,
            attempts=attempts,
        )

    return make


def fetch(fetcher: Fetcher, version_id: str = "v1") -> bool:
    """Whether a version came as it was published."""
    [(name, tensor)] = fetcher.tensors(fetcher.manifest(version_id))
    return name == TUNED and torch.equal(tensor, tuned_tensor(int(version_id[1:])))


def asked(proxy: TcpProxy, file: str) -> int:
    """How often a file's content was asked for."""
    lines = bytes(proxy.sent).split(b"\r\n")
    return sum(line.startswith(b"GET ") and f"/{file} ".encode() in line for line in lines)


def files(manifest: Manifest) -> list[str]:
    return [shard.file for entry in manifest.tensors for shard in entry.shards]


def in_store(store: str, manifest: Manifest, number: int) -> str:
    return f"{store}/versions/{manifest.version_id}/{files(manifest)[number]}"


def in_cache(tmp_path: Path, manifest: Manifest, number: int) -> Path:
    [found] = (tmp_path / "cache").glob(f"*/versions/*/{files(manifest)[number]}")
    return found


def rewrite(url: str, change: Callable[[bytes], bytes]) -> None:
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(path, change(fs.cat_file(path)))


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


# One node, many replicas


def test_replicas_of_a_node_download_each_file_once(
    version: Manifest, proxy: TcpProxy, fetcher: MakeFetcher
) -> None:
    with ThreadPoolExecutor(4) as replicas:
        assert all(replicas.map(fetch, [fetcher() for _ in range(8)]))
    assert [asked(proxy, file) for file in ("manifest.json", *files(version))] == [1, 1, 1]


REPLICA = """
import sys
from pathlib import Path
from service.replica.fetching import Fetcher
import workers.artifact
store, fingerprint, cache = sys.argv[1:]
fetcher = Fetcher(
    store, fingerprint, Path(cache), cache_bytes=1 << 30, timeout_s=30.0, attempts=1
)
print("ready", flush=True)
sys.stdin.readline()
manifest = fetcher.manifest("v1")
print([name for name, _ in fetcher.tensors(manifest)], flush=True)
"""


@pytest.fixture
def replica(empty_store: str, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process of the node, which fetches v1 once it reads a line."""
    arguments = (empty_store, FINGERPRINT, str(tmp_path / "cache"))
    process = subprocess.Popen(
        [sys.executable, "-c", REPLICA, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_share_and_one_that_is_killed_lets_another_go_on(
    version: Manifest,
    proxy: TcpProxy,
    fetcher: MakeFetcher,
    tmp_path: Path,
    replica: "subprocess.Popen[str]",
) -> None:
    downloading, killed = threading.Event(), threading.Event()

    def stop_at_the_shards(data: bytes) -> bytes | None:
        if asked(proxy, files(version)[0]) == 0:
            return data
        downloading.set()
        killed.wait()
        return None

    proxy.answer = stop_at_the_shards
    go(replica)
    assert downloading.wait(20)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fetch, fetcher())
        folder = in_cache(tmp_path, version, 0).parent
        assert not (folder / artifact.MANIFEST).exists()
        (folder / "left-over").write_text("of the one that is killed")
        replica.kill()
        proxy.answer = bytes
        killed.set()
        assert waiting.result(20)
    assert {path.name for path in folder.iterdir()} == {artifact.MANIFEST, *files(version)}
    # The one that was killed had asked for the first, and perhaps for the second.
    first, second = (asked(proxy, file) for file in files(version))
    assert first == 2
    assert second in {1, 2}


# A network that fails


def test_a_server_that_hangs_is_given_up_and_asked_again_later(
    version: Manifest, proxy: TcpProxy, fetcher: MakeFetcher, empty_store: str
) -> None:
    manifest = fetcher().manifest("v1")
    proxy.hold()
    with pytest.raises(Unavailable, match=r"2 times, for at most 0\.3 s.*did not end") as caught:
        list(fetcher(timeout_s=0.3).tensors(manifest))
    assert in_store(empty_store, version, 0) in str(caught.value)
    proxy.release()
    assert fetch(fetcher())


def test_a_server_that_refuses_is_given_up(
    version: Manifest, proxy: TcpProxy, fetcher: MakeFetcher
) -> None:
    assert fetch(fetcher())
    proxy.refuse()
    with pytest.raises(Unavailable, match=r"v2/manifest.json was asked for 1 times"):
        fetcher(timeout_s=0.5, attempts=1).manifest("v2")
    assert fetch(fetcher()), "what the node has needs no store"


@pytest.mark.parametrize("damage", [lambda data: None, flip], ids=["cut", "flipped"])
def test_damage_on_the_way_is_mended_by_asking_again(
    version: Manifest,
    proxy: TcpProxy,
    fetcher: MakeFetcher,
    damage: Callable[[bytes], bytes | None],
) -> None:
    damaged = threading.Event()

    def once(data: bytes) -> bytes | None:
        content = len(data) > 4096 and asked(proxy, files(version)[1]) > 0
        if not content or damaged.is_set():
            return data
        damaged.set()
        return damage(data)

    proxy.answer = once
    assert fetch(fetcher())
    assert damaged.is_set()


# A store that is wrong


@pytest.mark.parametrize(
    "damage",
    [flip, lambda content: content[:-4], lambda content: b"", lambda content: content + b"more"],
    ids=["flipped", "truncated", "empty", "longer"],
)
def test_a_wrong_file_is_rejected_until_the_store_is_mended(
    version: Manifest,
    proxy: TcpProxy,
    fetcher: MakeFetcher,
    empty_store: str,
    damage: Callable[[bytes], bytes],
) -> None:
    url = in_store(empty_store, version, 1)
    fs, path = fsspec.core.url_to_fs(url)
    good = fs.cat_file(path)
    fs.pipe_file(path, damage(good))
    proxy.sent.clear()
    with pytest.raises(VersionRejected) as caught:
        fetch(fetcher(attempts=4))
    [entry] = version.tensors
    for part in (url, entry.shards[1].sha256, "found "):
        assert part in str(caught.value)
    assert asked(proxy, files(version)[1]) <= 2
    fs.pipe_file(path, good)
    assert fetch(fetcher())


def test_a_missing_file_is_rejected_and_a_missing_store_is_not(
    version: Manifest, fetcher: MakeFetcher, empty_store: str
) -> None:
    manifest = fetcher().manifest("v1")
    fs, path = fsspec.core.url_to_fs(in_store(empty_store, version, 1))
    fs.rm(path)
    with pytest.raises(VersionRejected, match=rf"{files(version)[1]} is named by the manifest"):
        list(fetcher().tensors(manifest))
    fs.rm(empty_store.removeprefix("s3://"), recursive=True)
    with pytest.raises(Unavailable, match="has gone"):
        list(fetcher().tensors(manifest))


def test_what_was_never_published_is_not_found(version: Manifest, fetcher: MakeFetcher) -> None:
    with pytest.raises(NotFound, match=r"v2 was never published.*v2/manifest\.json"):
        fetcher().manifest("v2")


def test_a_manifest_of_another_base_or_none_at_all_is_rejected_until_mended(
    fetcher: MakeFetcher, empty_store: str, version: Manifest
) -> None:
    publish(empty_store, "v2", "0" * 64)
    with pytest.raises(VersionRejected, match="base model 0000"):
        fetcher().manifest("v2")
    manifest = f"{empty_store}/versions/v1/manifest.json"
    rewrite(manifest, lambda content: content[:-20])
    with pytest.raises(VersionRejected, match=f"{manifest} is not a manifest"):
        fetcher().manifest("v1")
    rewrite(manifest, lambda _: version.model_dump_json().encode())
    assert fetch(fetcher())


# The node's cache


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(flip(path.read_bytes())),
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: path.unlink(),
    ],
    ids=["flipped", "truncated", "missing"],
)
def test_a_damaged_copy_is_downloaded_again(
    version: Manifest,
    proxy: TcpProxy,
    fetcher: MakeFetcher,
    tmp_path: Path,
    damage: Callable[[Path], Any],
) -> None:
    assert fetch(fetcher())
    damage(in_cache(tmp_path, version, 1))
    proxy.sent.clear()
    assert fetch(fetcher())
    assert [asked(proxy, file) for file in files(version)] == [0, 1]
    assert fetch(fetcher())
    assert [asked(proxy, file) for file in files(version)] == [0, 1]


def test_the_least_recently_used_versions_make_room(
    version: Manifest, proxy: TcpProxy, fetcher: MakeFetcher, empty_store: str, tmp_path: Path
) -> None:
    for number in range(2, 5):
        publish(empty_store, f"v{number}", FINGERPRINT)
    room = 5 * version.bytes // 2
    for version_id in ("v1", "v2", "v1", "v3"):
        assert fetch(fetcher(cache_bytes=room), version_id)
    assert cached(tmp_path) == {"v1", "v3"}
    with closing(fetcher().tensors(version)) as reading:
        next(reading)
        assert fetch(fetcher(cache_bytes=version.bytes), "v4")
        assert cached(tmp_path) == {"v1", "v4"}, "v1 is being read"
    assert fetch(fetcher(cache_bytes=room), "v2")
    assert cached(tmp_path) == {"v2", "v4"}


def cached(tmp_path: Path) -> set[str]:
    return {path.parent.name for path in (tmp_path / "cache").glob("*/versions/*/manifest.json")}


# Writing


def test_a_version_and_a_checkpoint_are_written_to_s3(empty_store: str) -> None:
    publish(empty_store, "v1", FINGERPRINT)
    manifest = artifact.read_manifest(empty_store, "v1", FINGERPRINT)
    assert torch.equal(read_tensors(empty_store, manifest)[TUNED], tuned_tensor(1))
    state = State(epoch=1, batches=2)
    piece = checkpoint.Piece(TUNED, (6,), 0, torch.arange(6.0))
    kept = checkpoint.Checkpoints(empty_store, "job_1", Writer(0, 1, "test"))
    for batches in (2, 3):
        state = state.model_copy(update={"batches": batches})
        kept.save(state, [piece], lambda written: written)
    found = checkpoint.newest(empty_store, "job_1")
    assert found
    assert found.state.batches == 3
    assert torch.equal(found.read(TUNED, 2, 5), torch.arange(2.0, 5.0))
    checkpoint.discard(empty_store, "job_1")
    assert checkpoint.newest(empty_store, "job_1") is None
