"""A benchmark's figures beside their targets: a table, and JSON with hardware and versions."""

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "transformers", "deepspeed", "ray")


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def target(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return "" if self.at_most is None else f"≤ {self.at_most:g}"

    @property
    def met(self) -> bool | None:
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most


@dataclass
class Report:
    title: str
    figures: list[Figure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str = "", **target: float) -> None:
        self.figures.append(Figure(name, value, unit, **target))

    def show(self) -> None:
        table = Table("figure", "value", "target", "", title=self.title, title_justify="left")
        for figure in self.figures:
            verdict = {None: "", True: "met", False: "not met"}[figure.met]
            table.add_row(figure.name, f"{figure.value:,.4g} {figure.unit}", figure.target, verdict)
        Console(width=110).print(table)

    def as_json(self) -> dict[str, Any]:
        figures = [{**asdict(figure), "met": figure.met} for figure in self.figures]
        return {"title": self.title, "figures": figures, "details": self.details, **machine()}


def machine() -> dict[str, Any]:
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def main(measure: Callable[[], Report], description: str | None) -> None:
    """Runs a benchmark as a program: `--json FILE` keeps its figures."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path)
    target = parser.parse_args().json
    report = measure()
    report.show()
    if target:
        target.write_text(json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n")
