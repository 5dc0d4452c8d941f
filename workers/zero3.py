"""LocFT-BF's step under DeepSpeed ZeRO-3: the model's weights and the optimizer over many ranks.

Knows the process group and partitions, not the loop (`locft`) nor files (`artifact`). DeepSpeed is
imported in the functions, never with this module: imported in a Ray driver it breaks its pickling.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from workers.contract import DType, Hparams
from workers.errors import BadHparams
from workers.examples import Batch, Example, collate
from workers.locft import SampleLosses, adam, freeze
from workers.models import ModelFacts

ReadSlice = Callable[[str, int, int], Tensor]
"""Elements `[start, end)` of the named parameter, flat."""


@dataclass(frozen=True)
class TunedSlice:
    """This rank's part of a tuned parameter: `flat` holds its elements from `start`, unpadded."""

    name: str
    shape: tuple[int, ...]
    start: int
    flat: Tensor


def config(dtype: DType) -> dict[str, Any]:
    """DeepSpeed's configuration: stage 3, every parameter partitioned, reductions in float32."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "contiguous_gradients": True,
        },
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
    }


def load(facts: ModelFacts, hparams: Hparams) -> Any:
    """The base model, never whole on any rank, with all but the tuned parameters frozen.

    Raises `UnknownParameter` if a name in `hparams.parameters` is not the model's.
    """
    import deepspeed
    import transformers
    from transformers.integrations import HfDeepSpeedConfig

    # Used in inference only, yet compiled at start: a minute, and a compiler that may not be there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    architecture = getattr(transformers, facts.architecture)
    # zero.Init patches tensor constructors, which breaks modules first imported within it.
    importlib.import_module("torch._dynamo.polyfills.loader")
    # Loading is partitioned for as long as this object lives.
    partitioned = HfDeepSpeedConfig(config(hparams.dtype))
    model = architecture.from_pretrained(facts.path, dtype=getattr(torch, hparams.dtype))
    del partitioned
    freeze(model, hparams.parameters)
    return model


def overwrite(model: Any, names: Iterable[str], read_slice: ReadSlice) -> None:
    """Sets tuned parameters from a parent version; each rank reads only its own elements.

    To be called before the `Zero3Stepper` is made, which copies them. Raises `BadHparams` if one
    of `names` is not tuned: the new version would hold the base model's value of it again.
    """
    tuned = dict(_tuned(model))
    for name in names:
        if name not in tuned:
            raise BadHparams(
                f"hparams.parameters: the parent version changed {name}, which this job does not "
                "tune; tune the same parameters, or rebuild from the base"
            )
        start, end = _bounds(tuned[name])
        tuned[name].ds_tensor.data[: end - start].copy_(read_slice(name, start, end))


def tuned_slices(model: Any) -> Iterator[TunedSlice]:
    """This rank's part of every tuned parameter, in the model's dtype; no rank gathers the whole.

    A rank whose part is padding only gives none for that parameter.
    """
    for name, parameter in _tuned(model):
        start, end = _bounds(parameter)
        if start < end:
            flat = parameter.ds_tensor.data[: end - start]
            yield TunedSlice(name, tuple(parameter.ds_shape), start, flat)


def _tuned(model: Any) -> list[tuple[str, Any]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def _bounds(parameter: Any) -> tuple[int, int]:
    """`[start, end)` of this rank's elements; ZeRO-3 pads the last ranks' partitions."""
    width = parameter.ds_tensor.numel()
    start = min(dist.get_rank() * width, parameter.ds_numel)
    return start, min(start + width, parameter.ds_numel)


class Zero3Stepper:
    """The step over all ranks: each takes its share of the same batch.

    The gradient is exactly that of the mean over the whole batch, however unequal the shares: a
    rank's loss is its sum over the batch's size, times the number of ranks, because ZeRO-3 averages
    over them. A rank without a share runs a sample of weight 0, so that all ranks gather alike.
    """

    def __init__(self, model: Any, hparams: Hparams) -> None:
        import deepspeed

        tuned = [weight for _, weight in _tuned(model)]
        self._engine, *_ = deepspeed.initialize(
            model=SampleLosses(model),
            optimizer=adam(tuned, hparams),
            model_parameters=tuned,
            config=config(hparams.dtype),
            dist_init_required=False,
        )
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._loss: Tensor | None = None

    def loss(self, batch: Sequence[Example]) -> float:
        share = batch[self._rank :: self._ranks]
        sample_losses_B = self._engine(_on(collate(share or batch[:1]), self._engine.device))
        local_sum = sample_losses_B.sum() * float(bool(share))
        self._loss = local_sum * (self._ranks / len(batch))
        total = local_sum.detach().clone()
        dist.all_reduce(total)
        return float(total.item()) / len(batch)

    def step(self) -> None:
        self._engine.backward(self._loss)
        self._engine.step()
        self._loss = None


def _on(batch: Batch, device: torch.device) -> Batch:
    return Batch(
        batch.input_ids_BT.to(device),
        batch.attention_mask_BT.to(device),
        batch.labels_BT.to(device),
    )
