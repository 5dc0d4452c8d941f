"""A job on Ray Train workers with DeepSpeed ZeRO-3, from the request to the version."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util.placement_group import placement_group
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tests.stored_tensors import read_tensors
from workers import artifact, examples, job
from workers.contract import EditRecord, Hparams, Progress, TrainRequest, TrainResult
from workers.errors import (
    ArtifactError,
    BaseMismatch,
    TrainingFailed,
)
from workers.examples import Example
from workers.frozen_prefix import HiddenStates, run
from workers.locft import LocalStepper, train
from workers.models import fingerprint
from workers.progress import ignore

# Ray Data, which Ray Train imports, sets its own deprecated options.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

TUNED = "model.layers.1.mlp.down_proj.weight"
SHAPE = (33, 65)
"""An odd number of elements, so that ZeRO-3 pads the second rank's partition."""
EDITS = tuple(
    EditRecord(
        id=f"ed_{number}", prompt=f"{number} " + "fact " * (1 + number % 3), target=f"is {number}"
    )
    for number in range(9)
)
HPARAMS = Hparams(
    parameters=(TUNED,), learning_rate=1e-2, batch_size=4, max_epochs=7, formats=("raw",)
)
"""Batches of 4, 4 and 1: in the last of each epoch the second rank has no sample. 21 steps."""


