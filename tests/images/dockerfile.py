"""Dockerfiles and `.dockerignore` as data, as far as this project's own files need it."""

import re
import shlex
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Instruction:
    keyword: str
    value: str

    @property
    def words(self) -> list[str]:
        """The value's words without its options, `--name=value`."""
        return [word for word in shlex.split(self.value) if not word.startswith("--")]


def read(file: Path) -> list[Instruction]:
    """A Dockerfile's instructions, lines joined, comments left out."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [Instruction(keyword.upper(), value) for keyword, value in pairs]


def stages(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Each stage's instructions, its FROM first; what precedes the first FROM is left out."""
    found: list[list[Instruction]] = []
    for instruction in instructions:
        if instruction.keyword == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


def arguments(instructions: list[Instruction]) -> dict[str, str]:
    """The defaults of all ARGs."""
    pairs = [one.value.partition("=") for one in instructions if one.keyword == "ARG"]
    return {name: default for name, _, default in pairs}


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether `.dockerignore` keeps `path` from the builder: the last pattern that matches rules.

    A pattern matches what is below a folder too; one with `!` takes back.
    """
    verdict = False
    for pattern in patterns:
        plain = pattern.removeprefix("!")
        if any(_matches(above, plain) for above in [PurePosixPath(path), *_folders(path)]):
            verdict = not pattern.startswith("!")
    return verdict


def _folders(path: str) -> list[PurePosixPath]:
    return [folder for folder in PurePosixPath(path).parents if str(folder) != "."]


def _matches(path: PurePosixPath, pattern: str) -> bool:
    """`*` is within one name; `**/` is any number of folders."""
    if pattern.startswith("**/"):
        return any(
            _matches(PurePosixPath(*path.parts[skipped:]), pattern[3:])
            for skipped in range(len(path.parts))
        )
    names = PurePosixPath(pattern).parts
    return len(names) == len(path.parts) and all(
        fnmatchcase(part, name) for part, name in zip(path.parts, names, strict=True)
    )
