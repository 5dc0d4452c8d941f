"""What `errata up` refuses before it starts anything."""

import json
import shutil
import socket
from pathlib import Path

import pytest

from service.errors import ConfigurationError
from service.node import owned, started
from service.settings import DEMO_MODEL, Settings
from workers.errors import UnsupportedModel


def settings(tmp_path: Path, **changes: object) -> Settings:
    given = {"data_dir": tmp_path / "data", "port": 0, **changes}
    return Settings.model_validate(given)


def refused(chosen: Settings) -> str:
    with pytest.raises((ConfigurationError, UnsupportedModel)) as caught, started(chosen):
        pytest.fail("the service started")
    return str(caught.value)


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        message = refused(settings(tmp_path, port=port))
    assert str(port) in message
    assert "--port" in message


def test_an_address_beyond_this_machine_is_refused(tmp_path: Path) -> None:
    assert "'0.0.0.0' is not a loopback address" in refused(settings(tmp_path, host="0.0.0.0"))


def test_an_unwritable_data_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused(settings(tmp_path, data_dir=tmp_path / "file" / "data"))
    assert str(tmp_path / "file" / "data") in message
    assert "--data-dir" in message


def test_a_data_directory_in_use_is_refused(tmp_path: Path) -> None:
    with owned(tmp_path / "data"):
        assert "in use by another errata" in refused(settings(tmp_path))


def test_a_model_directory_without_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    message = refused(settings(tmp_path, model=str(tmp_path / "model")))
    assert "config.json" in message
    assert str(tmp_path / "model") in message


def test_an_unsupported_architecture_is_named_with_those_supported(tmp_path: Path) -> None:
    model = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    message = refused(settings(tmp_path, model=str(model)))
    assert "BertModel" in message
    assert "Qwen2ForCausalLM" in message
