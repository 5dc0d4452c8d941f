"""`errata plan`: what a job would take on given hardware. Knows no service; it need not run."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_args

import typer
from pydantic import ValidationError

from service.display import console, table
from workers import plan as planning
from workers import presets
from workers.contract import Format, Record
from workers.models import config_file, read_facts
from workers.plan import GB, Cluster, Plan, Work
from workers.plan_traffic import Speed

Checked = TypeVar("Checked", bound=Record)

_HARDWARE = "Hardware"
_WORK = "Work"
_SPEED = "Speed (the defaults are an H100's)"


def plan(
    model: Annotated[
        str,
        typer.Argument(help="A directory, a config.json or a hub id; only config.json is read."),
    ],
    gpus: Annotated[
        int, typer.Option(help="GPUs per node.", rich_help_panel=_HARDWARE, show_default=False)
    ],
    gpu_memory: Annotated[
        float, typer.Option(help="GB (10^9 bytes) of one GPU.", rich_help_panel=_HARDWARE)
    ],
    nodes: Annotated[int, typer.Option(rich_help_panel=_HARDWARE)] = 1,
    offload: Annotated[
        str,
        typer.Option(help="Frozen weights: none, cpu or nvme.", rich_help_panel=_HARDWARE),
    ] = "none",
    edits: Annotated[int, typer.Option(rich_help_panel=_WORK)] = 1_000,
    tokens_per_edit: Annotated[
        int, typer.Option(help="Read, in one format.", rich_help_panel=_WORK)
    ] = 24,
    target_tokens: Annotated[
        int, typer.Option(help="Learnt, with EOS, in one format.", rich_help_panel=_WORK)
    ] = 5,
    format: Annotated[
        list[str] | None,
        typer.Option(help="raw, qa, chat, prefix; repeatable; none: all.", rich_help_panel=_WORK),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="None: as many as are allowed.", rich_help_panel=_WORK)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(rich_help_panel=_WORK)] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option(help="Tuned; repeatable; none: the model's own.", rich_help_panel=_WORK),
    ] = None,
    efficiency: Annotated[
        float, typer.Option(help="Share of the peak that is reached.", rich_help_panel=_SPEED)
    ] = 0.3,
    peak_tflops: Annotated[
        float, typer.Option(help="Of one GPU, bfloat16.", rich_help_panel=_SPEED)
    ] = 989.0,
    link_gb_per_s: Annotated[
        float, typer.Option(help="Into a GPU, inside a node.", rich_help_panel=_SPEED)
    ] = 450.0,
    node_link_gb_per_s: Annotated[
        float, typer.Option(help="Into a node, per GPU.", rich_help_panel=_SPEED)
    ] = 50.0,
    host_gb_per_s: Annotated[
        float, typer.Option(help="Between a GPU and its host.", rich_help_panel=_SPEED)
    ] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Memory, bytes moved and estimated time of a job; exits with 1 if it does not fit."""
    given = {
        "max_epochs": epochs,
        "batch_size": batch_size,
        "parameters": parameters,
        "formats": format,
    }
    facts = read_facts(config_file(model))
    answer = planning.plan(
        facts,
        presets.load(facts, None, {name: v for name, v in given.items() if v is not None}),
        _checked(Cluster, gpus=gpus, nodes=nodes, gpu_memory_gb=gpu_memory, offload=offload),
        _checked(Work, edits=edits, tokens_per_edit=tokens_per_edit, target_tokens=target_tokens),
        _checked(
            Speed,
            efficiency=efficiency,
            peak_tflops=peak_tflops,
            link_gb_per_s=link_gb_per_s,
            node_link_gb_per_s=node_link_gb_per_s,
            host_gb_per_s=host_gb_per_s,
        ),
    )
    if as_json:
        print(json.dumps(answer.model_dump(mode="json")))
    else:
        show(answer)
    if not answer.fits:
        raise typer.Exit(1)


