"""What a step costs beside plain PyTorch's, in one run: `python -m cifar10 bench --gpu`, and half of `scaling`.

Every loop trains the recipe's network from the same weights on the same images, cut out by one loader that lies on the
device. `plain PyTorch` is forward, loss, backward, clipping and fused SGD as anyone would write them for speed: no engine,
no guard against bad steps, nothing counted but the loss, and nothing read back until a round is over. The others are this
program's own step at the levels of `--engine-level`. Loops take turns, round by round, so that whatever else the machine
does meets all of them, and only ratios of one run mean something. Where others use the same cores, the time that this process
computed says more than the time that went by: `times by CPU time` is plain PyTorch's over a loop's own. (On a GPU it is the
host's share, and the other column is the answer.)
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cifar10 import UsageError
from cifar10.data.loader import MicroBatch, TrainLoader
from cifar10.distributed import device
from cifar10.distributed.world import World
from cifar10.engine.cuda_graphs import accelerate
from cifar10.engine.engine import Engine, own_optimizer, prepare
from cifar10.engine.levels import LEVELS
from cifar10.models.registry import build_model
from cifar10.plan import Plan, make_plan
from cifar10.run.metric_buffer import MetricBuffer
from cifar10_deepspeed import get_cifar10_dataloaders, train_step

PLAIN = "plain PyTorch"
RECIPE, PRECISIONS, BATCHES = "bn_cnn", ("fp32", "bf16"), (64, 512)
CPU_LEVELS = ("eager", "compile")
LAST_STEPS = 50  # whose mean loss is reported
WATCHED_STEPS = 10  # whose synchronizations are counted

Step = Callable[[list[MicroBatch]], Tensor]  # and its loss, on the device


@dataclass
class Loop:
    """One way to take a step, and what it came to."""

    step: Step
    batches: Iterator[list[MicroBatch]]
    losses: list[float]

    def seconds(self, steps: int) -> tuple[float, float]:
        """The wall time of the next steps, until the device has done them, and the CPU time of all threads of this process."""
        started, computed = time.perf_counter(), time.process_time()
        losses = [self.step(next(self.batches)) for _ in range(steps)]
        self.losses += torch.stack(losses).tolist()  # synchronizes
        return time.perf_counter() - started, time.process_time() - computed

    def waits(self) -> int | None:
        """How often a step synchronizes with the device; None on a CPU."""
        if not torch.cuda.is_available():
            return None
        batches = [next(self.batches) for _ in range(WATCHED_STEPS)]  # the loader's own are not the step's
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            for batch in batches:
                self.step(batch)
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchron" in str(one.message) for one in seen) // WATCHED_STEPS


def plain_step(plan: Plan, world: World) -> Step:
    """PyTorch alone, with the JSON's optimizer, clipping and precision."""
    model, autocast = (
        build_model(plan.recipe.model, plan.recipe.seed, len(plan.dataset.classes)).to(world.device).train(),
        plan.ds_config.get("torch_autocast", {}),
    )
    params, limit = plan.ds_config["optimizer"]["params"], plan.ds_config["gradient_clipping"]
    optimizer, parameters = torch.optim.SGD(model.parameters(), **params), list(model.parameters())
    dtype = getattr(torch, autocast.get("dtype", "bfloat16"))

    def step(batch: list[MicroBatch]) -> Tensor:
        ((images, labels),) = batch
        with torch.autocast(world.device.type, dtype, enabled=autocast.get("enabled", False)):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=plan.recipe.label_smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


class _OneRow(MetricBuffer):
    """A metric buffer that keeps the loss of the last step alone; the work on the device is the same."""

    def last_loss(self) -> Tensor:
        self._used = 0
        return self._rows[0, 0].clone()


def engine_step(plan: Plan, world: World) -> Step:
    """What `train_one_epoch` does for a step: the engine at the plan's level, its guard, and the metric buffer."""
    model, config = build_model(plan.recipe.model, plan.recipe.seed, len(plan.dataset.classes)).to(world.device), plan.ds_config
    optimizer = own_optimizer(model, config)
    started, _, _, _ = prepare().initialize(
        model=model, model_parameters=model.parameters(), optimizer=optimizer, config=config
    )
    started.train()
    engine, buffer = Engine(started, world, plan.recipe.seed), _OneRow(1, world.device)
    take_step = accelerate(train_step, engine, plan.options.engine_level)

    def step(batch: list[MicroBatch]) -> Tensor:
        engine.set_lr(1.0)
        loss, correct = take_step(engine, batch, plan.recipe.label_smoothing)
        buffer.write(loss, correct, engine.grad_norm, engine.skipped)
        return buffer.last_loss()

    return step


