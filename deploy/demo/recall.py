"""Measures what a model answers: greedy and autoregressive, as SQuAD compares answers."""

import re
import string
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH_SIZE = 256
MAX_NEW_TOKENS = 32


def recall(folder: Path, pairs: Sequence[tuple[str, str]]) -> float:
    """Percentage of (prompt, answer) pairs that the model saved in `folder` answers right."""
    answers = generate(folder, [prompt for prompt, _ in pairs])
    right = sum(
        normalise(found) == normalise(answer)
        for found, (_, answer) in zip(answers, pairs, strict=True)
    )
    return 100 * right / len(pairs)


@torch.no_grad()
def generate(folder: Path, prompts: Sequence[str]) -> list[str]:
    """Completions up to EOS, a period, a newline or 32 tokens, in the order of the prompts."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts: list[str] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = list(prompts[start : start + BATCH_SIZE])
        inputs = tokenizer(batch, return_tensors="pt", padding=True)
        ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return [re.split(r"[.\n]", text.strip())[0] for text in texts]


def normalise(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces."""
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())
