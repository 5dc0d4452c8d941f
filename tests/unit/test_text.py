import pytest

from service.replica.text import Detokenizer, StopScanner
from tests.tiny_model import byte_tokenizer


def pieces(text: str, prompt: str = "the capital") -> list[str]:
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer, tokenizer(prompt)["input_ids"])
    return [detokenizer.add(token) for token in tokenizer(text)["input_ids"]]


def scan(pieces: list[str], *stops: str) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    out = ""
    for piece in pieces:
        out += scanner.add(piece)
        if scanner.stopped:
            return out, True
    return out + scanner.flush(), False


@pytest.mark.parametrize("text", [" of France", "Zürich", "日本語 🙂!", " é", "a\n b"])
def test_pieces_make_up_the_text(text: str) -> None:
    assert "".join(pieces(text)) == text


def test_no_piece_ends_in_half_a_character() -> None:
    assert [piece for piece in pieces("🙂🙂") if piece] == ["🙂", "🙂"]


def test_flush_gives_half_a_character_as_replacement() -> None:
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer, tokenizer("x")["input_ids"])
    first_byte = tokenizer("é")["input_ids"][0]
    assert detokenizer.add(first_byte) == ""
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_stop_string_is_cut_wherever_pieces_end(size: int) -> None:
    text = "one two three"
    chopped = [text[at : at + size] for at in range(0, len(text), size)]
    assert scan(chopped, "two") == ("one ", True)


def test_the_first_stop_string_wins() -> None:
    assert scan(["abcdef"], "ef", "cd") == ("ab", True)


def test_an_unfinished_stop_string_is_text() -> None:
    assert scan(["ab", "cd", "ce"], "cdx", "cex") == ("abcdce", False)


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopScanner(()).add("abc") == "abc"
