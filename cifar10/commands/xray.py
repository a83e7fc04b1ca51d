"""`python -m cifar10 xray [flags of a run]`: what each rank holds and sends, predicted and measured, side by side.

A few steps of the run that the flags describe, at each ZeRO stage or in the columns asked for, on 1, 2 and 4 ranks that it
starts itself. The first ones train, and their losses are compared with those of the first column. Memory is that of live
storages at the moments of one step (see engine/xray.py), predicted by the ZeRO papers' formulas and by what DeepSpeed adds
(engine/footprint.py). Traffic is counted at the process group: the bytes of whole tensors, whatever the algorithm, and what a
ring sends of them, (N - 1) / N, twice for an all-reduce. Every collective is then waited for, and its time includes waiting for
the slowest rank. No test image is looked at.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import nn

from cifar10 import UsageError
from cifar10.commands.bench_levels import steps_of
from cifar10.commands.common import number_table, write_picture
from cifar10.config.cli import join_lines_of_help, split_options
from cifar10.config.recipe import PROJECT, check_values, invalid
from cifar10.data.loader import MicroBatch
from cifar10.distributed import world as distributed
from cifar10.distributed.device import count_gpus
from cifar10.distributed.world import World
from cifar10.engine import experts, footprint, pipeline, xray
from cifar10.engine.engine import Engine, checkpoint_blocks, leave, own_optimizer, prepare
from cifar10.models.registry import build_model, has_experts
from cifar10.models.weights import freeze
from cifar10.plan import Plan, make_plan
from cifar10.report import plots
from cifar10.run import folder as run_folder
from cifar10_deepspeed import get_cifar10_dataloaders, initial_model, train_step

OFFLOADED = ("optimizer", "param")
COLUMNS: dict[str, tuple[str, ...]] = {  # flags that are added to the run's
    "as given": (),
    **{f"ZeRO {stage}": ("--set", f"zero_optimization.stage={stage}") for stage in range(4)},
    "ZeRO 2 offload": ("--set", "zero_optimization.stage=2", "zero_optimization.offload_optimizer.device=cpu"),
    "ZeRO 3 offload": (
        "--set",
        "zero_optimization.stage=3",
        *(f"zero_optimization.offload_{what}.device=cpu" for what in OFFLOADED),
    ),
    "checkpointing": ("--gradient-checkpointing",),
    "pipeline": ("--pipeline-stages", "2"),
    "undivided experts": ("--expert-parallel", "1"),
}
LEAST_RANKS = {"pipeline": 2, "undivided experts": 2}
TRAINING_STEPS = 6  # in the first two the optimizer allocates its state, and ZeRO 3 learns the order of the layers
MB = 1e6


@dataclass(frozen=True)
class XRay:
    """What is looked at, and where it is written."""

    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of ranks, each measured by itself (default: 1 2 4); those of more ranks than GPUs are left out."""
    columns: tuple[str, ...] = ("ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3")
    """What is compared: "ZeRO 0" to "ZeRO 3", "ZeRO 2 offload", "ZeRO 3 offload", "checkpointing", "pipeline" (of two stages),
    "undivided experts" (as copies on all ranks), and "as given", the run's own flags (default: the ZeRO stages)."""
    xray_steps: int = 2
    """Steps whose traffic is averaged (default: 2)."""
    output_dir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where xray.json and xray.png go (default: nothing is written)."""


def plan_of(flags: Sequence[str], ranks: int) -> Plan:
    """The run that the flags describe, without a download. Raises UsageError."""
    plan = make_plan([*flags, "--dry-run"], ranks, "xray")
    return replace(plan, options=replace(plan.options, engine_level="eager"))


# --- in a rank ----------------------------------------------------------------------------------------------------------


def batches_of(plan: Plan, world: World, steps: int) -> list[list[MicroBatch]]:
    """This rank's images: real ones if they are there, else random ones."""
    try:
        loader, _ = get_cifar10_dataloaders(replace(plan, options=replace(plan.options, dry_run=False)), world)
    except UsageError:
        loader, _ = get_cifar10_dataloaders(plan, world)
    return list(islice(steps_of(loader), steps))


