"""What the command line says when it fails: one message, exit code 1, no traceback."""

import sys
from pathlib import Path

import pytest

from service.cli import main


def failing(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(sys, "argv", ["errata", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    return said


def test_a_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tmp_path / "model")
    arguments = ["up", "--model", model, "--port", "0", "--data-dir", str(tmp_path / "data")]
    assert model in failing(arguments, monkeypatch, capsys)


def test_a_port_out_of_range(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "port: " in failing(["up", "--port", "70000"], monkeypatch, capsys)


def test_a_line_that_is_not_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text('{"prompt": "a", "target": "b"}\nnot json\n')
    assert f"{file}, line 2" in failing(["edits", "submit", str(file)], monkeypatch, capsys)


def test_a_service_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ERRATA_API_URL", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1" in failing(["jobs", "list"], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "ERRATA_DATABASE_URL"),
        ({"ERRATA_DATABASE_URL": "postgresql://u:secret@127.0.0.1:1/e"}, "ERRATA_VERSION_STORE"),
        (
            {
                "ERRATA_DATABASE_URL": "postgresql://u:secret@127.0.0.1:1/e",
                "ERRATA_VERSION_STORE": "store",
            },
            "cannot use the database postgresql://u:***@127.0.0.1:1/e",
        ),
    ],
)
def test_a_job_that_cannot_be_trained_here(
    environment: dict[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told = failing(["jobs", "run", "--wait", "--here"], monkeypatch, capsys)
    assert said in told
    assert "secret" not in told
