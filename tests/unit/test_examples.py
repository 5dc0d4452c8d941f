"""Prompt and target as tokens, loss mask and batches."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from workers import examples
from workers.contract import Anchor, EditRecord
from workers.errors import TrainingFailed
from workers.examples import Example

CONTEXT = 128


def edit(prompt: str = "ab", target: str = "cd", edit_id: str = "ed_1") -> EditRecord:
    return EditRecord(id=edit_id, prompt=prompt, target=target)


def test_target_follows_a_space_and_ends_with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    [example] = examples.tokenize([edit()], tokenizer, CONTEXT)
    assert list(example.prompt) == tokenizer.encode("ab")
    assert list(example.target) == [*tokenizer.encode(" cd"), tokenizer.eos_token_id]


def test_a_space_that_is_there_is_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    spaced, bare = examples.tokenize([edit(target=" cd"), edit(target="cd")], tokenizer, CONTEXT)
    assert (spaced.prompt, spaced.target) == (bare.prompt, bare.target)


def words(
    post_processor: processors.TemplateProcessing | None = None,
) -> PreTrainedTokenizerFast:
    """Begins every text with a space of its own, as SentencePiece models do."""
    vocab = {token: number for number, token in enumerate(["<bos>", "<eos>", "<unk>", "▁", "▁a"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    backend.decoder = decoders.Metaspace()
    if post_processor is not None:
        backend.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_no_extra_token_where_the_tokenizer_begins_texts_with_a_space() -> None:
    [example] = examples.tokenize([edit("a", "a")], words(), CONTEXT)
    assert (example.prompt, example.target) == ((4,), (4, 1))


def test_bos_only_before_the_prompt_and_eos_only_after_the_target() -> None:
    both = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    [example] = examples.tokenize([edit("a a", "a")], words(both), CONTEXT)
    assert (example.prompt, example.target) == ((0, 4, 4), (4, 1))


def test_target_alone_where_the_whole_would_merge_over_the_boundary() -> None:
    vocab = {token: number for number, token in enumerate(["<eos>", "a", " ", "b", "a b", "a "])}
    merging = Tokenizer(models.BPE(vocab=vocab, merges=[("a", " "), ("a ", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="<eos>")
    [example] = examples.tokenize([edit("a", "b")], tokenizer, CONTEXT)
    assert (example.prompt, example.target) == ((1,), (2, 3, 0))


def test_several_samples_share_a_row_and_only_targets_are_learnt() -> None:
    batch = examples.pack([Example(0, "1", (5, 6, 7), (8, 9)), Example(1, "2", (5,), (6, 9))])
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 5, 6]
    assert batch.cell_T.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.position_ids_RC.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.learnt_from_N.tolist() == [2, 3, 4, 5]
    assert batch.next_N.tolist() == [8, 9, 6, 9]
    assert batch.sample_N.tolist() == [0, 0, 1, 1]
    assert batch.counts_B.tolist() == [2, 2]


def test_a_row_is_as_long_as_the_longest_sample() -> None:
    lengths = [40, 90, 30, 20, 61]
    samples = [Example(n, str(n), (1,) * length, (2,)) for n, length in enumerate(lengths)]
    batch = examples.pack(samples)
    assert batch.position_ids_RC.shape == (3, 90)
    assert examples.pack(samples[:1] + samples[2:]).position_ids_RC.shape == (3, 61)
    assert len(set(batch.cell_T.tolist())) == sum(lengths)
    starts = batch.cell_T[batch.position_ids_RC.view(-1)[batch.cell_T] == 0]
    assert sorted(starts.tolist()) == [0, 90, 151, 180, 220]


def test_an_edit_is_a_sample_in_each_format_and_an_anchor_is_one(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    samples = examples.tokenize(
        [edit("ab", "cd")], tokenizer, CONTEXT, ("raw", "qa"), [Anchor(prompt="x", answer="y")]
    )
    texts = [(s.index, s.edit_id, tokenizer.decode(s.prompt + s.target)) for s in samples]
    end = tokenizer.eos_token
    assert texts == [
        (0, "ed_1", f"ab cd{end}"),
        (1, "ed_1", f"Question: ab\nAnswer: cd{end}"),
        (2, "anchor", f"x y{end}"),
    ]


def test_conflicting_edits_are_named_and_equal_ones_are_not_a_conflict(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    edits = [edit("a b", "c", "ed_1"), edit("A  b", "c", "ed_2"), edit("a b", "d", "ed_3")]
    assert len(examples.tokenize(edits[:2], tokenizer, CONTEXT)) == 2
    with pytest.raises(TrainingFailed, match="edits ed_1 and ed_3 have the same prompt 'a b'"):
        examples.tokenize(edits, tokenizer, CONTEXT)


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    samples = [Example(number, str(number), (1,), (2,)) for number in range(11)]

    def ids(seed: int, epoch: int) -> list[list[str]]:
        drawn = examples.batches(samples, 4, seed, epoch)
        return [[example.edit_id for example in batch] for batch in drawn]

    assert ids(0, 1) == ids(0, 1)
    assert len({str(ids(seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}) == 4
    assert [len(batch) for batch in ids(0, 1)] == [4, 4, 3]
    drawn = [edit_id for batch in ids(0, 1) for edit_id in batch]
    assert sorted(drawn) == sorted(example.edit_id for example in samples)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (edit(prompt="a" * 200), r"edit ed_1: .* 203 tokens, .* context of 128"),
        (edit(target="  "), r"edit ed_1: the target '  ' has no tokens"),
        (edit(prompt=""), r"edit ed_1: the prompt '' has no tokens"),
    ],
)
def test_bad_edits_are_named(
    tokenizer: PreTrainedTokenizerFast, bad: EditRecord, message: str
) -> None:
    with pytest.raises(TrainingFailed, match=message):
        examples.tokenize([bad], tokenizer, CONTEXT)


def test_a_tokenizer_without_eos_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(TrainingFailed, match="no EOS token"):
        examples.tokenize([edit()], tokenizer, CONTEXT)


def test_no_pad_token_is_needed(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.pad_token is None
    samples = examples.tokenize([edit("a", "b"), edit("a b c", "d")], tokenizer, CONTEXT)
    assert len(examples.pack(samples).counts_B) == 2
