"""What a run has measured, on its way to people: rows go to sinks, and only rank 0 has any."""

from __future__ import annotations

import contextlib
import csv
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cifar10.files import written_whole


@dataclass(frozen=True)
class SplitResult:
    """A split's mean loss and accuracy (a fraction) over `images` images, each counted once, in `seconds` seconds."""

    loss: float
    accuracy: float
    images: int
    seconds: float

    @property
    def throughput(self) -> float:
        """Images per second."""
        return self.images / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class StepRow:
    """Means over the steps since the row before: one row of steps.csv."""

    step: int
    epoch: int  # the epoch under way, from 1
    loss: float
    accuracy: float
    grad_norm: float
    lr: float
    skipped: int  # steps skipped since the row before


@dataclass(frozen=True)
class EpochRow:
    """An epoch's end: training over the epoch (augmented images, moving weights), validation after it, and how it stands now.

    The watched loss is validation's, and the best accuracy too; where nothing is held out, both are training's.
    """

    epoch: int  # from 1
    train: SplitResult
    val: SplitResult | None
    grad_norm: float
    lr: float
    skipped: int
    best_loss: float = math.nan  # the lowest of the watched loss so far
    best_accuracy: float = math.nan
    waited: int = 0  # epochs since the watched loss improved


@dataclass(frozen=True)
class Steps:
    """How a run's epochs lie on the axis of its steps."""

    per_epoch: int
    last: int  # where the run ends, if it does not stop early

    def at_end_of(self, epoch: int) -> int:
        """The step at which the rows of an epoch (from 1) are written: its last one, or the run's."""
        return min(epoch * self.per_epoch, self.last)


@dataclass(frozen=True)
class Section:
    """A part of what is said about a run: a table in a terminal, lines that begin with the title elsewhere."""

    title: str
    rows: Sequence[tuple[str, ...]]
    header: tuple[str, ...] = ()  # for the terminal


