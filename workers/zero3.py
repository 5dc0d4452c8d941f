"""LocFT-BF's step under DeepSpeed ZeRO-3: the model's weights and the optimizer over many ranks.

Knows the process group and partitions, not the loop (`locft`) nor how files are laid out. DeepSpeed
is imported in the functions, never with this module: imported in a Ray driver it breaks its
pickling. Shapes: T tokens, D hidden size, B samples.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workers import frozen_prefix, locft
from workers.base_weights import BaseWeights
from workers.checkpoint import Piece, Saved
from workers.contract import DType, Hparams, Offload
from workers.errors import BadHparams, UnsupportedModel
from workers.examples import Example, pack
from workers.frozen_prefix import HiddenStates, Skip
from workers.locft import Suffix, adam
from workers.models import ModelFacts

ReadSlice = Callable[[str, int, int], Tensor]
"""Elements `[start, end)` of the named parameter, flat."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


def config(dtype: DType, offload: Offload = "none", offload_dir: Path | None = None) -> Any:
    """DeepSpeed's configuration: stage 3, every parameter partitioned, reductions in float32."""
    stage: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        # Its buffer would take 2 GB of every rank, for gradients of a few tensors.
        "contiguous_gradients": False,
    }
    if offload != "none":
        stage["offload_param"] = {"device": offload, "pin_memory": torch.cuda.is_available()}
    if offload == "nvme":
        stage["offload_param"]["nvme_path"] = str(offload_dir)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": stage,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
    }


@dataclass
class PartitionedModel:
    """A base model whose weights come, partitioned over the ranks, when they are asked for.

    Starts as a skeleton without any; `bring` reads a module's from the checkpoint.
    """

    model: Any
    tuned: dict[str, nn.Parameter]
    depth: int
    """How many layers are frozen below all that is tuned."""
    settings: Any
    """DeepSpeed's configuration."""
    offload: Offload
    read: ReadSlice
    """The base model's weights."""

    @property
    def device(self) -> torch.device:
        from deepspeed.accelerator import get_accelerator

        return torch.device(get_accelerator().current_device_name())

    def bring(self, module: nn.Module) -> None:
        """Gives a module its weights: each rank reads only its own part of each parameter."""
        import deepspeed

        if any(buffer.is_meta for buffer in module.buffers()):
            raise UnsupportedModel(f"{type(module).__name__} has buffers of its own")
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        named = [(names[id(old)], path) for path, old in module.named_parameters()]
        module.to_empty(device=self.device)
        deepspeed.zero.Init(module=module, config_dict_or_path=self.settings)
        for name, path in named:
            parameter = module.get_parameter(path)
            self._fill(parameter, partial(self.read, name))
            if name in self.tuned:
                self.tuned[name] = parameter

    def _fill(self, parameter: Any, read: Callable[[int, int], Tensor]) -> None:
        """On NVMe a partition has no memory to copy into: one rank reads, and all write theirs."""
        import deepspeed

        if self.offload != "nvme":
            _fill(parameter, read)
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.flatten().copy_(read(0, parameter.ds_numel))

    @contextmanager
    def acquire(self, module: nn.Module) -> Iterator[None]:
        """The module's whole weights on every rank, within the block."""
        import deepspeed

        if next(module.parameters()).is_meta:
            self.bring(module)
        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            yield

    def release(self, layer: int) -> None:
        """Lets a layer's weights go for good."""
        self.model.get_decoder().layers[layer] = Skip()

    def suffix(self) -> Suffix:
        """All from the lowest tuned layer on, with its weights."""
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        for module in (*decoder.layers[self.depth :], decoder.norm, head):
            if next(module.parameters()).is_meta:
                self.bring(module)
        return Suffix(self.model, self.depth)