def steps_of(loader: TrainLoader) -> Iterator[list[MicroBatch]]:
    return (step for epoch in count() for step in loader.epoch(epoch))


def take_turns(
    steps: dict[str, Step], loader: TrainLoader, rounds: int, warmup_steps: int, timed_steps: int
) -> dict[str, dict[str, Any]]:
    """Images per second of each way to take a step, its times as fast as plain PyTorch, and the loss that it came to."""
    loops = {name: Loop(step, steps_of(loader), []) for name, step in steps.items()}
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    computed: dict[str, list[float]] = {name: [] for name in loops}  # seconds of CPU time
    for loop in loops.values():  # compilers and libraries do once what they do once
        loop.seconds(max(3, warmup_steps))
    for _ in range(rounds):
        for name, loop in loops.items():
            loop.seconds(max(1, warmup_steps))
            wall_seconds, cpu_seconds = loop.seconds(timed_steps)
            speeds[name].append(timed_steps * loader.global_images / wall_seconds)
            computed[name].append(cpu_seconds)
    rows = {}
    for name, loop in loops.items():
        per_round = [ours / plain for ours, plain in zip(speeds[name], speeds[PLAIN], strict=True)]
        row = {"images_per_second": speeds[name], "median": median(speeds[name]), "per_round": per_round}
        by_cpu = [plain / ours for ours, plain in zip(computed[name], computed[PLAIN], strict=True)]
        row |= {"cpu_seconds": computed[name], "cpu_ratio": median(by_cpu), "cpu_per_round": by_cpu}
        ratio = {"ratio": median(speeds[name]) / median(speeds[PLAIN])}
        rows[name] = {**row, **ratio, "final_loss": fmean(loop.losses[-LAST_STEPS:]), "waits_per_step": loop.waits()}
    return rows


def show(title: str, cells: dict[str, dict[str, dict[str, Any]]], console: Console) -> None:
    """A row for each cell and way to take a step."""
    heads = ("images/s, median", "times plain", "min .. max of rounds", "times by CPU time", "min .. max of rounds")
    heads = (*heads, f"loss, last {LAST_STEPS}", "waits a step")
    table = Table("", "step", *heads, title=title)
    for cell, rows in cells.items():
        for name, row in rows.items():
            spread, by_cpu = (f"{min(row[key]):.2f} .. {max(row[key]):.2f}" for key in ("per_round", "cpu_per_round"))
            waits = "-" if row["waits_per_step"] is None else str(row["waits_per_step"])
            times = f"{row['median']:,.0f}", f"{row['ratio']:.2f}", spread, f"{row['cpu_ratio']:.2f}", by_cpu
            table.add_row(cell, name, *times, f"{row['final_loss']:.4f}", waits)
        table.add_section()
    for column in table.columns[2:]:
        column.justify = "right"
    console.print(table)


def refuse_without_gpu() -> None:
    if not device.count_gpus():
        raise UsageError("--gpu needs a GPU, and this machine has none that PyTorch can use; leave it out to measure the CPU")


def plan_for(flags: dict[str, Any], precision: str, batch: int, level: str = "eager") -> Plan:
    words = {**flags, "--precision": precision, "--global-batch-size": batch, "--engine-level": level}
    return make_plan([f"{flag}={value}" for flag, value in words.items() if value is not None], 1, "bench")


def measure(
    flags: dict[str, Any],
    world: World,
    *,
    rounds: int,
    steps: int,
    warmup_steps: int,
    precisions: tuple[str, ...] = PRECISIONS,
    batches: tuple[int, ...] = BATCHES,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Every level that this machine has, beside plain PyTorch: {"fp32, batch 64": {"eager": {...}, ...}, ...}."""
    levels = LEVELS if world.device.type == "cuda" else CPU_LEVELS
    cells = {}
    for precision in precisions:
        for batch in batches:
            plans = {level: plan_for({"--recipe": RECIPE, **flags}, precision, batch, level) for level in levels}
            loader, _ = get_cifar10_dataloaders(plans["eager"], world)
            ways = {PLAIN: plain_step(plans["eager"], world)} | {name: engine_step(plan, world) for name, plan in plans.items()}
            cells[f"{precision}, batch {batch}"] = take_turns(ways, loader, rounds, warmup_steps, steps)
    return cells
