"""Prompt formats: the same question put to the model in several ways. Text in, text out.

Torch-free. Knows the tokenizer's chat template, not how text becomes tokens.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from workers.contract import Format
from workers.errors import BadHparams


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that is used."""

    chat_template: Any
    bos_token: str | None
    bos_token_id: int | None

    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> list[int]: ...

    def apply_chat_template(self, conversation: Any, /, **options: Any) -> Any: ...


Renderings = Mapping[Format, Callable[[str], str]]
"""How a prompt is put in each chosen format; the first one decides whether an edit is applied."""

RAW: Renderings = {"raw": str}

_OPENINGS = ("Yesterday", "Last spring", "Before noon", "In the end", "As usual", "Some time ago")
_CALM = ("the harbour was quiet", "it rained for hours", "the shops stayed open late")
_BUSY = ("the train left on time", "a long letter arrived", "nobody had noticed the clock")


def supported(tokenizer: ChatTokenizer) -> tuple[Format, ...]:
    """The formats a model with this tokenizer can be asked in; the first is the paper's."""
    if tokenizer.chat_template is None:
        return ("raw", "qa", "prefix")
    return ("raw", "qa", "chat", "prefix")


def chosen(wanted: Sequence[Format] | None, tokenizer: ChatTokenizer) -> tuple[Format, ...]:
    """`wanted` without repeats, or all that are supported.

    Raises `BadHparams` if one of them is not.
    """
    possible = supported(tokenizer)
    if wanted is None:
        return possible
    for name in wanted:
        if name not in possible:
            raise BadHparams(
                f"hparams.formats: the model's tokenizer has no chat template, so no {name!r}; "
                f"there are {', '.join(possible)}"
            )
    return tuple(dict.fromkeys(wanted))


def renderings(names: Sequence[Format], tokenizer: ChatTokenizer) -> Renderings:
    """What an evaluation asks in each of the formats `names`."""
    return {name: partial(render, format=name, tokenizer=tokenizer) for name in names}


def render(prompt: str, format: Format, tokenizer: ChatTokenizer, *, trained: bool = False) -> str:
    """`prompt` as it is put to the model in `format`.

    `prefix` draws unrelated text by the prompt; that which training sees (`trained`) and that
    which an evaluation sees have no sentence in common.
    """
    if format == "qa":
        return f"Question: {prompt}\nAnswer:"
    if format == "prefix":
        return f"{_unrelated(prompt, _BUSY if trained else _CALM)} {prompt}"
    if format == "chat":
        return _chat(prompt, tokenizer)
    return prompt


def _unrelated(prompt: str, happenings: Sequence[str]) -> str:
    chance = random.Random(prompt)
    return f"{chance.choice(_OPENINGS)}, {chance.choice(happenings)}."


def _chat(prompt: str, tokenizer: ChatTokenizer) -> str:
    turn = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    if tokenizer.bos_token is not None and _begins_texts(tokenizer):
        return text.removeprefix(tokenizer.bos_token)
    return text


def _begins_texts(tokenizer: ChatTokenizer) -> bool:
    """Whether the tokenizer puts BOS before every text, so before one from a template too."""
    return tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
