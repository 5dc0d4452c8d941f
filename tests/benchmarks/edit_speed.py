"""LocFT-BF's training loop against a plain loop that does what the public code does.

A random model of 24 layers, 512 wide, with 32,000 tokens; 500 CounterFact edits in the same
batches of 100. Both sides in this process, float32, on all cores; the median epoch of each, and
the whole run with the frozen prefix's single pass in it.

    python -m tests.benchmarks.edit_speed --json FILE
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from service.client import read_jsonl
from service.settings import DEMO_MODEL
from tests.benchmarks import fast_loop, plain_loop
from tests.benchmarks.report import Report, main
from workers import examples
from workers.contract import EditRecord, Hparams
from workers.examples import Example

TARGETS = {17: 5.0, 5: 2.5}
EPOCHS = 3
EDITS = 500
WIDTH = 512


def measure() -> Report:
    report = Report("LocFT-BF's loop against a plain loop: 24 layers of 512, 500 edits, batch 100")
    samples = counterfact()
    read = [len(sample) for sample in samples]
    report.details["tokens per sample"] = {"mean": statistics.mean(read), "max": max(read)}
    for layer, target in TARGETS.items():
        compare(report, samples, layer, target)
    return report


def counterfact() -> list[Example]:
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL)
    facts = read_jsonl(DEMO_MODEL.parent / "facts.jsonl")[:EDITS]
    edits = [EditRecord(id=f["id"], prompt=f["prompt"], target=f["target_new"]) for f in facts]
    return examples.tokenize(edits, tokenizer, context=256)


def compare(report: Report, samples: Sequence[Example], layer: int, target: float) -> None:
    hparams = Hparams(
        parameters=(f"model.layers.{layer}.mlp.down_proj.weight",),
        learning_rate=5e-4,
        max_epochs=EPOCHS,
        loss_threshold=0.0,
    )
    plain = plain_loop.train(model(), samples, hparams)
    ours = fast_loop.train(model(), samples, hparams, layer)
    ratio = statistics.median(plain.seconds) / statistics.median(ours.seconds)
    worst = max(abs(a - b) / a for a, b in zip(plain.losses, ours.losses, strict=True))
    report.add(f"layer {layer}: plain epoch", statistics.median(plain.seconds), "s")
    report.add(f"layer {layer}: our epoch", statistics.median(ours.seconds), "s")
    report.add(f"layer {layer}: prefix, once", ours.prefix_s, "s")
    report.add(f"layer {layer}: speed per epoch", ratio, "x", at_least=target)
    at_25 = 25 * statistics.median(plain.seconds)
    ours_at_25 = ours.prefix_s + 25 * statistics.median(ours.seconds)
    report.add(f"layer {layer}: speed over 25 epochs with prefix", at_25 / ours_at_25, "x")
    report.add(f"layer {layer}: loss difference, worst batch", worst, at_most=2**-8)
    report.details[f"layer {layer}"] = {"plain": plain.losses, "ours": ours.losses}


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=WIDTH,
        intermediate_size=1408,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    main(measure, __doc__)
