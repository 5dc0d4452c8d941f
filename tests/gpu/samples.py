"""Made-up edits of CounterFact's lengths, as tokens of any vocabulary.

A CounterFact prompt has 7 words on average, few less than 4 or more than 12, and its target mostly
one. At an assumed 1.4 tokens a word, as byte-pair encodings of large models have for names, that
is a prompt of 10 ± 3 tokens and a target of 1 to 3 with EOS after it.
"""

import random

from workers.examples import Example

EOS = 0


def synthetic(count: int, vocabulary: int, seed: int = 0) -> list[Example]:
    """The same `count` samples for the same vocabulary; no two are alike but by chance."""
    draw = random.Random(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, vocabulary) for _ in range(length))

    return [
        Example(
            index=index,
            edit_id=f"ed_{index}",
            prompt=tokens(min(max(round(draw.gauss(10, 3)), 4), 24)),
            target=(*tokens(draw.randint(1, 3)), EOS),
        )
        for index in range(count)
    ]