def _checked(kind: type[Checked], **values: Any) -> Checked:
    """Raises `ValueError` in one line that names options as they are given."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise ValueError("; ".join(_problem(entry) for entry in error.errors())) from error


def _problem(entry: Any) -> str:
    field = str(entry["loc"][0])
    # What an option counts in is in its help, not in its name.
    option = "gpu-memory" if field == "gpu_memory_gb" else field.replace("_", "-")
    return f"--{option}: {entry['input']!r} is wrong: {entry['msg']}"


def show(plan: Plan) -> None:
    """Three tables and a verdict; the first says what the others are of."""
    console.print(
        f"{plan.architecture}, {plan.parameters / GB:.1f} billion parameters, "
        f"{plan.layers} layers; {plan.prefix_layers} of them are the frozen prefix. "
        f"Tuned: {', '.join(plan.tuned)} ({plan.tuned_parameters / 1e6:.0f} million parameters)"
    )
    formats = ", ".join(plan.hparams.formats or get_args(Format))
    console.print(
        f"{plan.work.edits:,} edits, each as {formats}, of {plan.work.tokens_per_edit} tokens; "
        f"batches of {plan.hparams.batch_size}, at most {plan.hparams.max_epochs} epochs\n"
    )
    _memory(f"one GPU of {plan.cluster.gpu_memory_gb:g}, prefix", plan.gpu_memory_prefix)
    _memory(f"one GPU of {plan.cluster.gpu_memory_gb:g}, epochs", plan.gpu_memory)
    _memory("one host", plan.host_memory)
    _memory("one host, files", plan.files)
    _traffic(plan)
    _duration(plan)
    _verdict(plan)


def _memory(title: str, memory: Mapping[str, int]) -> None:
    rows = [(kind, f"{size / GB:.2f}") for kind, size in memory.items() if size]
    if rows:
        table((title, "GB"), [*rows, ("total", f"{sum(memory.values()) / GB:.2f}")])
        console.print()


def _traffic(plan: Plan) -> None:
    moved = plan.traffic
    rows = [
        ("an epoch", moved.epoch, moved.epoch_without_prefix_cache),
        ("the prefix, once", moved.prefix, None),
        ("the job", moved.job, moved.job_without_prefix_cache),
    ]
    if moved.offloaded_epoch:
        rows.append(("an epoch, of offloaded weights", moved.offloaded_epoch, None))
    table(
        ("received by one GPU, at most", "GB", "without prefix cache"),
        [
            (what, *(None if n is None else f"{n / GB:,.0f}" for n in sizes))
            for what, *sizes in rows
        ],
    )
    console.print()


def _duration(plan: Plan) -> None:
    taken, speed = plan.duration, plan.speed
    rows = [
        ("a step: computing", taken.step_compute, None),
        ("a step: moving weights", taken.step_traffic, None),
        ("an epoch", taken.epoch, taken.epoch_without_prefix_cache),
        ("an epoch, per edit", taken.edit_epoch, None),
        ("the prefix, once", taken.prefix, None),
        ("the job", taken.job, taken.job_without_prefix_cache),
    ]
    table(
        ("estimated time", "seconds", "without prefix cache"),
        [(what, *(None if n is None else f"{n:,.4g}" for n in times)) for what, *times in rows],
    )
    console.print(
        f"at {speed.efficiency:.0%} of {speed.peak_tflops:g} TFLOP/s, {speed.link_gb_per_s:g} GB/s "
        f"into a GPU and {speed.node_link_gb_per_s:g} GB/s per GPU into a node; nothing overlaps; "
        "without start-up, loading and evaluation\n"
    )


def _verdict(plan: Plan) -> None:
    peak, room = plan.gpu_peak_bytes / GB, plan.cluster.gpu_memory_gb
    said = "It fits" if plan.fits else "It does not fit"
    console.print(f"{said}: {peak:.1f} of {room:g} GB; most of it is {plan.largest}.")
    if not plan.fits:
        ways = "; ".join(plan.remedies) or "more GPUs, GPUs with more memory, or fewer parameters"
        console.print(f"It would fit with: {ways}.")