@xray.torchs_linear()
def measure(plan: Plan, world: World, batches: list[list[MicroBatch]]) -> dict[str, Any]:
    """What this rank's losses are in TRAINING_STEPS, what it holds in the step after that, and what it sends in the others."""
    deepspeed = prepare()
    gc.collect()
    before = xray.live_tensors()
    gc.freeze()  # so that only what comes now is looked through
    model, config = initial_model(plan)[0].to(world.device), plan.ds_config
    make_engine, step = Engine, train_step
    if plan.batch.stages > 1:
        model, make_engine, step = pipeline.this_stage(model, config), pipeline.PipelineEngine, pipeline.train_step
    experts.divide(model, world, plan.options.expert_parallel)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    given = {"model_parameters": trained, "optimizer": own_optimizer(model, config), "config": config}
    engine = make_engine(deepspeed.initialize(model=model, **given)[0], world, plan.recipe.seed)
    engine.train()
    engine.set_lr(plan.recipe.lr_scale(plan.batch.global_images))
    losses, marks = [], []
    for batch in batches[:TRAINING_STEPS]:
        losses.append(step(engine, batch, plan.recipe.label_smoothing)[0].item())
        marks.append(time.perf_counter())
    seconds = median(after - before for before, after in pairwise(marks[1:]))
    engine.set_lr(0.0)
    memory = xray.Memory(engine, before)
    of_memory, of_traffic = xray.Traffic(world.device, memory.look), xray.Traffic(world.device)
    with of_memory.counted(), memory.watched():
        step(engine, batches[TRAINING_STEPS], plan.recipe.label_smoothing)
    with of_traffic.counted():
        for batch in batches[TRAINING_STEPS + 1 :]:
            step(engine, batch, plan.recipe.label_smoothing)
    moment, total = memory.peak
    steps = len(batches) - TRAINING_STEPS - 1
    rows = {name: {key: value / steps for key, value in row.items()} for name, row in of_traffic.rows.items()}
    engine.deepspeed.destroy()  # or its hooks keep all of it for the columns that follow
    gc.unfreeze()
    speed = plan.batch.global_images / seconds
    found = {"memory": memory.most, "at once": total, "moment": moment, "traffic": rows}
    return {**found, "losses": losses, "images_per_second": speed}


def rank() -> None:
    """One rank's part: the job is a JSON, this process's last argument; rank 0 writes what all have measured."""
    job = json.loads(sys.argv[-1])
    size = int(os.environ.get("WORLD_SIZE", "1"))
    plans = {column: plan_of(flags, size) for column, flags in job["columns"].items()}
    options = next(iter(plans.values())).options
    world = distributed.join(options.threads, options.timeout_minutes, deterministic=options.deterministic)
    measured, batches = {}, {}
    for column, plan in plans.items():
        images = plan.recipe, plan.batch, plan.precision
        if images not in batches:
            batches[images] = batches_of(plan, world, TRAINING_STEPS + 1 + job["steps"])
        measured[column] = world.gather(measure(plan, world, batches[images]))
        gc.collect()
    if world.is_main:
        Path(job["to"]).write_text(json.dumps({"facts": world.facts, "columns": measured}), encoding="utf-8")
    leave()


# --- in the command -----------------------------------------------------------------------------------------------------


