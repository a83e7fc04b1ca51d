"""`python -m cifar10 schedule [flags of a run]`: its learning rate, step by step, as a picture and in the terminal."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cifar10 import UsageError
from cifar10.commands.common import write_picture
from cifar10.config import cli, ds_config, recipe
from cifar10.config.schedule import parse
from cifar10.data import registry
from cifar10.report import plots
from cifar10_deepspeed import lr_multiplier, total_steps

WIDTH, HEIGHT = 72, 10  # of the drawing in the terminal, in characters
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class ScheduleOptions:
    """Where the picture goes."""

    output: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("schedule.png")
    """The picture's file, a PNG."""


def drawn(rates: list[float]) -> str:
    """Rates as bars of eighths of a character, each the rate at its place."""
    most, width = max(rates), min(WIDTH, len(rates))
    eighths = [round(rates[column * len(rates) // width] / most * HEIGHT * 8) for column in range(width)]
    rows = ["".join(BARS[min(8, max(0, high - 8 * row))] for high in eighths) for row in reversed(range(HEIGHT))]
    return "\n".join(f"{f'{most:.4g}' if number == 0 else '':>9} {row}".rstrip() for number, row in enumerate(rows))


def rates_of(flags: list[str]) -> tuple[list[float], int, str]:
    """The learning rate at each step of the run that these flags of main.py ask for, steps per epoch, and what it is."""
    chosen, options = cli.parse(flags, "python -m cifar10 schedule", __doc__, ScheduleOptions)
    config = ds_config.read(options.deepspeed_config or recipe.load(options.recipe).deepspeed)
    config, batch, _ = ds_config.resolve(ds_config.override(config, lr=options.lr, global_batch_size=None), 1)
    if scheduler := config.get("scheduler"):
        name = scheduler.get("type")
        raise UsageError(f"--recipe {options.recipe}: its config has a scheduler of its own, {name}; choose another recipe")
    images = registry.find(chosen.dataset).describe(options.data_dir).train_images - chosen.val_images
    per_epoch = max(1, images // batch.global_images)
    base = config["optimizer"]["params"]["lr"] * chosen.lr_scale(batch.global_images)
    steps = range(total_steps(chosen, per_epoch))
    return [base * lr_multiplier(chosen, step, per_epoch) for step in steps], per_epoch, parse(chosen.lr_schedule).describe()


def run(argv: list[str]) -> None:
    """Draw the learning rate over a run."""
    options, flags = cli.split_options(argv, ScheduleOptions)
    rates, per_epoch, what = rates_of(flags)
    write_picture(options.output, plots.png(plots.schedule, rates, per_epoch, what))
    print(f"{drawn(rates)}\n{0:>9} {len(rates):,} steps of {per_epoch:,} an epoch: {what}")
    print(f"first {rates[0]:.4g}, highest {max(rates):.4g}, last {rates[-1]:.4g}; written to {options.output}")
