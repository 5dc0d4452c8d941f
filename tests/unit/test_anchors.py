"""The anchors file: what it may hold, and what is said when it does not."""

from pathlib import Path

import pytest

from service.coordinator.anchors import sample
from service.errors import ConfigurationError
from workers.contract import LocalityProbe


def write(tmp_path: Path, text: bytes) -> Path:
    file = tmp_path / "anchors"
    file.write_bytes(text)
    return file


def test_lines_and_objects(tmp_path: Path) -> None:
    file = write(tmp_path, b'\nThe Rhine is \r\n{"prompt": "2 + 2 =", "answer": "4", "n": 1}\n\n')
    found = sample(file, 9, "seed")
    assert sorted(found, key=lambda probe: probe.prompt) == [
        LocalityProbe(prompt="2 + 2 =", answer="4"),
        LocalityProbe(prompt="The Rhine is"),
    ]


def test_the_seed_draws(tmp_path: Path) -> None:
    file = write(tmp_path, b"\n".join(b"prompt %d" % n for n in range(100)))
    assert sample(file, 10, "a") == sample(file, 10, "a") != sample(file, 10, "b")
    assert len(set(sample(file, 10, "a"))) == 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "has no prompts"),
        (b"\xff", "is not UTF-8"),
        (b"fine\n{", r"anchors:2: not a JSON object"),
        (b'{"answer": "4"}', r"anchors:1: there is no `prompt`"),
        (b'{"prompt": 4}', r"anchors:1: prompt: "),
        (b'{"prompt": " "}', r"anchors:1: `prompt` is empty"),
        (b'{"prompt": "x", "answer": "\\u0000"}', r"anchors:1: holds a NUL"),
        (b'{"prompt": "\\ud800"}', r"anchors:1: .*half of a surrogate"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: bytes, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        sample(write(tmp_path, text), 1, "seed")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ERRATA_ANCHORS"):
        sample(None, 1, "seed")
    with pytest.raises(ConfigurationError, match="gone cannot be read"):
        sample(tmp_path / "gone", 1, "seed")