def open_model(
    facts: ModelFacts,
    hparams: Hparams,
    offload: Offload = "none",
    offload_dir: Path | None = None,
    depth: int | None = None,
) -> PartitionedModel:
    """The base model without weights yet, and with all but the tuned parameters frozen.

    `depth` takes less than all frozen layers for the prefix. Raises `UnknownParameter` if a name in
    `hparams.parameters` is not the model's.
    """
    import deepspeed
    import transformers

    # Used in inference only, yet compiled at start: a minute, and a compiler that may not be there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _require_nvme(offload)
    architecture = getattr(transformers, facts.architecture)
    model_config = transformers.AutoConfig.from_pretrained(facts.path)
    with torch.device("meta"):
        model = architecture._from_config(model_config, dtype=getattr(torch, hparams.dtype))
    tuned = locft.freeze(model, hparams.parameters)
    lowest = frozen_prefix.depth_of(tuned, facts.num_hidden_layers)
    opened = PartitionedModel(
        model=model,
        tuned=tuned,
        depth=lowest if depth is None else min(depth, lowest),
        settings=config(hparams.dtype, offload, offload_dir),
        offload=offload,
        read=BaseWeights(facts.path).read,
    )
    decoder = model.get_decoder()
    with torch.device(opened.device):
        decoder.rotary_emb = type(decoder.rotary_emb)(model_config)
    if model_config.tie_word_embeddings:
        opened.bring(decoder.embed_tokens)
        model.get_output_embeddings().weight = decoder.embed_tokens.weight
    return opened


def _require_nvme(offload: Offload) -> None:
    if offload != "nvme":
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise BadHparams(
            "offload: nvme needs DeepSpeed's asynchronous I/O, which needs libaio and a compiler; "
            "install libaio-dev and g++, or choose cpu or none"
        )


def fill_prefix(
    opened: PartitionedModel, examples: Sequence[Example], states: HiddenStates
) -> None:
    """Runs the frozen prefix over this rank's samples; each layer's weights come and go."""
    decoder = opened.model.get_decoder()
    frozen_prefix.run(
        decoder, opened.depth, examples, states, opened.acquire, opened.release, opened.device
    )
    if not opened.model.config.tie_word_embeddings:
        decoder.embed_tokens = Skip()


def overwrite(tuned: dict[str, nn.Parameter], names: Iterable[str], read_slice: ReadSlice) -> None:
    """Sets tuned parameters from a parent version; each rank reads only its own elements.

    To be called before the `Zero3Stepper` is made, which copies them. Raises `BadHparams` if one
    of `names` is not tuned: the new version would hold the base model's value of it again.
    """
    for name in names:
        if name not in tuned:
            raise BadHparams(
                f"hparams.parameters: the parent version changed {name}, which this job does not "
                "tune; tune the same parameters, or rebuild from the base"
            )
        _fill(tuned[name], partial(read_slice, name))


def tuned_slices(tuned: Mapping[str, Any]) -> Iterator[Piece]:
    """This rank's part of every tuned parameter, in the model's dtype; no rank gathers the whole.

    A rank whose part is padding only gives none for that parameter.
    """
    for name, parameter in tuned.items():
        yield from _piece(name, parameter, parameter.ds_tensor.data)


def _piece(name: str, parameter: Any, padded: Tensor) -> Iterator[Piece]:
    start, end = _bounds(parameter)
    if start < end:
        yield Piece(name, tuple(parameter.ds_shape), start, padded.flatten()[: end - start])


