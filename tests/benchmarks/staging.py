"""Bringing an edited tensor of a 72B model from the version store into a replica.

    python -m tests.benchmarks.staging [--json FILE]

The tensor is Qwen2.5-72B's down-projection (8192 x 29568, bfloat16, 484 MB) in eight shards, as
eight ranks publish it. Measured is what a replica does with it: read from a local store, verify
each shard and the whole, and copy it into the module that is to use it; beside a plain read of the
same files, and the hash of the same bytes on one thread. Then the same from S3 by way of the
node's cache, once by the replica that downloads and once by one that finds it there; the S3 server
is moto, in this process. All files are in the page cache; medians.
"""

import hashlib
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import torch
from torch import Tensor, nn

from service.replica.fetching import Fetcher
from tests.benchmarks.report import Report, main
from workers.artifact import Lineage, Manifest, write_manifest, write_slice
from workers.contract import Hparams, TrainResult
from workers.slices import Writer

NAME = "model.layers.40.mlp.down_proj.weight"
SHAPE = (8192, 29568)
RANKS = 8
RUNS = 3
FINGERPRINT = "f" * 64


def measure() -> Report:
    report = Report("Staging a tensor of 484 MB (8192 x 29568, bfloat16, 8 shards)")
    tensor = torch.randn((SHAPE[0] // RANKS, SHAPE[1])).bfloat16().repeat(RANKS, 1)
    holder = nn.Linear(SHAPE[1], SHAPE[0], bias=False, device="meta", dtype=torch.bfloat16)
    holder.to_empty(device="cpu")
    with tempfile.TemporaryDirectory(prefix="errata-") as temporary:
        store = f"{temporary}/store"
        manifest = publish(store, tensor)
        files = [Path(store) / "versions/v1" / s.file for s in manifest.tensors[0].shards]
        measure_local(report, store, files, holder)
        assert torch.equal(holder.weight, tensor)
        nn.init.zeros_(holder.weight)
        with s3_server():
            fsspec.filesystem("s3").mkdir("benchmark")
            publish("s3://benchmark/store", tensor)
            measure_s3(report, "s3://benchmark/store", Path(temporary), holder)
        assert torch.equal(holder.weight, tensor)
    report.details = {"runs": RUNS, "bytes": manifest.bytes, "shards": RANKS}
    return report


def measure_local(report: Report, store: str, files: list[Path], holder: nn.Linear) -> None:
    source = fetcher(store, Path("unused"))

    def hash_files() -> None:
        for file in files:
            hashlib.sha256(file.read_bytes()).digest()

    plain_s = seconds(lambda: [file.read_bytes() for file in files])
    add(report, "plain read of the files", plain_s)
    add(report, "plain read and one sha256, one thread", seconds(hash_files))
    fetch_s = seconds(lambda: fetch(source))
    add(report, "local store: read and verify", fetch_s)
    report.add("local store: read and verify, over the plain read", fetch_s / plain_s, "x")
    add(
        report,
        "local store: read, verify, copy into the module",
        seconds(lambda: stage(source, holder)),
    )


def measure_s3(report: Report, store: str, temporary: Path, holder: nn.Linear) -> None:
    caches = iter(temporary / f"cache-{number}" for number in range(RUNS + 1))
    add(
        report,
        "S3, the node's first replica: download, verify, copy",
        seconds(lambda: stage(fetcher(store, next(caches)), holder)),
    )
    add(
        report,
        "S3, its second replica: verify, copy",
        seconds(lambda: stage(fetcher(store, temporary / "cache-0"), holder)),
    )


def fetcher(store: str, cache: Path) -> Fetcher:
    return Fetcher(store, FINGERPRINT, cache, cache_bytes=1 << 40, timeout_s=60.0, attempts=2)


def fetch(source: Fetcher) -> Tensor:
    [(_, tensor)] = source.tensors(source.manifest("v1"))
    return tensor


def stage(source: Fetcher, holder: nn.Linear) -> None:
    with torch.no_grad():
        holder.weight.copy_(fetch(source))


def seconds(work: Callable[[], object]) -> float:
    """The median; a run before warms up."""
    work()
    taken = []
    for _ in range(RUNS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def add(report: Report, name: str, taken_s: float) -> None:
    report.add(name, taken_s, "s")
    report.add(f"{name}: rate", 2 * SHAPE[0] * SHAPE[1] / taken_s / 1e9, "GB/s")


def publish(store: str, tensor: Tensor) -> Manifest:
    width = tensor.numel() // RANKS
    pieces = [
        write_slice(store, "v1", NAME, SHAPE, rank * width, flat, Writer(rank, RANKS, "test"))
        for rank, flat in enumerate(torch.split(tensor.flatten(), width))
    ]
    training = TrainResult(version_id="v1", epochs=1, steps=1, epoch_losses=(0.0,), seconds={})
    lineage = Lineage(
        version_id="v1",
        parent_id=None,
        job_id="job_benchmark",
        base_fingerprint=FINGERPRINT,
        hparams=Hparams(parameters=(NAME,), learning_rate=1e-3),
        edits=("ed_benchmark",),
        training=training,
        created_at=datetime.now(UTC),
    )
    return write_manifest(store, lineage, pieces)


@contextmanager
def s3_server() -> Iterator[None]:
    """moto's, where the environment then points."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }
    try:
        yield
    finally:
        server.stop()


if __name__ == "__main__":
    main(measure, __doc__)