def start(ranks: int, columns: dict[str, Sequence[str]], steps: int) -> dict[str, Any]:
    """Measure columns, each with the flags of its run, on this many ranks. Raises UsageError if a rank fails."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "measured.json"
        job = json.dumps({"columns": columns, "steps": steps, "to": str(to)})
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--no-python", sys.executable]
        words = ["-c", "from cifar10.commands import xray; xray.rank()", job]
        variables = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(PROJECT)}
        streams: dict[str, Any] = {"stdout": sys.stderr, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, *(torchrun if ranks > 1 else []), *words]
        done = subprocess.run(command, env=variables, check=False, **streams)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "Error" in line]
            raise UsageError(f"{ranks} ranks ended with {done.returncode}: {(errors or ['?'])[0].strip()}")
        return json.loads(to.read_text(encoding="utf-8"))


def predict(plan: Plan) -> dict[str, Any]:
    """What a rank should hold and send. There is no formula here for what offloading adds; of pipelines and experts only for
    parameters, gradients and the optimizer's state, and for what stages send."""
    recipe, config, ranks = plan.recipe, plan.ds_config, plan.batch.world_size
    channels, size, _ = plan.image_shape
    size = recipe.first_sizes[0] if recipe.first_sizes else size

    def build() -> nn.Module:
        model = build_model(recipe.model, recipe.seed, len(plan.dataset.classes), plan.image_shape, **recipe.network_options)
        freeze(model, recipe.train_only)
        if plan.options.gradient_checkpointing:
            checkpoint_blocks(model, recipe.model, plan.given_config.get("activation_checkpointing"))
        return model

    device = torch.device("cuda" if count_gpus() else "cpu")
    shape = plan.batch.micro_images, channels, size, size
    if plan.batch.stages > 1:
        return {"pieces": {}, "paper": None, **footprint.of_pipeline(build, shape, config, ranks)}
    if has_experts(recipe.model):
        memory = footprint.of_experts(build, config, ranks, plan.options.expert_parallel)
        return {"memory": memory, "pieces": {}, "traffic": {}, "sent": {}, "paper": None}
    seen = footprint.footprint(build, shape, config, device, recipe.label_smoothing)
    memory, pieces = footprint.memory(seen, config, ranks)
    if {"offload_optimizer", "offload_param"} & {*config.get("zero_optimization", {})}:
        del memory[xray.KINDS[-1]]
        pieces = {}
    moved = footprint.traffic(seen, config, ranks)
    sent = {name: xray.ring_bytes(name, payload, ranks)[0] for name, payload in moved.items()}
    paper = footprint.paper_bytes(seen, config.get("zero_optimization", {}).get("stage", 0), ranks)
    return {"memory": memory, "pieces": pieces, "traffic": moved, "sent": sent, "paper": paper}


def largest(measured: Sequence[dict[str, Any]], kind: str) -> int:
    """The most that any rank holds of a kind."""
    return max(rank["memory"][kind] for rank in measured)


def losses_of(measured: Sequence[dict[str, Any]]) -> list[float]:
    """Of each training step, the mean over the ranks."""
    return [fmean(of_step) for of_step in zip(*(rank["losses"] for rank in measured), strict=True)]


def in_mb(measured: float, predicted: float | None) -> str:
    return f"{measured / MB:,.2f} ({'-' if predicted is None else f'{predicted / MB:,.2f}'})"


def show(found: dict[str, Any], ranks: int, console: Console) -> None:
    """Three tables for a number of ranks: memory, traffic, and the run."""
    columns, count = found["columns"], f"{ranks} rank{'s' * (ranks > 1)}"
    table = number_table("MB", *columns, title=f"memory of a rank, {count}: the most at any moment, measured (predicted)")
    for kind in xray.KINDS:
        cells = [(largest(one["measured"], kind), one["predicted"]["memory"].get(kind)) for one in columns.values()]
        table.add_row(kind, *(in_mb(*cell) for cell in cells))
    table.add_section()
    totals = [max(rank["at once"] for rank in one["measured"]) / MB for one in columns.values()]
    table.add_row("all of it, at its peak", *(f"{total:,.2f}" for total in totals))
    console.print(table)
    for name, one in columns.items():
        pieces = ", ".join(f"{piece} {size / MB:,.2f}" for piece, size in one["predicted"]["pieces"].items())
        if pieces:
            console.print(f"DeepSpeed's buffers, {name}: {pieces}", soft_wrap=True)
    heads = ("calls", "MB moved", "MB sent as a ring", "milliseconds")
    table = number_table("", "collective", *heads, texts=2, title=f"traffic of rank 0 in a step, {count}: measured (predicted)")
    for name, one in columns.items():
        expected, rows, paper = one["predicted"], one["measured"][0]["traffic"], one["predicted"]["paper"]
        for collective, row in rows.items():
            known = (expected[which].get(collective, None if paper is None else 0) for which in ("traffic", "sent"))
            moved, sent = (in_mb(row[key], size) for key, size in zip(("payload", "sent"), known, strict=True))
            table.add_row(name, collective, f"{row['calls']:g}", moved, sent, f"{1000 * row['seconds']:,.1f}")
        total, seconds = (sum(row[key] for row in rows.values()) for key in ("sent", "seconds"))
        table.add_row(name, "all, ZeRO paper", "", "", in_mb(total, paper), f"{1000 * seconds:,.1f}")
        table.add_section()
    console.print(table)
    table = number_table("", f"loss of step {TRAINING_STEPS}", "largest difference", "images/s", title=f"the run on {count}")
    for name, one in columns.items():
        speed = min(rank["images_per_second"] for rank in one["measured"])
        difference = "-" if one["difference"] is None else f"{one['difference']:.1e}"
        table.add_row(name, f"{losses_of(one['measured'])[-1]:.6f}", difference, f"{speed:,.0f}")
    console.print(table)