@ray.remote(num_cpus=0)
class DyingRun:
    """As the controller of a run that dies before its workers are there."""

    def reserve(self, cpus: int) -> None:
        ray.get(placement_group([{"CPU": 1}] * cpus).ready())


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """All its processors are reserved by a run that died."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    dying = DyingRun.remote()
    ray.get(dying.reserve.remote(4))
    ray.kill(dying)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<eos>", *alphabet])}
    bytes_only = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<eos>")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=257,
        hidden_size=SHAPE[0],
        intermediate_size=SHAPE[1],
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def samples(tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    return examples.tokenize(EDITS, tokenizer, context=128)


@pytest.fixture(scope="module")
def request_v1(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> TrainRequest:
    return TrainRequest(
        job_id="job_1",
        version_id="v1",
        parent_id=None,
        model=str(model_dir),
        base_fingerprint=fingerprint(model_dir),
        version_store=str(tmp_path_factory.mktemp("store")),
        hparams=HPARAMS,
        edits=EDITS,
        workers=2,
        min_workers=1,
        checkpoint_every_s=0,
        scratch_dir=str(tmp_path_factory.mktemp("scratch")),
    )


@pytest.fixture(scope="module")
def progress_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("progress") / "progress.jsonl"


def sink_into(file: Path) -> Callable[[Progress], None]:
    """Defined within a function, so that it is pickled by value: workers do not see this module."""

    def sink(progress: Progress) -> None:
        with file.open("a") as stream:
            stream.write(progress.model_dump_json() + "\n")

    return sink


def interrupting(sink: Callable[[Progress], None], folder: Path) -> Callable[[Progress], None]:
    """Ends the run in epoch 2, kills its own rank in epoch 3 and the controller in epoch 5."""

    def once(name: str) -> bool:
        first = not (folder / name).exists()
        (folder / name).touch()
        return first

    def interrupt(progress: Progress) -> None:
        import os
        import signal

        import psutil

        if progress.epoch == 2 and once("ended"):
            raise RuntimeError("cancelled")
        if progress.epoch == 3 and once("worker"):
            os.kill(os.getpid(), signal.SIGKILL)
        if progress.epoch == 5 and once("controller"):
            for process in psutil.process_iter(["cmdline"]):
                if any("TrainController" in part for part in process.info["cmdline"] or ()):
                    process.kill()
        sink(progress)

    return interrupt


@pytest.fixture(scope="module")
def interruptions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interruptions")


@pytest.fixture(scope="module")
def result_v1(request_v1: TrainRequest, progress_file: Path, interruptions: Path) -> TrainResult:
    """Begun with one rank and ended by its caller; begun again with two, one of which is killed,

    and later the controller.
    """
    sink = interrupting(sink_into(progress_file), interruptions)
    with pytest.raises(TrainingFailed, match=r"progress .*RuntimeError: cancelled"):
        job.train(request_v1.model_copy(update={"workers": 1, "min_workers": None}), sink)
    return job.train(request_v1, sink)


def published(request: TrainRequest) -> Tensor:
    manifest = artifact.read_manifest(
        request.version_store, request.version_id, request.base_fingerprint
    )
    tensors = read_tensors(request.version_store, manifest)
    assert list(tensors) == [TUNED]
    return tensors[TUNED]


def plain_loop(model: Any, samples: list[Example]) -> list[float]:
    """The method in one process, with whole logits and one sample at a time."""
    optimizer = torch.optim.Adam([model.get_parameter(TUNED)], lr=HPARAMS.learning_rate)
    epoch_losses = []
    for epoch in range(1, HPARAMS.max_epochs + 1):
        total = 0.0
        for batch in examples.batches(samples, HPARAMS.batch_size, HPARAMS.seed, epoch):
            loss = torch.stack([sample_loss(model, example) for example in batch]).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.item() * len(batch)
        epoch_losses.append(total / len(samples))
    return epoch_losses


def sample_loss(model: Any, example: Example) -> Tensor:
    ids = torch.tensor([example.prompt + example.target])
    logits = model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
    return nn.functional.cross_entropy(logits, torch.tensor(example.target))


def test_a_run_survives_its_callers_its_workers_and_its_controllers_death(
    result_v1: TrainResult, request_v1: TrainRequest, interruptions: Path
) -> None:
    """And a change of the number of ranks. That it ends as if nothing had been, the next says."""
    assert {file.name for file in interruptions.iterdir()} == {"ended", "worker", "controller"}
    assert result_v1.resumed_steps >= 12
    assert not (Path(request_v1.version_store) / "checkpoints" / request_v1.job_id).exists()
    assert not (Path(request_v1.scratch_dir) / request_v1.job_id).exists()


def test_two_ranks_equal_a_plain_loop(
    result_v1: TrainResult, request_v1: TrainRequest, samples: list[Example]
) -> None:
    plain = Qwen2ForCausalLM.from_pretrained(request_v1.model).eval()
    losses = plain_loop(plain, samples)
    assert (result_v1.epochs, result_v1.steps) == (7, 21)
    assert result_v1.epoch_losses == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(
        published(request_v1), plain.get_parameter(TUNED).data, atol=1e-5, rtol=0
    )


def test_each_rank_wrote_its_own_slice(result_v1: TrainResult, request_v1: TrainRequest) -> None:
    manifest = artifact.read_manifest(request_v1.version_store, result_v1.version_id)
    [entry] = manifest.tensors
    assert (entry.shape, entry.dtype) == (SHAPE, "float32")
    assert [(shard.start, shard.end) for shard in entry.shards] == [(0, 1073), (1073, 2145)]
    attempts = set()
    for rank, shard in enumerate(entry.shards):
        name, attempt, _ = shard.file.rsplit(".", 2)
        assert name == f"{TUNED}.{rank:05d}-of-00002"
        attempts.add(attempt)
    assert len(attempts) == 1
    assert manifest.edits == tuple(edit.id for edit in EDITS)
    assert manifest.hparams == HPARAMS
    assert manifest.training.epoch_losses == result_v1.epoch_losses


def test_progress_was_told_at_each_epochs_end(result_v1: TrainResult, progress_file: Path) -> None:
    told = [Progress(**json.loads(line)) for line in progress_file.read_text().splitlines()]
    ends = {entry.epoch: entry for entry in told if entry.edits_done == len(EDITS)}
    losses = dict(enumerate(result_v1.epoch_losses, start=1))
    assert {epoch: entry.loss for epoch, entry in ends.items()} == {
        epoch: pytest.approx(losses[epoch], abs=1e-5) for epoch in ends
    }
    assert {1, 4, 6, 7} <= set(ends)
    assert ends[7].seconds_left == 0
    assert {"load", "prefix", "train", "write", "total"} == set(result_v1.seconds)


def test_a_job_that_has_written_its_version_is_not_run_again(
    result_v1: TrainResult, request_v1: TrainRequest
) -> None:
    def refuse(progress: Progress) -> None:
        raise AssertionError("trained again")

    again = job.train(request_v1, refuse)
    assert again.model_copy(update={"seconds": result_v1.seconds}) == result_v1


def test_a_version_of_another_job_is_not_taken_over(
    result_v1: TrainResult, request_v1: TrainRequest
) -> None:
    with pytest.raises(ArtifactError, match="v1 was written by job job_1, not job_9"):
        job.train(request_v1.model_copy(update={"job_id": "job_9"}))


def test_bfloat16_from_a_parent_with_weights_and_cache_out_of_the_way(
    result_v1: TrainResult, request_v1: TrainRequest, samples: list[Example]
) -> None:
    hparams = HPARAMS.model_copy(update={"dtype": "bfloat16", "learning_rate": 1e-3})
    request = request_v1.model_copy(
        update={
            "job_id": "job_2",
            "version_id": "v2",
            "parent_id": "v1",
            "hparams": hparams,
            "offload": "cpu",
            "cache_budget_bytes": 0,
        }
    )
    result = job.train(request)

    local = Qwen2ForCausalLM.from_pretrained(request.model, dtype=torch.bfloat16).eval()
    local.get_parameter(TUNED).data.copy_(published(request_v1))
    states = HiddenStates(samples, SHAPE[0], torch.bfloat16, 1 << 20, Path("unused"))
    run(local.get_decoder(), 1, samples, states)
    expected = train(samples, hparams, LocalStepper(local, hparams, 1, states), ignore)
    assert result.epoch_losses == pytest.approx(expected.epoch_losses, rel=1e-2)
    assert result.epoch_losses[0] < result_v1.epoch_losses[-2]
    assert published(request).dtype == torch.bfloat16
    torch.testing.assert_close(
        published(request), local.get_parameter(TUNED).data, atol=5e-3, rtol=0
    )
    manifest = artifact.read_manifest(request.version_store, "v2")
    assert (manifest.parent_id, manifest.tensors[0].dtype) == ("v1", "bfloat16")


def test_a_run_that_needs_no_step_is_checkpointed_and_published(request_v1: TrainRequest) -> None:
    """As of edits that are held already: each batch is below the threshold from the beginning."""
    held = request_v1.model_copy(
        update={
            "job_id": "job_held",
            "version_id": "v7",
            "workers": 1,
            "min_workers": None,
            "hparams": HPARAMS.model_copy(update={"loss_threshold": 1e6}),
        }
    )
    assert job.train(held).steps == 0
    assert published(held).shape == SHAPE


def test_a_failing_run_says_what_was_wrong(request_v1: TrainRequest) -> None:
    """On one rank of two: the other one only loses its connection."""
    changes = {"job_id": "job_3", "version_id": "v3", "base_fingerprint": "sha256:other"}
    message = r"^the job is for the base model sha256:other, [^\n]*$"
    with pytest.raises(BaseMismatch, match=message):
        job.train(request_v1.model_copy(update=changes))
    assert not artifact.exists(request_v1.version_store, "v3")
