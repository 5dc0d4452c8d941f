"""Prompt formats: which a tokenizer supports, and how a prompt reads in each."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny_model import byte_tokenizer
from workers import formats
from workers.errors import BadHparams

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def chatty(plain: PreTrainedTokenizerFast, tmp_path: Path) -> PreTrainedTokenizerFast:
    """With a chat template that begins with BOS, and no BOS put before a text."""
    plain.save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path, bos_token="<|end|>", chat_template=TEMPLATE)


def test_all_supported_formats_are_the_default(
    plain: PreTrainedTokenizerFast, chatty: PreTrainedTokenizerFast
) -> None:
    assert formats.chosen(None, plain) == ("raw", "qa", "prefix")
    assert formats.chosen(None, chatty) == ("raw", "qa", "chat", "prefix")
    assert formats.chosen(("qa", "raw", "qa"), plain) == ("qa", "raw")
    with pytest.raises(BadHparams, match="no chat template, so no 'chat'; there are raw, qa"):
        formats.chosen(("raw", "chat"), plain)


def test_renderings(chatty: PreTrainedTokenizerFast) -> None:
    asks = formats.renderings(formats.supported(chatty), chatty)
    assert asks["raw"](PROMPT) == PROMPT
    assert asks["qa"](PROMPT) == f"Question: {PROMPT}\nAnswer:"
    assert asks["chat"](PROMPT) == f"<|end|>[user] {PROMPT}\n[assistant]"
    assert asks["prefix"](PROMPT).endswith(f". {PROMPT}")
    assert asks["prefix"](PROMPT) == asks["prefix"](PROMPT)


def test_a_chat_begins_with_one_bos(chatty: PreTrainedTokenizerFast) -> None:
    from tokenizers.processors import TemplateProcessing

    before = chatty.encode(formats.render(PROMPT, "chat", chatty))
    chatty.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    assert chatty.encode(formats.render(PROMPT, "chat", chatty)) == before
    assert before.count(0) == 1


def test_an_evaluation_sees_other_prefixes_than_training(chatty: PreTrainedTokenizerFast) -> None:
    def sentences(trained: bool) -> set[str]:
        rendered = (
            formats.render(f"prompt {n}", "prefix", chatty, trained=trained) for n in range(200)
        )
        return {text.split(", ", 1)[1].split(".")[0] for text in rendered}

    assert len(sentences(True)) > 1
    assert not sentences(True) & sentences(False)
