"""`python -m cifar10 lr-finder [flags of a run]`: the loss at learning rates that grow from step to step, and which to try.

The learning rate range test of Smith (arXiv 1506.01186) as fastai does it: the rate grows exponentially, the loss is smoothed
as an exponential moving average, and the test ends where that is four times its lowest. Two rates are suggested: a tenth of
the one with the lowest loss (Gugger 2018, "How Do You Find A Good Learning Rate"), and the one in whose tenth of the test the
loss falls most. Small batches have noisy losses and need more steps. With several groups of parameters all rates grow alike,
and the first is shown. It trains the run's network with its optimizer, batch, precision and augmentation on its training
images. No held-out image is looked at, and nothing is kept.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from cifar10 import UsageError
from cifar10.commands.bench_levels import steps_of
from cifar10.commands.common import write_picture
from cifar10.config.cli import split_options
from cifar10.distributed import world as distributed
from cifar10.distributed.world import World
from cifar10.engine.engine import Engine, leave, own_optimizer, prepare
from cifar10.plan import Plan, make_plan
from cifar10.report import plots
from cifar10_deepspeed import get_cifar10_dataloaders, initial_model, train_step

DIVERGED = 4.0  # times the lowest loss
WINDOW = 20  # steps of the test for each that the average spans
BAR = 40  # characters


@dataclass(frozen=True)
class Finder:
    """The test's range, its length, and where its picture goes."""

    start_lr: Annotated[float, tyro.conf.arg(help_behavior_hint="")] = 1e-5
    """Learning rate of the first step (default: 1e-5)."""
    end_lr: Annotated[float, tyro.conf.arg(help_behavior_hint="")] = 10.0
    """Learning rate of the last step (default: 10)."""
    find_steps: Annotated[int, tyro.conf.arg(help_behavior_hint="")] = 200
    """Steps from the one to the other (default: 200)."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """A PNG of the curve (default: none is written)."""

    def check(self) -> None:
        """Raise UsageError for a range that cannot be tried."""
        if not 0 < self.start_lr < self.end_lr < math.inf:
            given = f"--start-lr {self.start_lr:g} --end-lr {self.end_lr:g}"
            raise UsageError(f"{given}: expected 0 < start < end, for example 1e-5 and 10")
        if self.find_steps < 20:
            raise UsageError(f"invalid value for --find-steps: {self.find_steps}, expected 20 or more, for example 200")


def losses(plan: Plan, world: World, rates: list[float]) -> Iterator[float]:
    """The loss of each step, at these values of --lr."""
    config = {key: value for key, value in plan.ds_config.items() if key != "scheduler"}  # which would set the rate
    model, loader = initial_model(plan)[0].to(world.device), get_cifar10_dataloaders(plan, world)[0]
    if plan.recipe.weights == "none" and hasattr(model, "start_from_images"):
        model.start_from_images(loader.first_images(min(model.patch_images, len(loader.labels))))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    given = {"model_parameters": trained, "optimizer": own_optimizer(model, config), "config": config}
    engine = Engine(prepare().initialize(model=model, **given)[0], world, plan.recipe.seed)
    engine.train()
    for rate, batches in zip(rates, steps_of(loader), strict=False):
        engine.set_lr(rate / engine.base_lrs[0] * plan.recipe.lr_scale(plan.batch.global_images))
        yield train_step(engine, batches, plan.recipe.label_smoothing)[0].item()


def smoothed(values: Iterator[float], steps: int) -> Iterator[float]:
    """Exponential moving averages of `values`, corrected for their start, up to the one that has diverged."""
    average, lowest, keep = 0.0, math.inf, 1 - WINDOW / steps
    for number, value in enumerate(values, 1):
        average = keep * average + (1 - keep) * value
        now = average / (1 - keep**number)
        lowest = min(lowest, now)
        if not now <= DIVERGED * lowest:  # also if it is not a number
            return
        yield now


def found(rates: list[float], curve: list[float]) -> tuple[float, float]:
    """The rate with the lowest loss, and the one where it falls fastest. Raises UsageError where it did not fall."""
    lowest, tenth = min(range(len(curve)), key=curve.__getitem__, default=0), len(rates) // 10
    falls = [after - before for before, after in zip(curve, curve[tenth : lowest + 1], strict=False)]
    if not falls or curve[lowest] > 0.98 * curve[0]:
        raise UsageError("the loss did not fall at these rates; try a lower --start-lr, or more --find-steps")
    steepest = falls.index(min(falls)) + tenth // 2
    return rates[lowest], rates[steepest]


def run(argv: list[str]) -> None:
    """Train a few steps at growing learning rates, and print the loss at each."""
    options, flags = split_options(argv, Finder)
    options.check()
    plan = make_plan(flags, 1, "python -m cifar10 lr-finder", __doc__, Finder)
    growth = (options.end_lr / options.start_lr) ** (1 / (options.find_steps - 1))
    rates = [options.start_lr * growth**step for step in range(options.find_steps)]
    plan = replace(plan, options=replace(plan.options, engine_level="eager"))
    world = distributed.join(plan.options.threads, deterministic=plan.options.deterministic)
    try:
        curve = list(smoothed(losses(plan, world, rates), len(rates)))
    finally:
        leave()
    every = max(1, options.find_steps // 25)
    print(f"learning rate   smoothed loss   ({plan.options.recipe}, {len(curve)} of {options.find_steps} steps)")
    for rate, loss in list(zip(rates, curve, strict=False))[::every]:
        print(f"{rate:13.2e} {loss:15.4f}   {'█' * round(BAR * loss / (max(curve) or 1))}")
    lowest, steepest = found(rates, curve)
    print(f"try --lr {lowest / 10:.2g}, a tenth of {lowest:.2g}, where the loss is lowest; it falls fastest at {steepest:.2g}")
    if options.output is not None:
        marked = {"a tenth of the lowest": lowest / 10, "falls fastest": steepest, "lowest": lowest}
        write_picture(options.output, plots.png(plots.lr_range, rates[: len(curve)], curve, marked))
        print(f"written to {options.output}")
