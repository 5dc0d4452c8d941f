"""`errata eval` against a running API: HTTP, PostgreSQL, an engine, lm-evaluation-harness."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import torch
import typer
import uvicorn
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from service.api.app import create_api
from service.client import ApiError, Client
from service.commands.evaluate import evaluate
from service.edits import NewEdit
from service.errors import InvalidInput
from service.replica.bank import VersionBank
from service.replica.generation import Sizes
from service.replica.local import LocalInference
from service.replica.transformers_engine import TransformersEngine
from service.settings import Settings
from service.store import claims, edits, jobs, versions
from service.store.database import Database
from service.versions import Verdict
from tests.conftest import of_database
from tests.tiny_model import publish, save_tiny_model, stored
from workers.benchmark_sets import BadBenchmarkSet
from workers.contract import LocalityProbe
from workers.errors import BadHparams
from workers.evaluation import MAX_NEW_TOKENS, STOP, answer_of

FINGERPRINT = "f" * 64
EDIT = "the capital of France is"
REPHRASED = "France has the capital"
UNRELATED = "Paris is"


class Server(uvicorn.Server):
    """Runs in a thread of its own; `ready` once it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def database_of_module(postgres_url: str, template: str) -> Iterator[str]:
    with psycopg.connect(postgres_url, autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE test_eval TEMPLATE {template}")
        yield of_database(postgres_url, "test_eval")
        conn.execute("DROP DATABASE test_eval WITH (FORCE)")


@pytest.fixture(scope="module")
def url(
    model: Path, database_of_module: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The API with versions v0, live, and v1."""
    store = str(tmp_path_factory.mktemp("store"))
    publish(store, "v1", FINGERPRINT)
    engine = TransformersEngine.load(model, Sizes(kv_tokens=1024), threads=1)
    inference = LocalInference(
        engine, VersionBank(engine, stored(store, FINGERPRINT), FINGERPRINT, capacity=2)
    )
    settings = Settings(model=str(model))
    app = create_api(settings, Database(database_of_module), inference)
    server = Server(uvicorn.Config(app, port=0, log_level="warning"))

    async def serve() -> None:
        database = Database(database_of_module)
        async with database.transaction() as conn:
            await versions.ensure_base(conn, FINGERPRINT)
        await database.dispose()
        await server.serve()
        await engine.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert server.ready.wait(30)
    host, port = server.servers[0].sockets[0].getsockname()
    yield f"http://{host}:{port}"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def job(url: str, database_of_module: str) -> str:
    """The job that made v1, which holds an edit whose target v0 answers by itself."""
    target = answer_of(answer(url, EDIT))
    edit = NewEdit(EDIT, target, None, (REPHRASED,), (LocalityProbe(prompt=UNRELATED),))

    async def run() -> str:
        database = Database(database_of_module)
        async with database.transaction() as conn:
            [queued] = await edits.add(conn, [edit])
            job = await jobs.create(conn)
            await claims.claim(conn, job)
            await versions.publish(
                conn,
                version_id=await versions.allocate(conn),
                parent_id="v0",
                job_id=job.id,
                base_fingerprint=FINGERPRINT,
                metrics={},
            )
            verdict = Verdict(
                edit_id=queued.id, reliable=True, answer="", generalization=None, locality=None
            )
            await claims.settle(conn, job.id, "v1", [verdict])
        await database.dispose()
        return job.id

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` leaves its lock files there."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def answer(url: str, prompt: str) -> str:
    with Client(url) as api:
        return api.ask(prompt, model="errata@v0", max_tokens=MAX_NEW_TOKENS, stop=STOP)[0]


@pytest.fixture
def run(url: str, job: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `errata eval` with some arguments."""
    app = typer.Typer()
    app.command()(evaluate)
    monkeypatch.setenv("ERRATA_API_URL", url)
    return lambda *arguments: CliRunner().invoke(app, [str(each) for each in arguments])


def report(result: Result) -> Any:
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


def figures(found: Any) -> dict[tuple[str, str], tuple[float, float, float]]:
    names = ("reliability", "generalization", "locality")
    return {
        (row["version"], row["format"]): tuple(row[name] for name in names)
        for row in found["results"]
    }


def test_the_edits_of_a_version(run: Callable[..., Result], job: str, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    asked = ("--version", "v1", "--compare", "base", "--format", "raw", "--output", output)
    found = report(run(*asked, "--json"))
    assert (found["edits"], found["job"]) == (1, job)
    assert figures(found) == {("v0", "raw"): (100.0, 0.0, 100.0), ("v1", "raw"): (0.0, 0.0, 0.0)}
    written = json.loads(output.read_text())
    assert [verdict["reliable"] for verdict in written["verdicts"]["v0"]] == [True]
    for more in (("--all",), ("--job", job)):
        assert figures(report(run(*asked, *more, "--json"))) == figures(found)


@pytest.fixture(scope="module")
def sports(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of four facts, two of which v0 knows; one has an earlier target, too."""
    prompts = [f"{name} plays" for name in ("Dave", "Stan", "Andrey", "Lionel")]
    *known, unedited = [answer_of(answer(url, prompt)) for prompt in [*prompts[:2], UNRELATED]]
    records = [
        {
            "prompt": prompt,
            "target_new": target,
            "subject": prompt.split()[0],
            "rephrase_prompt": prompt,
            "locality_prompt": prompts[0] if target == "chess" else UNRELATED,
            "locality_ground_truth": unedited,
        }
        for prompt, target in zip(
            [*prompts, prompts[0]], ["soccer", known[1], "soccer", "chess", known[0]], strict=True
        )
    ]
    path = tmp_path_factory.mktemp("set") / "sports.json"
    path.write_text(json.dumps(records))
    return path


def test_a_benchmark_set_in_every_format(run: Callable[..., Result], sports: Path) -> None:
    found = report(run("--from", sports, "--set", "counterfact", "--json"))
    assert (found["records"], found["conflicting"], found["superseded"]) == (5, 1, 1)
    assert found["edits"] == 4
    assert figures(found) == {
        ("v0", "raw"): (50.0, 50.0, 100.0),
        ("v0", "qa"): (0.0, 0.0, None),
        ("v0", "prefix"): (0.0, 0.0, None),
    }


def test_the_table(run: Callable[..., Result], sports: Path) -> None:
    shown = run("--from", sports, "--limit", 2, "--format", "raw", "--compare", "v1").stdout
    assert "2 edits of" in shown
    head, *rows = [line.split() for line in shown.splitlines()[-3:]]
    assert head == ["version", "format", "reliability", "generalization", "locality"]
    assert rows == [["v0", "raw", "50", "50", "100"], ["v1", "raw", "0", "0", "0"]]


QUESTIONS = ["the capital of", "Paris is", "France has", "is it the capital of"]
CHOICES = [" France", " Paris"]


@pytest.fixture
def tasks(url: str, tmp_path: Path) -> Path:
    """A directory with a task of each kind, over two local files."""
    rows = [{"question": q, "choices": CHOICES, "answer": n % 2} for n, q in enumerate(QUESTIONS)]
    (tmp_path / "choices.json").write_text(json.dumps(rows))
    with Client(url) as api:
        told = [api.ask(q, model="errata@v0", max_tokens=6)[0] for q in QUESTIONS]
    rows = [{"question": q, "answer": told[n] if n else "?"} for n, q in enumerate(QUESTIONS)]
    (tmp_path / "answers.json").write_text(json.dumps(rows))
    shared = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
    write_task(
        tmp_path,
        "choices",
        **shared,
        output_type="multiple_choice",
        doc_to_choice="choices",
        doc_to_target="answer",
        target_delimiter="",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    write_task(
        tmp_path,
        "answers",
        **shared,
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 6},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    return tmp_path


def write_task(directory: Path, name: str, **fields: Any) -> None:
    files = {"test": str(directory / f"{name}.json")}
    task = {"task": name, "dataset_kwargs": {"data_files": files}, **fields}
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(task))


def test_tasks_of_both_kinds(run: Callable[..., Result], tasks: Path, model: Path) -> None:
    asked = ("--tasks", "answers,choices", "--include-path", tasks, "--json")
    found = report(run(*asked, "--compare", "v1"))
    rows = {(row["version"], row["task"], row["metric"]): row for row in found["results"]}
    assert rows["v0", "answers", "exact_match"]["value"] == 0.75
    assert rows["v1", "answers", "exact_match"]["value"] == 0.0
    assert rows["v0", "choices", "acc"]["value"] == accuracy(model)
    assert {row["questions"] for row in found["results"]} == {4}
    limited = report(run(*asked, "--limit", 2, "--model", model))
    assert {row["questions"] for row in limited["results"]} == {2}


def test_a_task_that_the_service_refuses(run: Callable[..., Result], tasks: Path) -> None:
    file = tasks / "answers.yaml"
    task = yaml.safe_load(file.read_text())
    task["generation_kwargs"] |= {"do_sample": True, "temperature": 3.0}
    file.write_text(yaml.safe_dump(task))
    result = run("--tasks", "answers", "--include-path", tasks, "--limit", 1)
    assert isinstance(result.exception, ApiError)
    assert "temperature" in str(result.exception)


def accuracy(model: Path) -> float:
    """Of the likelier choice, computed by transformers alone."""
    network = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def likelihood(question: str, choice: str) -> float:
        asked, whole = (tokenizer(text)["input_ids"] for text in (question, question + choice))
        with torch.no_grad():
            logprobs = network(torch.tensor([whole])).logits[0].log_softmax(-1)
        places = range(len(asked), len(whole))
        return float(sum(logprobs[place - 1, whole[place]] for place in places))

    right = [
        max(CHOICES, key=lambda choice: likelihood(question, choice)) == CHOICES[number % 2]
        for number, question in enumerate(QUESTIONS)
    ]
    return sum(right) / len(right)


BAD = [
    (("--from", "nothing.json"), BadBenchmarkSet, "nothing.json: no such file"),
    (("--from", "{strange}", "--set", "zsre"), BadBenchmarkSet, "fields a, b; a set has src, alt"),
    (("--from", "{empty}"), BadBenchmarkSet, "holds no records"),
    (("--version", "v9"), ApiError, "v9"),
    (("--version", "v0"), InvalidInput, "v0 holds no edits"),
    (("--version", "v1", "--job", "job_x"), InvalidInput, "no edits that job_x trained"),
    (("--from", "{sports}", "--tasks", "t"), InvalidInput, "--from and --tasks exclude"),
    (("--from", "{sports}", "--format", "raw,rot13"), InvalidInput, "no rot13; there are raw"),
    (("--from", "{sports}", "--format", "chat"), BadHparams, "no chat template"),
    (("--from", "{sports}", "--model", "./nowhere"), InvalidInput, "--model"),
    (("--from", "{sports}", "--output", "no/such/file.json"), InvalidInput, "no/such"),
    (("--from", "{long}", "--format", "raw"), ApiError, "shorten it"),
    (("--set", "zsre"), InvalidInput, "--set goes with --from"),
    (("--tasks", "nope", "--include-path", "nowhere"), InvalidInput, "nowhere: no such directory"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(
    run: Callable[..., Result],
    sports: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    error: type[Exception],
    message: str,
) -> None:
    texts = {
        "empty": "[]",
        "strange": json.dumps({"a": 1, "b": 2}),
        "long": json.dumps({"prompt": "x" * 600, "target_new": "y"}),
    }
    paths = {name: tmp_path / f"{name}.json" for name in texts}
    for name, text in texts.items():
        paths[name].write_text(text)
    result = run(*(each.format(sports=sports, **paths) for each in arguments))
    assert isinstance(result.exception, error), result.output
    assert message in str(result.exception)


def test_an_unknown_set_name(run: Callable[..., Result], sports: Path) -> None:
    result = run("--from", sports, "--set", "zsrre")
    assert result.exit_code == 2
    assert "zsrre" in result.output
    assert "counterfact" in result.output
