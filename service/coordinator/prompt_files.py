"""Files of prompts, with or without their answers. Text only."""

import json
from pathlib import Path

from pydantic import ValidationError

from service.errors import ConfigurationError
from workers.contract import LocalityProbe


def read(file: Path, setting: str) -> list[LocalityProbe]:
    """The prompts of the file that `setting` names, in order.

    A line is a JSON object with `prompt` and, if known, `answer`, or else a prompt as it is; empty
    ones are passed over. Raises `ConfigurationError` naming the setting, the file and the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigurationError(f"{setting}: {file} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{setting}: {file} is not UTF-8 (byte {error.start}); convert it"
        ) from error
    found = [
        _probe(line, f"{setting}: {file}:{n}") for n, line in enumerate(lines, 1) if line.strip()
    ]
    if not found:
        raise ConfigurationError(f"{setting}: {file} has no prompts; one a line is expected")
    return found


def _probe(line: str, place: str) -> LocalityProbe:
    if not line.lstrip().startswith("{"):
        return _storable(LocalityProbe(prompt=line.strip()), place)
    try:
        values = json.loads(line)
        probe = LocalityProbe(prompt=values["prompt"], answer=values.get("answer"))
    except KeyError as error:
        raise ConfigurationError(f"{place}: there is no `prompt`") from error
    except ValidationError as error:
        [first, *_] = error.errors()
        raise ConfigurationError(f"{place}: {first['loc'][0]}: {first['msg']}") from error
    except ValueError as error:
        raise ConfigurationError(f"{place}: not a JSON object ({error})") from error
    return _storable(probe, place)


def _storable(probe: LocalityProbe, place: str) -> LocalityProbe:
    """PostgreSQL holds neither NUL characters nor lone surrogates."""
    text = probe.prompt + (probe.answer or "")
    if not probe.prompt.strip():
        raise ConfigurationError(f"{place}: `prompt` is empty")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigurationError(
            f"{place}: holds a NUL character or half of a surrogate pair; remove it"
        )
    return probe
