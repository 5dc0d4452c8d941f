"""A node's disk gets a model once, whole, and from whoever is first."""

import threading
from pathlib import Path

import pytest

from deploy import host_cache


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A volume with the model org/model."""
    model = tmp_path / "source/org/model"
    (model / ".cache").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model-1.safetensors").write_bytes(b"1" * 1000)
    (model / "model-2.safetensors").write_bytes(b"2" * 500)
    return tmp_path / "source"


def arguments(volume: Path) -> list[str]:
    cache = volume.parent / "cache"
    return [str(volume), str(cache), str(cache / "org/model")]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))


def test_the_model_is_copied_once(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = volume / "org/model"
    cache = volume.parent / "cache/org/model"
    assert host_cache.fill(model, cache) == 1502
    assert names(cache) == names(model)
    assert (cache / "model-1.safetensors").read_bytes() == b"1" * 1000
    assert host_cache.fill(model, cache) == 0
    assert host_cache.main(arguments(volume)) == 0
    assert "copied 0.0 GB" in capsys.readouterr().out


def test_what_is_half_there_or_has_changed_is_copied_again(volume: Path) -> None:
    model, cache = volume / "org/model", volume.parent / "cache"
    host_cache.fill(model, cache)
    (cache / "model-1.safetensors").write_bytes(b"1" * 10)
    (model / "model-2.safetensors").write_bytes(b"3" * 600)
    (cache / ".config.json.partial").write_text("{")
    (cache / "config.json").unlink()
    assert host_cache.fill(model, cache) == 1602
    assert (cache / "model-2.safetensors").read_bytes() == b"3" * 600
    assert (cache / "config.json").read_text() == "{}"


def test_of_several_pods_one_copies(volume: Path) -> None:
    copied: list[int] = []
    model, cache = volume / "org/model", volume.parent / "cache"
    pods = [
        threading.Thread(target=lambda: copied.append(host_cache.fill(model, cache)))
        for _ in range(4)
    ]
    for pod in pods:
        pod.start()
    for pod in pods:
        pod.join()
    assert sorted(copied) == [0, 0, 0, 1502]


def test_a_volume_without_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    assert host_cache.main([str(tmp_path), str(cache), str(cache / "org/model")]) == 1
    assert "kubectl create job --from=cronjob/errata-models" in capsys.readouterr().err


def test_a_disk_that_cannot_be_written(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (volume.parent / "cache").write_text("a file")
    assert host_cache.main(arguments(volume)) == 1
    assert "cannot be filled (Not a directory" in capsys.readouterr().err


def test_a_model_that_is_not_in_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host_cache.main(["/source", "/models", "demo"])
    assert "ERRATA_MODEL is demo, which is not a folder below /models" in capsys.readouterr().err
