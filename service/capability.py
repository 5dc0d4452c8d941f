"""General tasks put to a version by lm-evaluation-harness, over `/v1/completions`.

Owns how the harness is called and what is read from its results; the harness is an optional
extra. Knows nothing of edits, tables or terminals.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from service.client import JSON, ApiError
from service.errors import ConfigurationError, InvalidInput
from workers import models

PROMPTS = 32
"""In one request; the service answers them side by side."""
BOOTSTRAPS = 1000
"""Resamplings behind the standard error of a metric that is no mean."""


class Harness:
    """lm-evaluation-harness with the tasks that it ships and those of `include_path`.

    Raises `ConfigurationError` if it is not installed, `InvalidInput` for a task that it does not
    have.
    """

    def __init__(self, tasks: Sequence[str], include_path: Path | None) -> None:
        self._tasks = list(tasks)
        self._manager = _manager(self._tasks, include_path)

    def measure(
        self,
        url: str,
        api_key: str | None,
        version: str,
        model: str,
        limit: int | None = None,
    ) -> list[JSON]:
        """A row per task and metric: `value`, its standard error, and the `questions` asked.

        `model` is the base model's directory or hub id: its tokenizer divides context and answer.
        Raises `ApiError` if the service refuses a question or is away.
        """
        from lm_eval import simple_evaluate
        from requests import RequestException

        try:
            results = simple_evaluate(
                model="local-completions",
                model_args=_model_arguments(url, api_key, version, model),
                tasks=self._tasks,
                batch_size=PROMPTS,
                task_manager=self._manager,
                limit=limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
        except RequestException as error:
            raise _refusal(version, error) from error
        return [{"version": version, **row} for row in _rows(results)]


def _manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigurationError(
            "tasks need lm-evaluation-harness: "
            "pip install --constraint constraints.txt --editable '.[eval]'"
        ) from error
    if include_path is not None:
        if not include_path.is_dir():
            raise InvalidInput(f"--include-path {include_path}: no such directory")
        # Reading the thousands of tasks that come with the harness takes seconds.
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise InvalidInput(
            f"--tasks: lm-evaluation-harness has no {', '.join(unknown)}; `lm-eval ls tasks` lists "
            "what it has, --include-path adds a directory of tasks"
        )
    return manager


def _model_arguments(url: str, api_key: str | None, version: str, model: str) -> dict[str, Any]:
    key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return {
        "model": f"errata@{version}",
        "base_url": f"{url}/v1/completions",
        "header": {"Accept": "application/json", **key},
        "tokenizer": model,
        "tokenizer_backend": "huggingface",
        # Texts begin as the service itself begins them.
        "add_bos_token": True,
        "max_length": models.read_facts(models.config_file(model)).context,
    }


def _refusal(version: str, error: Any) -> ApiError:
    """A `requests` exception as what the service said, if it did."""
    said = error.response
    if said is None:
        return ApiError(None, f"the harness got no answer from {version}: {error}")
    try:
        problem = said.json()
        return ApiError(
            said.status_code, f"{version}: {problem['detail']}", problem.get("errors", ())
        )
    except (ValueError, KeyError):
        return ApiError(said.status_code, f"{version}: HTTP {said.status_code}: {said.text[:500]}")


def _rows(results: Mapping[str, Any]) -> Iterator[JSON]:
    samples = results["n-samples"]
    for task, figures in results["results"].items():
        for name, value in figures.items():
            metric, _, postprocessing = name.partition(",")
            if not postprocessing or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{postprocessing}")
            yield {
                "task": task,
                "metric": metric if postprocessing == "none" else f"{metric} ({postprocessing})",
                "value": value,
                "stderr": error if isinstance(error, float) else None,
                "questions": samples[task]["effective"] if task in samples else None,
            }
