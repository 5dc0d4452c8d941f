"""A remote store that does not answer is told from what one says; a local one tells itself."""

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from workers.errors import StoreUnavailable
from workers.folders import Folder


class DriversOwn(Exception):
    """As botocore's: no OSError."""


def away(*_: object, **__: object) -> None:
    raise DriversOwn("connect timeout")


@pytest.fixture
def folder() -> Iterator[Folder]:
    root = f"test-{uuid4().hex}"
    made = Folder(f"memory://{root}", "runs", "job_1")
    made.make()
    made.write("file", b"content")
    yield made
    fsspec.filesystem("memory").rm(f"/{root}", recursive=True)


@pytest.mark.parametrize(
    ("driver", "ask"),
    [
        ("exists", lambda folder: folder.has("file")),
        ("makedirs", Folder.make),
        ("rm", Folder.remove),
        ("rm_file", lambda folder: folder.remove_file("file")),
        ("rm", lambda folder: folder.remove_folder("attempt")),
        ("ls", Folder.files),
        ("ls", Folder.folders),
        ("cat_file", lambda folder: folder.read("file")),
        ("cat_file", lambda folder: folder.open("file")),
        ("open", lambda folder: folder.write("file", b"")),
        ("pipe_file", lambda folder: folder.write_last("last", b"")),
    ],
)
def test_whatever_the_driver_raises_the_store_is_away(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, driver: str, ask: Callable[[Folder], object]
) -> None:
    monkeypatch.setattr(MemoryFileSystem, driver, away)
    with pytest.raises(StoreUnavailable, match=f"{folder}: DriversOwn: connect timeout"):
        ask(folder)


def test_what_a_store_says_stays_as_it_is(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError):
        folder.read("other")
    folder.write_last("last", b"")
    with pytest.raises(FileExistsError):
        folder.write_last("last", b"")


def test_a_local_folder_is_never_away(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path), "runs")
    folder.make()
    (tmp_path / "runs" / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        folder.read("file")