def _fill(parameter: Any, read: Callable[[int, int], Tensor]) -> None:
    start, end = _bounds(parameter)
    padded = parameter.ds_tensor.data
    padded[: end - start].copy_(read(start, end))
    padded[end - start :].zero_()


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

    def __init__(
        self, suffix: Suffix, opened: PartitionedModel, hparams: Hparams, states: HiddenStates
    ) -> None:
        """`states` holds the prefix's output for this rank's samples (`owned`)."""
        import deepspeed

        self._tuned, self._states = opened.tuned, states
        self._engine, *_ = deepspeed.initialize(
            model=suffix,
            optimizer=adam(opened.tuned.values(), hparams),
            model_parameters=list(opened.tuned.values()),
            config=opened.settings,
            dist_init_required=False,
        )
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._loss: Tensor | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self._engine.device
        return device

    def losses(self, batch: Sequence[Example]) -> list[float]:
        shares = _deal(batch, self._ranks)
        hidden_TD = self._exchange(batch, shares).to(self.device)
        mine = [batch[place] for place in shares[self._rank]]
        run = mine or batch[:1]
        if not mine:
            hidden_TD = hidden_TD.new_zeros(len(run[0]), self._states.width)
        losses_B = self._engine(hidden_TD, pack(run).to(self.device))
        self._loss = losses_B.sum() * (float(bool(mine)) * self._ranks / len(batch))
        everyones = torch.zeros(len(batch), device=self.device)
        if mine:
            everyones[torch.tensor(shares[self._rank])] = losses_B.detach()
        dist.all_reduce(everyones)
        found: list[float] = everyones.tolist()
        return found

    def step(self) -> None:
        self._engine.backward(self._loss)
        self._engine.step()
        self._loss = None

    def _exchange(self, batch: Sequence[Example], shares: Sequence[Sequence[int]]) -> Tensor:
        """The hidden states of this rank's share, from the ranks that own them: [T, D]."""
        if self._ranks == 1:
            return self._states.of([batch[place] for place in shares[0]])
        sent = [[batch[p] for p in share if self._owns(batch[p])] for share in shares]
        share = [batch[place] for place in shares[self._rank]]
        got = [[e for e in share if e.index % self._ranks == rank] for rank in range(self._ranks)]
        flat = [example for to_rank in sent for example in to_rank]
        device, width = self.device, self._states.width
        nothing = torch.empty(0, width, dtype=self._states.dtype)
        outgoing = (self._states.of(flat) if flat else nothing).to(device)
        sizes = [sum(map(len, from_rank)) for from_rank in got]
        incoming = torch.empty(sum(sizes), width, dtype=self._states.dtype, device=device)
        dist.all_to_all_single(
            incoming, outgoing, sizes, [sum(map(len, to_rank)) for to_rank in sent]
        )
        return _in_order(incoming, [e for from_rank in got for e in from_rank], share)

    def _owns(self, example: Example) -> bool:
        return example.index % self._ranks == self._rank

    def pieces(self) -> Iterator[Piece]:
        """This rank's part of the optimizer's state: float32 weights and Adam's two moments."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        for name, parameter in self._tuned.items():
            master = safe_get_local_fp32_param(parameter)
            yield from _piece(f"{name}.master", parameter, master)
            for moment in _MOMENTS:
                try:
                    value = safe_get_local_optimizer_state(parameter, moment)
                except KeyError:
                    # No step was taken yet: all batches so far are learnt already.
                    value = torch.zeros_like(master)
                yield from _piece(f"{name}.{moment}", parameter, value)

    def restore(self, saved: Saved) -> None:
        """Takes over a checkpoint, whatever number of ranks wrote it."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        optimizer = self._engine.optimizer
        for flat in optimizer.fp32_partitioned_groups_flat:
            moments = {moment: torch.zeros_like(flat) for moment in _MOMENTS}
            steps = torch.tensor(float(saved.state.steps), device=flat.device)
            optimizer.optimizer.state[flat] = {"step": steps, **moments}
        tuned: dict[str, Any] = self._tuned
        for name, parameter in tuned.items():
            master = _padded(parameter, saved, f"{name}.master")
            safe_set_local_fp32_param(parameter, master)
            parameter.ds_tensor.data.copy_(master)
            for moment in _MOMENTS:
                value = _padded(parameter, saved, f"{name}.{moment}")
                safe_set_local_optimizer_state(parameter, value, moment)


def owned(examples: Sequence[Example]) -> list[Example]:
    """The samples whose hidden states this rank keeps."""
    ranks = dist.get_world_size()
    return [example for example in examples if example.index % ranks == dist.get_rank()]


def _deal(batch: Sequence[Example], ranks: int) -> list[list[int]]:
    """Each rank's places in the batch: like numbers of tokens, the longest dealt out first."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for place in sorted(range(len(batch)), key=lambda place: -len(batch[place])):
        rank = tokens.index(min(tokens))
        shares[rank].append(place)
        tokens[rank] += len(batch[place])
    return shares


def _in_order(hidden_TD: Tensor, examples: Sequence[Example], wanted: Sequence[Example]) -> Tensor:
    """The samples' hidden states, put from one order into another."""
    pieces = torch.split(hidden_TD, [len(example) for example in examples])
    found = {example.index: piece for example, piece in zip(examples, pieces, strict=True)}
    return torch.cat([found[example.index] for example in wanted]) if wanted else hidden_TD


def _padded(parameter: Any, saved: Saved, name: str) -> Tensor:
    start, end = _bounds(parameter)
    padded = torch.zeros(parameter.ds_tensor.numel(), device=parameter.ds_tensor.device)
    padded[: end - start].copy_(saved.read(name, start, end))
    return padded
