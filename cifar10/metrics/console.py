"""The console: a line per epoch that is easy to grep, and in a terminal a live progress bar with images/s and time left."""

import math
import os
import re
import sys
from itertools import zip_longest

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cifar10.metrics.sink import Context, EpochRow, Section, Sink, StepRow, Steps


def plain_lines(section: Section) -> list[str]:
    """A section outside a terminal: lines that start with the title."""
    widths = [max(map(len, column)) for column in zip_longest(*section.rows, fillvalue="")]
    cells = (map(str.ljust, row, widths) for row in section.rows)
    return [f"{section.title}: {'  '.join(row)}".rstrip() for row in cells]


def _table(section: Section) -> Table:
    """A section in a terminal: text left-aligned, numbers right-aligned."""
    table = Table(title=section.title, title_justify="left", box=box.ROUNDED, show_header=bool(section.header))
    for number, column in enumerate(zip_longest(*section.rows, fillvalue="")):
        are_numbers = all(re.fullmatch(r"[\d, ]*", cell) for cell in column)
        header = section.header[number] if section.header else ""
        table.add_column(header, justify="right" if are_numbers else "left", style="bold" if number == 0 else "")
    for row in section.rows:
        table.add_row(*map(Text, row))
    return table


class ConsoleSink(Sink):
    """`prints_steps` adds a line per log interval, as in PyTorch's tutorials: `[2,  4000] loss: 1.421`."""

    def __init__(self, steps: Steps, first_step: int, global_images: int, *, prints_steps: bool = False) -> None:
        # a terminal, and neither a notebook nor a log for which someone has set FORCE_COLOR
        live = sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._console = Console(force_terminal=live, force_jupyter=False, soft_wrap=True, highlight=False, emoji=False)
        if not self._console.width:  # COLUMNS=0, which shows nothing
            self._console.width = 80
        self._total_epochs = math.ceil(steps.last / steps.per_epoch)
        self._steps_per_epoch, self._global_images, self._prints_steps = steps.per_epoch, global_images, prints_steps
        done, speed = TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[speed]}")
        times = TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn()
        columns = TextColumn("{task.description}"), BarColumn(), done, *times, speed
        shown = {"console": self._console, "disable": not self._console.is_terminal, "transient": True}
        self._progress = Progress(*columns, **shown, refresh_per_second=4)
        self._task = self._progress.add_task("training", total=steps.last, completed=first_step, speed="")
        self._progress.start()

    def line(self, text: str = "") -> None:
        self._console.print(text, markup=False)

    def step(self, row: StepRow) -> None:
        if self._prints_steps:
            self.line(f"[{row.epoch}, {row.step - (row.epoch - 1) * self._steps_per_epoch:5d}] loss: {row.loss:.3f}")
        speed = self._progress.tasks[self._task].speed
        images = f"{speed * self._global_images:,.0f} images/s" if speed else ""
        where = f"epoch {row.epoch}/{self._total_epochs}  loss {row.loss:.4f}  train accuracy {row.accuracy:.2%}"
        self._progress.update(self._task, completed=row.step, description=where, speed=images)

    def epoch(self, row: EpochRow) -> None:
        val = f"  val loss {row.val.loss:.4f} accuracy {row.val.accuracy:.2%}" if row.val else ""
        if row.val_averaged:
            val += f", averaged weights {row.val_averaged.accuracy:.2%}"
        skipped = f"  skipped {row.skipped} steps" if row.skipped else ""
        self.line(
            f"epoch {row.epoch}/{self._total_epochs}  train loss {row.train.loss:.4f} accuracy {row.train.accuracy:.2%}{val}"
            f"  lr {row.lr:.6f}  grad norm {row.grad_norm:.3f}  {row.train.throughput:,.0f} images/s{skipped}"
        )
        if routing := row.routing:
            shares = " ".join(f"{share:.1%}" for share in routing.shares)
            self.line(f"experts: tokens {shares}, dropped {routing.dropped:.2%}, balance loss {routing.balance_loss:.4f}")

    def event(self, what: str | Section) -> None:
        if isinstance(what, str):
            self.line(what)
        elif self._console.is_terminal:
            self._console.print(_table(what), soft_wrap=False)
        else:
            self.line("\n".join(plain_lines(what)))

    def close(self) -> None:
        self._progress.stop()


def open_sink(context: Context) -> ConsoleSink:
    prints_steps = "steps_per_print" in context.plan.ds_config
    return ConsoleSink(context.steps, context.state.step, context.plan.batch.global_images, prints_steps=prints_steps)
