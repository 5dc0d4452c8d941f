"""From token ids to text, piece by piece. Knows tokenizers and strings, nothing of models."""

from collections.abc import Sequence
from typing import Protocol

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 6


class Decoder(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    def decode(
        self,
        token_ids: list[int],
        skip_special_tokens: bool = ...,
        clean_up_tokenization_spaces: bool = ...,
    ) -> str: ...


def token_text(tokenizer: Decoder, token: int) -> str:
    """One token alone; by its id where it is only part of a character."""
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return f"token_id:{token}" if INCOMPLETE in text else text


class Detokenizer:
    """Decodes a growing answer.

    A token's text depends on the tokens before it (a leading space, half a character), so each
    piece is what the text has grown by when decoded after its neighbours, the prompt's end
    included. A piece is held back while it ends in an incomplete character.
    """

    def __init__(self, tokenizer: Decoder, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-CONTEXT_TOKENS:])
        self._start = 0
        self._told = len(self._tokens)
        """Tokens before it are in the text already given out."""

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._tokens.append(token)
        piece = self._piece()
        if not piece or piece.endswith(INCOMPLETE):
            return ""
        self._start, self._told = self._told, len(self._tokens)
        return piece

    def flush(self) -> str:
        """What was held back: an answer that ends in half a character ends in U+FFFD."""
        return self._piece()

    def _piece(self) -> str:
        told = self._decode(self._tokens[self._start : self._told])
        return self._decode(self._tokens[self._start :])[len(told) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class StopScanner:
    """Cuts text before the first stop string, wherever pieces and tokens begin and end."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """The text that no stop string can take back; after it, see `stopped`."""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back: it was no stop string after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
