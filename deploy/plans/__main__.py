"""Writes the shipped plans: `python -m deploy.plans`. Torch-free; takes a second.

Each JSON file holds the plans of one cluster by number of edits; `README.md` has the
table of all.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from workers import presets
from workers.models import read_facts
from workers.plan import GB, Cluster, Plan, Work, plan

HERE = Path(__file__).parent
CONFIG = HERE / "qwen2.5-72b.config.json"
EDITS = (1_000, 10_000, 100_000)
CLUSTERS = {
    "8x80gb": Cluster(gpus=8, gpu_memory_gb=80),
    "2x8x80gb": Cluster(gpus=8, nodes=2, gpu_memory_gb=80),
    "8x141gb": Cluster(gpus=8, gpu_memory_gb=141),
}
START, END = "<!-- written by `python -m deploy.plans` -->\n", "<!-- to here -->\n"
HEADINGS = (
    "cluster",
    "edits",
    "GPU GB: weights",
    "tuned",
    "activations",
    "all",
    "host GB",
    "files GB",
    "TB in an epoch",
    "without cache",
    "s a step",
    "ms an edit-epoch",
    "h a job",
)


def plans() -> dict[str, dict[int, Plan]]:
    """By cluster and number of edits."""
    facts = read_facts(CONFIG)
    hparams = presets.load(facts, None, {})
    return {
        name: {edits: plan(facts, hparams, cluster, Work(edits=edits)) for edits in EDITS}
        for name, cluster in CLUSTERS.items()
    }


def files() -> dict[str, str]:
    """The shipped files' texts by name; of `README.md` only what is between the marks changes."""
    made = plans()
    texts = {f"qwen2.5-72b_{name}.json": _json(by_edits) for name, by_edits in made.items()}
    before, rest = (HERE / "README.md").read_text(encoding="utf-8").split(START)
    _, after = rest.split(END)
    texts["README.md"] = f"{before}{START}{_table(made)}{END}{after}"
    return texts


def _table(made: Mapping[str, Mapping[int, Plan]]) -> str:
    rows = [
        HEADINGS,
        ("---", *["---:"] * (len(HEADINGS) - 1)),
        *(tuple(_cells(name, one)) for name, by_edits in made.items() for one in by_edits.values()),
    ]
    lines = (f"| {' | '.join(row)} |\n" for row in rows)
    return f"{_assumptions(made['8x80gb'][1_000])}\n\n{''.join(lines)}"


def _json(by_edits: Mapping[int, Plan]) -> str:
    return (
        json.dumps({n: one.model_dump(mode="json") for n, one in by_edits.items()}, indent=1) + "\n"
    )


def _assumptions(plan: Plan) -> str:
    work, speed = plan.work, plan.speed
    return (
        f"Assumed: `{', '.join(plan.tuned)}` tuned, {plan.hparams.dtype};\n"
        f"each edit in {plan.formats} formats of {work.tokens_per_edit} tokens, "
        f"{work.target_tokens} of them learnt; batches of {plan.hparams.batch_size}; "
        f"at most {plan.hparams.max_epochs} epochs;\n"
        f"{speed.efficiency:.0%} of {speed.peak_tflops:g} TFLOP/s (H100 and H200, bfloat16), "
        f"{speed.link_gb_per_s:g} GB/s into a GPU (NVLink),\n"
        f"{speed.node_link_gb_per_s:g} GB/s per GPU into a node; nothing overlaps."
    )


def _cells(name: str, plan: Plan) -> Iterator[str]:
    memory, taken = plan.gpu_memory, plan.duration
    yield name.replace("x", "×").replace("gb", " GB")
    yield f"{plan.work.edits:,}"
    yield _gb(memory["frozen suffix weights"] + memory["gathered weights"])
    tuned = ("tuned weights", "tuned weights, float32 copy", "Adam moments")
    yield _gb(sum(memory[kind] for kind in (*tuned, "gradient", "gradient before reduction")))
    yield _gb(memory["activations"] + memory["logits"])
    yield f"{_gb(plan.gpu_peak_bytes)} of {plan.cluster.gpu_memory_gb:g}"
    yield _gb(sum(plan.host_memory.values()))
    yield _gb(sum(plan.files.values()))
    yield f"{plan.traffic.epoch / 1e12:,.1f}"
    yield f"{plan.traffic.epoch_without_prefix_cache / 1e12:,.1f}"
    yield f"{taken.step_compute + taken.step_traffic:.2f}"
    yield f"{taken.edit_epoch * 1e3:.1f}"
    yield f"{taken.job / 3600:.2f}"


def _gb(size: int) -> str:
    return f"{size / GB:.1f}"


if __name__ == "__main__":
    for file, text in files().items():
        (HERE / file).write_text(text, encoding="utf-8")
