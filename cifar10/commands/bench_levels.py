"""`python -m cifar10 bench --gpu`, and half of `scaling`: the cost of a step beside plain PyTorch's, in one run.

Every loop trains the recipe's network from the same weights on the same images, cut by one loader on the device. `plain
PyTorch` is forward, loss, backward, clipping and SGD as anyone would write them for speed, with nothing read back until a
round is over; the others are the script's step at the levels of `--engine-level`. Loops take turns, so that other load on the
machine affects all of them; only ratios within one run can be compared. On shared cores CPU time says more than wall time:
`times by CPU time` is plain PyTorch's over a loop's own. (On a GPU it is only the host's share.)
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, product
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from cifar10.commands.common import as_flags, number_table, quotients, span
from cifar10.data.loader import MicroBatch, TrainLoader
from cifar10.distributed.device import count_gpus
from cifar10.distributed.world import World
from cifar10.engine.cuda_graphs import accelerate
from cifar10.engine.engine import Engine, own_optimizer, prepare
from cifar10.engine.levels import LEVELS
from cifar10.models.registry import build_model
from cifar10.plan import Plan, make_plan
from cifar10.run.metric_buffer import MetricBuffer, count_steps
from cifar10.run.state import RunState
from cifar10_deepspeed import get_cifar10_dataloaders, train_step

PLAIN = "plain PyTorch"
RECIPE, PRECISIONS, BATCHES = "bn_cnn", ("fp32", "bf16"), (64, 512)
CPU_LEVELS = ("eager", "compile")
LAST_STEPS = 50  # over which the loss is averaged
WATCHED_STEPS = 10  # in which synchronizations are counted

Rows = dict[str, dict[str, Any]]  # what was measured of each way to take a step
Step = Callable[[Any], Tensor]  # returns the loss, on the device


@dataclass
class Loop:
    """One way to take a step, and what was measured of it."""

    step: Step
    batches: Iterator[Any]
    images: int  # per step
    warmup_steps: int  # before each round
    steps: int  # that are timed in each round
    losses: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)  # images per second, of each round
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads of this process, of each round

    def run(self, steps: int) -> None:
        losses = [self.step(next(self.batches)) for _ in range(steps)]
        self.losses += torch.stack(losses).tolist() if losses else []  # synchronizes

    def take_round(self) -> None:
        self.run(self.warmup_steps)
        started, cpu_started = time.perf_counter(), time.process_time()
        self.run(self.steps)
        self.speeds.append(self.steps * self.images / (time.perf_counter() - started))
        self.cpu_seconds.append(time.process_time() - cpu_started)

    def waits(self) -> int | None:
        """How often a step synchronizes with the device; None on a CPU."""
        if not count_gpus():
            return None
        batches = [next(self.batches) for _ in range(WATCHED_STEPS)]  # the loader's synchronizations are not the step's
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            for batch in batches:
                self.step(batch)
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchron" in str(one.message) for one in seen) // WATCHED_STEPS


def network(plan: Plan, world: World) -> nn.Module:
    recipe, classes = plan.recipe, len(plan.dataset.classes)
    model = build_model(recipe.model, recipe.seed, classes, plan.image_shape, **recipe.network_options)
    return model.to(world.device).train()


def plain_step(plan: Plan, world: World) -> Step:
    """PyTorch alone, with the JSON's optimizer, clipping and precision."""
    model, autocast = network(plan, world), plan.ds_config.get("torch_autocast", {})
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


def engine_step(plan: Plan, world: World) -> Step:
    """The script's step: the engine at the plan's level, its guard, and the metric buffer, read when it is full."""
    model, config, recipe = network(plan, world), plan.ds_config, plan.recipe
    given = {"model_parameters": model.parameters(), "optimizer": own_optimizer(model, config)}
    engine = Engine(prepare().initialize(model=model, config=config, **given)[0], world, recipe.seed)
    buffer, state = MetricBuffer(plan.options.log_every_steps, world.device), RunState()
    counts = {"global_images": plan.batch.global_images, "max_skipped_in_a_row": recipe.max_skipped_in_a_row}
    take_step = accelerate(train_step, engine, plan.options.engine_level)

    def step(batch: list[MicroBatch]) -> Tensor:
        engine.set_lr(1.0)
        loss, correct = take_step(engine, batch, recipe.label_smoothing)
        buffer.write(loss, correct, engine.grad_norm, engine.skipped)
        if buffer.is_full:
            count_steps(buffer.read(world), state, **counts)
        return loss.clone()  # a captured step writes the next one into the same memory

    return step


