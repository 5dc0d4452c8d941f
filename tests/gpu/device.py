"""The accelerator that a measurement runs on: which one, its peak memory, and a report's JSON.

Needs torch alone, and rich for the table.
"""

import argparse
import json
import platform
import resource
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.report import Report

PACKAGES = ("torch", "transformers", "deepspeed")
GB = 1_000_000_000


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the arguments that all measurements have."""
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--json", type=Path, help="a file to keep the figures in")
    return arguments


def chosen(name: str, small: str) -> torch.device:
    """The device to run on. Ends the program where it is not there; `small` runs on a CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"--device cuda: torch {torch.__version__} sees no GPU here. Small, on CPU: {small}"
        )
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Allocated at most since the peak was forgotten; on a CPU the process's since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def finish(report: Report, device: torch.device, file: Path | None) -> None:
    """Prints the report; keeps it with the hardware and versions if a file is given."""
    report.show()
    if file is None:
        return
    found = {
        "title": report.title,
        "figures": [{**asdict(figure), "met": figure.met} for figure in report.figures],
        "details": report.details,
        **machine(device),
    }
    file.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "device_memory_bytes": torch.cuda.mem_get_info(device)[1] if cuda else None,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
    }