def compare_losses(found: dict[str, Any], ranks: int, plans: dict[str, Plan], first: str) -> None:
    """Add to each column on `ranks` ranks how far its losses are from those of `first` on as many ranks as have images of
    their own; None if that was not measured."""
    for name, plan in plans.items():
        plain = found.get(str(plan.batch.data_ranks), {}).get("columns", {}).get(first)
        own = found[str(ranks)]["columns"][name]
        pairs = zip(losses_of(own["measured"]), losses_of(plain["measured"]), strict=True) if plain else ()
        own["difference"] = max((abs(one - other) for one, other in pairs), default=None)


def run(argv: list[str]) -> None:
    """Measure each column on each number of ranks, and print three tables."""
    options: Any
    if {"--help", "-h"} & {*argv}:
        join_lines_of_help(XRay)
        tyro.cli(XRay, args=["--help"], prog="python -m cifar10 xray", description=__doc__)
    options, flags = split_options(argv, XRay)
    check_values(options, ("xray_steps", lambda n: n >= 1, "an integer >= 1"))
    gpus = count_gpus() or max(options.ranks, default=0)
    counts = [number for number in options.ranks if number <= gpus]
    if not counts or min(counts) < 1:
        raise invalid("--ranks", " ".join(map(str, options.ranks)), f"numbers from 1 to {gpus or 1}", 1)
    if unknown := [name for name in options.columns if name not in COLUMNS]:
        raise invalid("--columns", unknown[0], ", ".join(f'"{name}"' for name in COLUMNS), '"ZeRO 2"')
    of_columns = {column: [*flags, *COLUMNS[column]] for column in options.columns}
    flags_on = {
        ranks: {name: words for name, words in of_columns.items() if ranks >= LEAST_RANKS.get(name, 1)} for ranks in counts
    }
    counts = [ranks for ranks in counts if flags_on[ranks]]
    if not counts:
        raise invalid("--ranks", " ".join(map(str, options.ranks)), f"at least 2 for {options.columns[0]}", 2)
    plans = {ranks: {name: plan_of(words, ranks) for name, words in flags_on[ranks].items()} for ranks in counts}
    if options.output_dir is not None:
        run_folder.refuse_unwritable(options.output_dir)
    console, found = Console(highlight=False), {}
    if left_out := [str(number) for number in options.ranks if number not in counts]:
        console.print(f"left out, more ranks than GPUs ({gpus}): {', '.join(left_out)}")
    first = next(iter(plans[counts[0]].values()))
    batch = f"{first.batch.global_images} images a step, {first.precision}"
    console.print(f"{first.options.recipe}: {batch}, {options.xray_steps} steps; MB are 10^6 bytes", soft_wrap=True)
    for ranks, columns in plans.items():
        measured = start(ranks, flags_on[ranks], options.xray_steps)
        both = {
            column: {"predicted": predict(plan), "measured": measured["columns"][column]} for column, plan in columns.items()
        }
        found[str(ranks)] = {"facts": measured["facts"], "columns": both}
        compare_losses(found, ranks, columns, options.columns[0])
        show(found[str(ranks)], ranks, console)
    if options.output_dir is not None:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(options.output_dir / "xray.json", {"command": ["xray", *argv], "ranks": found})
        write_picture(options.output_dir / "xray.png", plots.png(plots.xray, found))
        console.print(f"written to {options.output_dir}", soft_wrap=True)
