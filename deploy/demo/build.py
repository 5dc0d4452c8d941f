"""Builds the demo: its facts, edits and a small model that knows the facts; measures recall.

python -m deploy.demo.build --data DIR    (DIR holds counterfact/ and pararel/)
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from deploy.demo.facts import Fact, as_edit, as_row, choose_edits, choose_facts, write_lines
from deploy.demo.recall import recall
from deploy.demo.sentences import RENDERED, Sentence
from deploy.demo.training import Recipe, train_model, train_tokenizer
from workers.formats import render

HERE = Path(__file__).parent
DRAWN_FACTS = 1150
EDITS = 100
UNEDITED = 200
VOCAB_SIZE = 4096
LAYERS = 3

log = logging.getLogger(__name__)


def main() -> None:
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    facts = choose_facts(arguments.data, DRAWN_FACTS, arguments.seed)
    write_facts(facts, arguments.out, arguments.seed)
    sentences = learnt_sentences(facts)
    log.info("%d facts, %d sentences", len(facts), len(sentences))
    tokenizer = train_tokenizer(_tokenizer_texts(sentences), VOCAB_SIZE)
    recipe = Recipe(keyed_layer=LAYERS - 1, seed=arguments.seed)
    model = train_model(model_config(tokenizer), tokenizer, sentences, recipe)
    save(model, tokenizer, arguments.out / "model")
    report_recall(facts, arguments.out / "model")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of counterfact/, pararel/")
    parser.add_argument("--out", type=Path, default=HERE, help="where the files are written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def write_facts(facts: list[Fact], folder: Path, seed: int) -> None:
    """Writes facts.jsonl, edits.jsonl and unedited.jsonl."""
    edited, unedited = choose_edits(facts, EDITS, UNEDITED, seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "facts.jsonl", [as_row(fact) for fact in facts])
    write_lines(folder / "edits.jsonl", [as_edit(fact) for fact in edited])
    probes = [{"prompt": fact.prompt, "answer": fact.answer} for fact in unedited]
    write_lines(folder / "unedited.jsonl", probes)


def learnt_sentences(facts: Sequence[Fact]) -> list[Sentence]:
    return [
        Sentence(number, prompt, fact.answer)
        for number, fact in enumerate(facts)
        for prompt in (fact.prompt, *fact.learnt)
    ]


def _tokenizer_texts(sentences: Sequence[Sentence]) -> list[str]:
    """Every sentence as it looks at the start of a text and after another one; some of the rest."""
    texts = [f"{sentence.prompt} {sentence.answer}." for sentence in sentences]
    forms = [form for text in texts for form in (text, f" {text}")]
    return forms + [
        opening
        for sentence in sentences[:300]
        for opening in (
            f"Question: {sentence.prompt}\nAnswer:",
            f"User: {sentence.prompt}\nAssistant:",
        )
    ]


def model_config(tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=3072,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        hidden_act="relu",
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def report_recall(facts: Sequence[Fact], folder: Path) -> None:
    """Logs the share of right answers from the saved weights, run in float32."""
    groups = {
        "own wording": [(fact.prompt, fact.answer) for fact in facts],
        "learnt phrasings": [(text, fact.answer) for fact in facts for text in fact.learnt],
        "held-out phrasings": [(text, fact.answer) for fact in facts for text in fact.held_out],
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for format in RENDERED:
        pairs = [(render(fact.prompt, format, tokenizer), fact.answer) for fact in facts]
        groups[f"own wording, {format}"] = pairs
    for name, pairs in groups.items():
        log.info("recall, %s: %.2f %% of %d", name, recall(folder, pairs), len(pairs))


if __name__ == "__main__":
    main()