class Sink:
    """Where rows go; the base takes everything and keeps nothing."""

    def step(self, row: StepRow) -> None: ...
    def epoch(self, row: EpochRow) -> None: ...
    def test(self, epoch: int, result: SplitResult) -> None: ...
    def event(self, what: str | Section) -> None: ...
    def finished(self, summary: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Metrics(Sink):
    """All sinks as one. Ranks other than 0 make it of no sinks, and need not ask which rank they are again.

    A sink that fails (a full disk, a closed pipe, a lost connection) is named on stderr and let go; training goes on.
    `notes` say where the rows go, if that is not plain.
    """

    def __init__(self, sinks: Sequence[Sink] = (), notes: Sequence[str] = ()) -> None:
        self._sinks = list(sinks)
        self.notes = tuple(notes)

    def _tell(self, method: str, *what: Any) -> None:
        for sink in list(self._sinks):
            try:
                getattr(sink, method)(*what)
            except Exception as error:
                self._sinks.remove(sink)
                with contextlib.suppress(OSError):
                    print(f"{type(sink).__name__} failed ({error}); training goes on without it", file=sys.stderr)
                if method != "close":
                    with contextlib.suppress(Exception):
                        sink.close()

    def step(self, row: StepRow) -> None:
        self._tell("step", row)

    def epoch(self, row: EpochRow) -> None:
        self._tell("epoch", row)

    def test(self, epoch: int, result: SplitResult) -> None:
        self._tell("test", epoch, result)

    def event(self, what: str | Section) -> None:
        self._tell("event", what)

    def say(self, lines: Iterable[str | Section]) -> None:
        """An event for each of `lines`, which are not even made where nobody listens."""
        for line in lines if self._sinks else ():
            self.event(line)

    def finished(self, summary: dict[str, Any]) -> None:
        self._tell("finished", summary)

    def close(self) -> None:
        self._tell("close")


class CsvSink(Sink):
    """metrics.csv (a row per epoch and split) and steps.csv (a row per log interval), flushed row by row.

    On a resume, rows later than the checkpoint are cut, and the files go on from there.
    """

    METRICS = ("epoch", "phase", "loss", "accuracy", "throughput")
    STEPS = tuple(f.name for f in fields(StepRow))

    def __init__(self, folder: Path, *, step: int, epoch: int) -> None:
        self._metrics_file = self._open(folder / "metrics.csv", self.METRICS, last=epoch)
        self._steps_file = self._open(folder / "steps.csv", self.STEPS, last=step)
        self._metrics, self._steps = csv.writer(self._metrics_file), csv.writer(self._steps_file)

    @staticmethod
    def _open(path: Path, header: Sequence[str], last: int) -> TextIO:
        """Open for appending after the rows whose first column is at most `last`; a row that a crash has torn is cut."""
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        rows = [line.split(",") for line in text.splitlines()[1:]]
        whole = (row for row in rows if len(row) == len(header) and row[0].isdecimal())
        kept = [row for row in whole if int(row[0]) <= last and row[1] != "test"]
        with written_whole(path) as file:
            file.write("".join(",".join(row) + "\r\n" for row in [header, *kept]).encode())
        return path.open("a", newline="", encoding="utf-8", buffering=1)

    def _split(self, epoch: int, phase: str, result: SplitResult) -> None:
        accuracy = f"{result.accuracy:.6f}"
        self._metrics.writerow((epoch, phase, f"{result.loss:.6f}", accuracy, f"{result.throughput:.1f}"))

    def step(self, row: StepRow) -> None:
        self._steps.writerow(f"{value:.7g}" if isinstance(value, float) else value for value in astuple(row))

    def epoch(self, row: EpochRow) -> None:
        self._split(row.epoch, "train", row.train)
        if row.val is not None:
            self._split(row.epoch, "val", row.val)

    def test(self, epoch: int, result: SplitResult) -> None:
        self._split(epoch, "test", result)

    def close(self) -> None:
        self._metrics_file.close()
        self._steps_file.close()


def plain_lines(section: Section) -> list[str]:
    """A section without a terminal: each row begins with the title and has its cells in columns."""
    widths = [max(map(len, column)) for column in zip_longest(*section.rows, fillvalue="")]
    cells = (map(str.ljust, row, widths) for row in section.rows)
    return [f"{section.title}: {'  '.join(row)}".rstrip() for row in cells]


def _table(section: Section) -> Table:
    """A section in a terminal: words to the left, numbers to the right."""
    table = Table(title=section.title, title_justify="left", box=box.ROUNDED, show_header=bool(section.header))
    for number, column in enumerate(zip_longest(*section.rows, fillvalue="")):
        are_numbers = all(re.fullmatch(r"[\d, ]*", cell) for cell in column)
        header = section.header[number] if section.header else ""
        table.add_column(header, justify="right" if are_numbers else "left", style="bold" if number == 0 else "")
    for row in section.rows:
        table.add_row(*map(Text, row))
    return table


class ConsoleSink(Sink):
    """With a terminal a live line with images/s and the time left; without, one line per epoch that greps well.

    `says_steps` adds a line per log interval, as PyTorch's tutorials print it: `[2,  4000] loss: 1.421`.
    """

    def __init__(
        self, total_steps: int, steps_per_epoch: int, first_step: int, global_images: int, *, says_steps: bool = False
    ) -> None:
        self._console = Console(soft_wrap=True, highlight=False, emoji=False)
        self._total_epochs = math.ceil(total_steps / steps_per_epoch)
        self._steps_per_epoch = steps_per_epoch
        self._says_steps = says_steps
        self._progress = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[speed]}"),
                console=self._console,
                refresh_per_second=4,
                transient=True,
            )
            self._task = self._progress.add_task("training", total=total_steps, completed=first_step, speed="")
            self._progress.start()
        self._global_images = global_images

    def line(self, text: str = "") -> None:
        self._console.print(text, markup=False)
        if not self._console.is_terminal:
            sys.stdout.flush()

    def step(self, row: StepRow) -> None:
        if self._says_steps:
            self.line(f"[{row.epoch}, {row.step - (row.epoch - 1) * self._steps_per_epoch:5d}] loss: {row.loss:.3f}")
        if self._progress is not None:
            speed = self._progress.tasks[self._task].speed
            self._progress.update(
                self._task,
                completed=row.step,
                description=f"epoch {row.epoch}/{self._total_epochs}  loss {row.loss:.4f}  train accuracy {row.accuracy:.2%}",
                speed=f"{speed * self._global_images:,.0f} images/s" if speed else "",
            )

    def epoch(self, row: EpochRow) -> None:
        val = f"  val loss {row.val.loss:.4f} accuracy {row.val.accuracy:.2%}" if row.val else ""
        skipped = f"  skipped {row.skipped} steps" if row.skipped else ""
        self.line(
            f"epoch {row.epoch}/{self._total_epochs}  train loss {row.train.loss:.4f} accuracy {row.train.accuracy:.2%}{val}"
            f"  lr {row.lr:.6f}  grad norm {row.grad_norm:.3f}  {row.train.throughput:,.0f} images/s{skipped}"
        )

    def event(self, what: str | Section) -> None:
        if isinstance(what, str):
            self.line(what)
        elif self._console.is_terminal:
            self._console.print(_table(what), soft_wrap=False)
        else:
            for line in plain_lines(what):
                self.line(line)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
