"""Stores that are not S3: a local folder, drivers without an event loop, URLs without a driver."""

import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from service.errors import ConfigurationError, Unavailable
from service.replica.fetching import Fetcher
from tests.tiny_model import TUNED, publish, tuned_tensor

FINGERPRINT = "f" * 64


def fetch(fetcher: Fetcher) -> bool:
    """Whether v1 came as it was published."""
    [(name, tensor)] = fetcher.tensors(fetcher.manifest("v1"))
    return name == TUNED and torch.equal(tensor, tuned_tensor(1))


def test_a_driver_that_blocks_is_left_after_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, going_on = "memory://test_a_driver_that_blocks", threading.Event()
    read = MemoryFileSystem.cat_file

    def wait_and_read(*args: Any, **options: Any) -> bytes:
        going_on.wait()
        content: bytes = read(*args, **options)
        return content

    publish(store, "v1", FINGERPRINT)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", wait_and_read)
    fetcher = Fetcher(store, FINGERPRINT, tmp_path, cache_bytes=1 << 30, timeout_s=0.2, attempts=2)
    with pytest.raises(Unavailable, match="asked for 2 times"):
        fetcher.manifest("v1")
    going_on.set()
    assert fetch(fetcher)
    fsspec.filesystem("memory").rm("/test_a_driver_that_blocks", recursive=True)


def test_a_local_folder_is_read_where_it_is(tmp_path: Path) -> None:
    store = tmp_path / "store"
    publish(str(store), "v1", FINGERPRINT)
    fetcher = Fetcher(
        str(store), FINGERPRINT, tmp_path / "cache", cache_bytes=1, timeout_s=1.0, attempts=1
    )
    manifest = fetcher.manifest("v1")
    assert fetch(fetcher)
    assert not (tmp_path / "cache").exists()
    store.rename(tmp_path / "elsewhere")
    with pytest.raises(Unavailable, match="is not there now"):
        list(fetcher.tensors(manifest))


@pytest.mark.parametrize(
    ("url", "remedy"), [("gs://bucket", "gcsfs"), ("nowhere://store", "nowhere")]
)
def test_a_store_without_a_driver_says_what_to_do(tmp_path: Path, url: str, remedy: str) -> None:
    with pytest.raises(ConfigurationError, match=f"version_store is {url}.*{remedy}"):
        Fetcher(url, FINGERPRINT, tmp_path, cache_bytes=1, timeout_s=1.0, attempts=1)
