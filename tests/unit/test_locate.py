"""`errata locate`: the search, its choice, what it writes, and what it says of bad input."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from service.commands.locate import locate as command
from service.errors import InvalidInput
from tests.architectures import tiny
from workers import evaluation, examples, frozen_prefix, locft, presets
from workers.answering import Answerer
from workers.contract import EditRecord, Hparams
from workers.errors import UnknownParameter, UnsupportedModel, WorkersError
from workers.fisher import scores
from workers.frozen_prefix import HiddenStates
from workers.locate import Search
from workers.location_choice import (
    Figures,
    Outcome,
    Trial,
    agreement,
    best_of_each,
    most_promising,
    ranking,
    spearman,
)
from workers.location_log import OtherSearch
from workers.location_report import LocationReport
from workers.locations import MODULES, Location, Module, layers_of, locations, modules_of
from workers.models import check

MakeModel = Callable[..., Any]

EDITS = [
    {
        "prompt": f"fact {number} is",
        "target": f"t{number}",
        "rephrases": [f"the fact {number}:"],
        "locality": [{"prompt": f"other {number} is"}],
    }
    for number in range(4)
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def folder(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A model directory, and `edits.jsonl` in it."""
    path = tmp_path / "tiny"
    model = make_model()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    write(path / "edits.jsonl", EDITS)
    return path


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """The command for the tiny model; further arguments follow those it always has."""
    app = typer.Typer()
    app.command()(command)

    def invoke(*arguments: str, model: str = str(folder)) -> Any:
        given = [model, "--from", str(folder / "edits.jsonl"), "--output", str(tmp_path / "out")]
        return CliRunner().invoke(app, [*given, "--epochs", "2", *arguments])

    return invoke