def steps_of(loader: TrainLoader) -> Iterator[list[MicroBatch]]:
    return (step for epoch in count() for step in loader.epoch(epoch))


def take_turns(ways: dict[str, Step], loader: TrainLoader, *, rounds: int, warmup_steps: int, steps: int) -> Rows:
    """For each way to take a step: images per second, how many times plain PyTorch's that is, and the final loss."""
    images, warmup = loader.global_images, max(1, warmup_steps)
    loops = {name: Loop(step, steps_of(loader), images, warmup, steps) for name, step in ways.items()}
    for name, loop in list(loops.items()):  # compilation and the libraries' own warm-up
        try:
            loop.run(max(3, warmup_steps))
        except Exception as error:
            if name == PLAIN:
                raise
            print(f"{name} fails here and is left out: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            del loops[name]
    for _ in range(rounds):
        for loop in loops.values():
            loop.take_round()
    rows, plain = {}, loops[PLAIN]
    for name, loop in loops.items():
        by_cpu = quotients(plain.cpu_seconds, loop.cpu_seconds)
        rows[name] = {
            "images_per_second": loop.speeds,
            "median": median(loop.speeds),
            "per_round": quotients(loop.speeds, plain.speeds),
            "cpu_seconds": loop.cpu_seconds,
            "cpu_ratio": median(by_cpu),
            "cpu_per_round": by_cpu,
            "ratio": median(loop.speeds) / median(plain.speeds),
            "final_loss": fmean(loop.losses[-LAST_STEPS:]),
            "waits_per_step": loop.waits(),
        }
    return rows


def show(title: str, cells: dict[str, Rows], console: Console) -> None:
    heads = ("images/s, median", "times plain", "min .. max of rounds", "times by CPU time", "min .. max of rounds")
    table = number_table("", "step", *heads, f"loss, last {LAST_STEPS}", "synchronizations a step", texts=2, title=title)
    for cell, rows in cells.items():
        for name, row in rows.items():
            times = f"{row['median']:,.0f}", f"{row['ratio']:.2f}", span(row["per_round"])
            by_cpu = f"{row['cpu_ratio']:.2f}", span(row["cpu_per_round"])
            waits = "-" if row["waits_per_step"] is None else str(row["waits_per_step"])
            table.add_row(cell, name, *times, *by_cpu, f"{row['final_loss']:.4f}", waits)
        table.add_section()
    console.print(table)


def plan_for(flags: dict[str, Any], precision: str, batch: int, level: str = "eager") -> Plan:
    words = {**flags, "--precision": precision, "--global-batch-size": batch, "--engine-level": level}
    return make_plan(as_flags(words), 1, "bench")


def measure(
    flags: dict[str, Any],
    world: World,
    precisions: tuple[str, ...] = PRECISIONS,
    batches: tuple[int, ...] = BATCHES,
    after_each: Callable[[dict[str, Rows]], None] = lambda cells: None,
    **sizes: int,
) -> dict[str, Rows]:
    """Every level that this machine supports, beside plain PyTorch: {"fp32, batch 64": {"eager": {...}, ...}, ...}."""
    levels = LEVELS if world.device.type == "cuda" else CPU_LEVELS
    cells = {}
    for precision, batch in product(precisions, batches):
        plans = {level: plan_for({"--recipe": RECIPE, **flags}, precision, batch, level) for level in levels}
        loader, _ = get_cifar10_dataloaders(plans["eager"], world)
        ways = {PLAIN: plain_step(plans["eager"], world)} | {name: engine_step(plan, world) for name, plan in plans.items()}
        cells[f"{precision}, batch {batch}"] = take_turns(ways, loader, **sizes)
        after_each(cells)
    return cells
