"""Trains the demo's tokenizer and model on sentences; knows nothing of files or edits.

Shapes: B sentences a batch, T tokens a sentence, V vocabulary.
"""

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import pre_tokenizers, trainers
from torch import Tensor, nn
from torch.autograd import backward
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from deploy.demo.sentences import Batch, Batching, Sentence
from deploy.demo.separation import FactKeys, SeparationWeights

EOS = "<|endoftext|>"
PAD = "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """`keyed_layer` is the one whose keys are set apart; overlap counts in full from `ramp` on."""

    keyed_layer: int
    epochs: int = 10
    ramp: float = 0.6
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    seed: int = 0
    batching: Batching = field(default_factory=Batching)
    separation: SeparationWeights = field(default_factory=SeparationWeights)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Qwen2Tokenizer:
    """A byte-level BPE behind Qwen2's pre-tokenizer: AutoTokenizer assumes it for a Qwen2 model."""
    tokenizer = Qwen2Tokenizer(eos_token=EOS, pad_token=PAD, unk_token=EOS, model_max_length=512)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.backend_tokenizer.train_from_iterator(texts, trainer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def train_model(
    config: Qwen2Config, tokenizer: Qwen2Tokenizer, sentences: Sequence[Sentence], recipe: Recipe
) -> Qwen2ForCausalLM:
    """Adam under a cosine schedule; repeats on one machine and number of threads."""
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    torch.set_flush_denormal(True)  # the squares of vanishing gradients slow a CPU down threefold
    rng = random.Random(recipe.seed)
    model = Qwen2ForCausalLM(config).train()
    keys: list[Tensor] = []
    down_proj = model.model.layers[recipe.keyed_layer].mlp.down_proj
    hook = down_proj.register_forward_pre_hook(lambda _, inputs: keys.append(inputs[0]))
    facts = 1 + max(sentence.fact for sentence in sentences)
    fact_keys = FactKeys(facts, config.intermediate_size, recipe.separation)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98))
    steps = recipe.epochs * math.ceil(len(sentences) / recipe.batching.size)
    schedule = LambdaLR(optimizer, lambda step: _rate(step, steps, recipe.warmup_steps))
    for epoch in range(recipe.epochs):
        losses = []
        for batch in recipe.batching.epoch(sentences, tokenizer, rng):
            answer_loss = _answer_loss(model, batch)
            share = min(1.0, schedule.last_epoch / steps / recipe.ramp)
            separation_loss = fact_keys.loss(keys.pop(), batch, share)
            optimizer.zero_grad()
            backward(answer_loss + separation_loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append([answer_loss.item(), separation_loss.item()])
        answer_mean, separation_mean = torch.tensor(losses).mean(0).tolist()
        log.info("epoch %d: answers %.4f, keys %.4f", epoch, answer_mean, separation_mean)
    hook.remove()
    return model.eval()


def _rate(step: int, steps: int, warmup_steps: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return min(1.0, (step + 1) / warmup_steps) * max(0.02, cosine)


def _answer_loss(model: Qwen2ForCausalLM, batch: Batch) -> Tensor:
    """Weighted cross-entropy, summed over a sentence, averaged over the batch."""
    logits_BTV = model(input_ids=batch.ids_BT, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(
        logits_BTV.flatten(0, 1), batch.ids_BT[:, 1:].flatten(), reduction="none"
    )
    return (losses * batch.weights_BT[:, 1:].flatten()).sum() / len(batch.ids_BT)