def write(path: Path, items: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def location(layer: int, module: Module = "mlp_down", weights: int = 10) -> Location:
    return Location(layer=layer, module=module, parameters=(f"{layer}.{module}",), weights=weights)


def outcome(where: Location, *figures: float | None, rate: float = 0.1) -> Outcome:
    return Outcome(
        trial=Trial(location=where, learning_rate=rate),
        figures=Figures(**dict(zip(Figures.model_fields, figures, strict=True))),
        epochs=1,
        loss=0.0,
        seconds_train=0.0,
        seconds_evaluate=0.0,
    )


def test_unrelated_answers_come_first_among_the_reliable() -> None:
    best = outcome(location(1), 98.5, 50, 90)
    more_general = outcome(location(2), 98.5, 60, 89)
    most_reliable = outcome(location(3), 100, 99, 10)
    harmless = outcome(location(4), 50, 0, 100)
    found = [most_reliable, harmless, more_general, best]
    assert ranking(found) == [best, more_general, most_reliable, harmless]
    assert ranking(found, margin=1)[0] == most_reliable


def test_equals_are_told_apart_by_generalization_then_weights_then_depth() -> None:
    small, late = location(1, weights=5), location(2, weights=5)
    found = [outcome(location(0), 99, 70, 90), outcome(small, 99, 70, 90)]
    assert ranking([*found, outcome(late, 99, 70, 90)])[0].trial.location == late
    assert ranking([*found, outcome(location(0, "layer", 99), 99, 71, 90)])[0] not in found
    assert ranking([outcome(small, 99, None, None), *found[:1]])[-1].trial.location == small


def test_a_location_that_failed_is_never_chosen_and_counts_once_at_its_best_rate() -> None:
    failed = outcome(location(0), None, None, None).model_copy(update={"error": "no"})
    slow, fast = outcome(location(1), 90, 0, 80, rate=0.1), outcome(location(1), 90, 0, 70, rate=1)
    assert best_of_each([failed, fast, slow]) == [slow]


def test_the_most_promising_are_kept_of_each_kind_of_module() -> None:
    down, whole = ([location(layer, m) for layer in range(3)] for m in ("mlp_down", "layer"))
    given = dict(zip([*down, *whole], (1.0, 3.0, 2.0, 60.0, 40.0, 50.0), strict=True))
    assert most_promising(given, 0.5) == [down[1], down[2], whole[0], whole[2]]
    assert most_promising(given, 0.01) == [down[1], whole[0]]
    assert most_promising(given, 1.0) == [*down, *whole]


def test_rankings_are_compared_by_spearmans_correlation() -> None:
    assert spearman([1, 2, 3], [10, 20, 400]) == pytest.approx(1)
    assert spearman([1, 2, 2, 4], [4, 3, 2, 1]) == pytest.approx(-0.9486833)
    assert spearman([1, 2], [1, 2]) is None
    assert spearman([1, 2, 3], [7, 7, 7]) is None
    tried = [outcome(location(layer), 100, None, 10 * layer) for layer in range(3)]
    found = agreement({location(layer): float(layer) for layer in range(3)}, tried)
    assert found["all"] == found["mlp_down"]
    assert found["all"] == pytest.approx(
        {"ranking": 1, "reliability": None, "generalization": None, "locality": 1}
    )


@pytest.mark.parametrize(
    ("architecture", "down", "up"),
    [
        ("LlamaForCausalLM", "mlp.down_proj.weight", "mlp.up_proj.weight"),
        ("Phi3ForCausalLM", "mlp.down_proj.weight", "mlp.gate_up_proj.weight"),
        ("Qwen2MoeForCausalLM", "mlp.shared_expert.down_proj.weight", "mlp.shared_expert.up_proj"),
        ("Qwen3MoeForCausalLM", "mlp.experts.down_proj", "mlp.experts.gate_up_proj"),
        ("GptOssForCausalLM", "mlp.experts.down_proj", "mlp.experts.gate_up_proj"),
    ],
)
def test_every_family_has_every_kind_of_module(architecture: str, down: str, up: str) -> None:
    parameters = {name: p.shape for name, p in tiny(architecture).named_parameters()}
    found, skipped = locations(parameters, [2], MODULES)
    assert [one.module for one in found] == list(MODULES)
    assert not skipped
    assert found[0].parameters == (f"model.layers.2.{down}",)
    assert found[1].parameters[0].startswith(f"model.layers.2.{up}")
    assert found[4].weights > found[2].weights + found[3].weights


def test_a_module_that_a_model_lacks_is_skipped_and_named() -> None:
    found, [line] = locations(
        {"model.layers.1.self_attn.q_proj.weight": (2, 3)}, [0, 1], ["attention"]
    )
    assert [(one.layer, one.weights) for one in found] == [(1, 6)]
    assert line == "attention: skipped, layers 0 have none of self_attn"


def test_layers_and_modules_by_name() -> None:
    assert layers_of("all", 3) == (0, 1, 2)
    assert layers_of("0-1, 4,3", 5) == (0, 1, 3, 4)
    assert modules_of("layer, mlp") == ("mlp", "layer")


@pytest.mark.parametrize(
    "architecture", ["Qwen2ForCausalLM", "MistralForCausalLM", "GptOssForCausalLM"]
)
def test_answers_in_a_batch_are_those_of_each_prompt_alone(
    architecture: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny(architecture)
    prompts = ["a", "a longer prompt", "much longer than the sliding window of it", "b c"]
    answerer = Answerer(model, tokenizer, context=64)
    together = answerer.answers(prompts, ("e", "\n"))
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new: list[int] = []
        while len(new) < min(evaluation.MAX_NEW_TOKENS, 64 - ids.shape[1]):
            with torch.no_grad():
                token = model(torch.cat([ids, torch.tensor([new], dtype=torch.long)], 1)).logits
            new.append(int(token[0, -1].argmax()))
            if new[-1] == 0 or any(s in tokenizer.decode([new[-1]]) for s in ("e", "\n")):
                break
        assert together[prompt] == tokenizer.decode(new, skip_special_tokens=True)


def test_a_prompt_without_room_for_an_answer_is_refused(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(WorkersError, match=r"'abcdef' has 6 tokens; .* 2 to 6"):
        Answerer(make_model(), tokenizer, context=6).answers(["abcdef"], (".",))


def records() -> list[EditRecord]:
    return [EditRecord.model_validate({"id": str(i), **edit}) for i, edit in enumerate(EDITS)]


def test_fishers_score_is_the_norm_of_the_mean_squared_gradient(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    samples = examples.tokenize(records(), tokenizer, context=128)
    model = make_model()
    states = HiddenStates(samples, 32, torch.float32, 1 << 30, Path("unused"))
    frozen_prefix.run(model.get_decoder(), 0, samples, states)
    frozen_prefix.run(model.get_decoder(), 2, samples, states, reached=0)
    found = scores(model, 2, samples, states)
    name = "model.layers.2.mlp.up_proj.weight"
    weight = locft.freeze(model, [name])[name]
    squares = torch.zeros_like(weight)
    for sample in samples:
        logits = model(torch.tensor([sample.read])).logits[0, len(sample.prompt) - 1 :]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(sample.target))
        squares += torch.autograd.grad(loss, weight)[0] ** 2
    assert found[name] == pytest.approx((squares / len(samples)).norm().item(), rel=1e-4)
    assert all(name.startswith("model.layers.2.") for name in found)


def test_weights_are_the_models_own_after_every_location(folder: Path, tmp_path: Path) -> None:
    hparams = Hparams(parameters=("x",), learning_rate=0.01, max_epochs=2, batch_size=2)
    search = Search(check(folder), hparams, records(), tmp_path)
    model = search._model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    found, _ = locations(shapes, [0, 2], MODULES)
    trials = [Trial(location=one, learning_rate=1e30 if one.layer else 0.01) for one in found]
    changed = []

    def watch(trial: Trial, _: Any) -> None:
        now = dict(model.named_parameters())
        changed.append({name for name in now if not torch.equal(now[name], before[name])})

    outcomes = list(search.outcomes(trials, watch))
    assert [o.trial for o in outcomes] == trials
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert {"model.layers.0.mlp.down_proj.weight"} in changed
    assert all(o.error is None for o in outcomes[:5])
    assert any("loss is" in (o.error or "") for o in outcomes[5:])
    assert search.before().locality == 100
    search.close()


def test_a_search_writes_a_table_a_picture_json_and_hparams(
    run: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    result = run("--modules", "mlp_down,attention", "--prune", "1", "--margin", "3")
    assert result.exit_code == 0, result.exception
    out = tmp_path / "out"
    report = LocationReport.model_validate_json((out / "locate.json").read_text())
    assert len(report.outcomes) == 6
    assert report.fisher is not None
    assert report.chosen == ranking(report.outcomes, 3)[0]
    assert "within 3 points" in report.rule
    for said in ("unedited", "Chosen: layer", "Fisher", "Rule: of the locations", "hparams: "):
        assert said in result.output
    assert (out / "locate.png").read_bytes().startswith(b"\x89PNG")
    chosen = presets.load(check(folder), out / "hparams.yaml", {})
    assert chosen.parameters == report.chosen.trial.location.parameters
    assert chosen.learning_rate == report.chosen.trial.learning_rate


def test_a_search_goes_on_where_it_was(run: Callable[..., Any], tmp_path: Path) -> None:
    log = tmp_path / "out" / "locations.jsonl"
    first = json.loads(run("--modules", "mlp_down", "--json").stdout)
    whole = log.read_text()
    # The last location was being written when the search was killed.
    log.write_text(whole[:-9])
    kept = log.read_text().splitlines()[:2]
    again = json.loads(run("--modules", "mlp_down", "--json").stdout)
    assert log.read_text().splitlines()[:2] == kept
    assert len(log.read_text().splitlines()) == 3
    assert again["chosen"]["figures"] == first["chosen"]["figures"]
    assert "3 of 3 trials were done before" in run("--modules", "mlp_down").output
    other = run("--modules", "mlp_down", "--seed", "1")
    assert isinstance(other.exception, OtherSearch)
    assert "seed 0 (now 1); choose another --output" in str(other.exception)


def test_pruning_leaves_layers_out_and_says_which(run: Callable[..., Any]) -> None:
    found = json.loads(run("--modules", "mlp_down", "--prune", "0.3", "--json").stdout)
    scored = [entry["location"]["layer"] for entry in found["fisher"]]
    assert [o["trial"]["location"]["layer"] for o in found["outcomes"]] == scored[:1]
    assert {one["layer"] for one in found["left_out"]} == set(scored[1:])


def test_edits_without_rephrases_or_locality_leave_figures_blank(
    run: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    bare = [{"prompt": edit["prompt"], "target": edit["target"]} for edit in EDITS]
    write(folder / "edits.jsonl", bare)
    result = run("--modules", "mlp_down", "--layers", "1")
    assert "so generalization is blank" in result.output
    assert "locality is blank and the choice cannot put it first" in " ".join(result.output.split())
    figures = json.loads((tmp_path / "out" / "locate.json").read_text())["chosen"]["figures"]
    assert figures["generalization"] is figures["locality"] is None
    write(tmp_path / "unrelated.jsonl", [{"prompt": "water is", "answer": "wet"}])
    arguments = ("--modules", "mlp_down", "--layers", "1", "--json", "--output", f"{tmp_path}/o")
    given = json.loads(run(*arguments, "--unrelated", str(tmp_path / "unrelated.jsonl")).stdout)
    assert given["locality_prompts"] == 1
    assert given["before"]["locality"] == 100


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--modules", "mlp,head"], UnknownParameter, "no module 'head' to tune; there are mlp_do"),
        (["--layers", "1-3"], UnknownParameter, "no layers '1-3'; there are 0-2"),
        (["--layers", "top"], UnknownParameter, "no layers 'top'; there are 0-2"),
        (["--prune", "2"], InvalidInput, "--prune 2: give none, or a fraction"),
        (["--prune", "half"], InvalidInput, "--prune half: give none, or a fraction"),
        (["--learning-rate", "nan"], InvalidInput, "--learning-rate nan: give one above 0"),
        (["--epochs", "0"], WorkersError, "hparams.max_epochs: 0 is wrong"),
        (["--from", "nowhere.jsonl"], WorkersError, "nowhere.jsonl: no such file"),
        (["--unrelated", "nowhere.jsonl"], WorkersError, "nowhere.jsonl: no such file"),
    ],
)
def test_bad_options_are_named(
    run: Callable[..., Any], arguments: list[str], error: type[Exception], message: str
) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no edits; name a file that does"),
        ('{"prompt": "a", "target": "b"}\n{"prompt": "c"}\n', "line 2: target: .* is wrong"),
        ('{"prompt": "a", "target": "b"}\n{"pro', "line 2: not JSON"),
    ],
)
def test_bad_edits_are_named(
    run: Callable[..., Any], folder: Path, text: str, message: str
) -> None:
    (folder / "edits.jsonl").write_text(text)
    with pytest.raises(WorkersError, match=message):
        raise run().exception


def test_a_model_that_is_not_there(run: Callable[..., Any]) -> None:
    assert isinstance(run(model="/nowhere").exception, UnsupportedModel)


def test_options_are_read_without_torch() -> None:
    code = "import sys; import service.commands.locate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
