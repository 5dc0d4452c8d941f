"""A tiny random model with a tokenizer of its own; versions of it, published and registered."""

from datetime import UTC, datetime
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from service.edits import NewEdit
from service.replica.fetching import Fetcher
from service.store import edits, jobs, versions
from service.store.database import Database
from workers.artifact import Lineage, Manifest, write_manifest, write_slice
from workers.contract import Hparams, TrainResult
from workers.slices import Writer

TUNED = "model.layers.1.mlp.down_proj.weight"
SHAPE = (64, 128)
BYTES = SHAPE[0] * SHAPE[1] * 4
CONTEXT = 512


def save_tiny_model(path: Path) -> Path:
    """Qwen2, 3 layers; byte-level, so its random answers are full of broken characters."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=SHAPE[0],
        intermediate_size=SHAPE[1],
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding over all bytes; `<|end|>` is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the capital of France is Paris"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def tuned_tensor(seed: int) -> torch.Tensor:
    """Another value for the tuned parameter, far from the model's own."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.5


def publish(store: str, version_id: str, base_fingerprint: str) -> Manifest:
    """Write a version whose tuned tensor is drawn from its number, as two ranks would."""
    flat = tuned_tensor(int(version_id[1:])).flatten()
    half = flat.numel() // 2
    slices = [
        write_slice(
            store,
            version_id,
            TUNED,
            SHAPE,
            rank * half,
            flat[rank * half :][:half],
            Writer(rank, 2, "test"),
        )
        for rank in range(2)
    ]
    lineage = Lineage(
        version_id=version_id,
        parent_id=None,
        job_id="job_test",
        base_fingerprint=base_fingerprint,
        hparams=Hparams(parameters=(TUNED,), learning_rate=1e-3),
        edits=("ed_test",),
        training=TrainResult(
            version_id=version_id, epochs=1, steps=1, epoch_losses=(0.0,), seconds={}
        ),
        created_at=datetime.now(UTC),
    )
    return write_manifest(store, lineage, slices)


def stored(store: str, base_fingerprint: str) -> Fetcher:
    """The versions published in a local folder."""
    return Fetcher(
        store,
        base_fingerprint,
        Path(store) / "cache",
        cache_bytes=1 << 30,
        timeout_s=5.0,
        attempts=1,
    )


async def register(database: Database, base_fingerprint: str, *version_ids: str) -> None:
    """Make the base v0, live, and these versions published, as their jobs would."""
    async with database.transaction() as conn:
        await versions.ensure_base(conn, base_fingerprint)
        for version_id in version_ids:
            await edits.add(conn, [NewEdit(f"the fact of {version_id} is", "new")])
            job = await jobs.create(conn)
            await versions.publish(
                conn,
                version_id=version_id,
                parent_id="v0",
                job_id=job.id,
                base_fingerprint=base_fingerprint,
                metrics={},
            )
