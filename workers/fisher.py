"""The diagonal Fisher score: how much a loss depends on a layer's weights, before any training.

"On Surgical Fine-tuning for Language Encoders" (arXiv 2310.17041): the empirical Fisher
information's diagonal is the mean over the samples of the squared gradient of log p(y | x); a
parameter's score is the Frobenius norm of its diagonal, a module's the sum over its parameters.
Here log p is averaged over the answer's tokens, as in the method's loss.

A module never scores less than a part of it, so scores compare layers, not kinds of module.
"""

from collections.abc import Sequence
from typing import Any

import torch

from workers.examples import Example, pack
from workers.frozen_prefix import HiddenStates
from workers.locft import Suffix, freeze


def scores(
    model: Any, depth: int, examples: Sequence[Example], states: HiddenStates
) -> dict[str, float]:
    """The score of each parameter of layer `depth`, by name.

    `states` holds the output of the layers below it. One backward pass per sample; takes twice the
    layer's weights in float32.
    """
    tuned = freeze(model, [f"model.layers.{depth}"])
    suffix = Suffix(model, depth)
    weights = list(tuned.values())
    squares = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    for example in examples:
        hidden_TD = states.of([example]).to(weights[0].device)
        [loss] = suffix(hidden_TD, pack([example]).to(weights[0].device))
        for square, gradient in zip(squares, torch.autograd.grad(loss, weights), strict=True):
            square.addcmul_(gradient.float(), gradient.float())
    norms = [(square / len(examples)).norm().item() for square in squares]
    return dict(zip(tuned, norms, strict=True))
