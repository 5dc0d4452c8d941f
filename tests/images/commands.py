"""What a Markdown page tells its reader to type, and what it quotes."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a language; none: commands, and what they print."""
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def inline(page: Path) -> list[str]:
    return INLINE.findall(FENCE.sub("", page.read_text()))


def command_lines(page: Path) -> list[list[str]]:
    """Every line of a block, and every piece of code in the text, as words without comments."""
    texts = [line for block in blocks(page) for line in block.splitlines()]
    return [words for text in [*texts, *inline(page)] if (words := _words(text))]


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        return []


def errata_arguments(words: list[str]) -> list[str] | None:
    """What is given to `errata` in a command line, if it is one; variables may be set before it."""
    for place, word in enumerate(words[:-1]):
        if word == "errata" and _is_program(words[:place]):
            return words[place + 1 :]
    return None


def _is_program(before: list[str]) -> bool:
    """The last word of `docker compose … exec errata` is the service, not the program."""
    if before and before[0] == "docker":
        return "exec" in before[:-1] and before[-1] == "errata"
    if before and before[0] == "kubectl":
        return before[-1] == "--"
    return all(ASSIGNMENT.fullmatch(word) for word in before)


def parser(app: typer.Typer) -> Callable[[list[str]], bool]:
    """Tells whether a command line is one that `app` takes, without running it."""
    command = typer.main.get_command(app)
    _do_nothing(command)

    def takes(arguments: list[str]) -> bool:
        with pytest.raises(SystemExit) as ended:
            command(arguments)
        return ended.value.code == 0

    return takes


def _do_nothing(command: Any) -> None:
    command.callback = lambda **_: None
    for subcommand in getattr(command, "commands", {}).values():
        _do_nothing(subcommand)
