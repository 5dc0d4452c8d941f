"""`errata check`: whether the service could be deployed as configured, before it is.

Looks at this machine or, with RAY_ADDRESS, at every node of that Ray cluster.
"""

import json
import os
from dataclasses import asdict
from typing import Annotated

import typer

from service import display
from service.settings import Settings


def check(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look for what would keep the service from starting; exits with 1 if there is something.

    The model, the database, the version store, and GPUs, seen from here; with RAY_ADDRESS set,
    from every node of that Ray cluster.
    """
    import ray

    from service import preflight

    settings = Settings()
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="ERROR")
    try:
        found = [asdict(finding) for finding in preflight.examine(settings)]
    finally:
        ray.shutdown()
    if as_json:
        print(json.dumps(found))
    else:
        display.findings(found)
    if not all(finding["passed"] for finding in found):
        raise typer.Exit(1)
