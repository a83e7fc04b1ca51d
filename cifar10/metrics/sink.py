"""Sinks receive what a run measures and says, row by row. Only rank 0 has any; `open.py` opens them."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar10.plan import Plan
from cifar10.run.state import RunState
from cifar10.run.summary import SplitResult


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
class Context:
    """A run as it stands when its sinks are opened, from which each decides whether it is wanted."""

    plan: Plan
    folder: Path
    state: RunState  # where the run starts or resumes; sinks only read it
    steps: Steps

    @property
    def settings(self) -> dict[str, Any]:
        """Flat settings to compare runs by: the recipe's fields, and what changes most often in DeepSpeed's JSON."""
        plan, optimizer = self.plan, self.plan.ds_config.get("optimizer", {})
        batch = {"global_batch_size": plan.batch.global_images, "world_size": plan.batch.world_size}
        lr = optimizer.get("params", {}).get("lr")
        return {"recipe": plan.options.recipe, **plan.settings["recipe"], **batch, "lr": lr, "optimizer": optimizer.get("type")}


@dataclass(frozen=True)
class Section:
    """A titled table: drawn as one in a terminal, elsewhere printed as lines that begin with the title."""

    title: str
    rows: Sequence[tuple[str, ...]]
    header: tuple[str, ...] = ()  # for the terminal


class Sink:
    """Where rows go. The base ignores everything; a sink overrides the verbs it cares about."""

    note = ""  # where to look at the rows, if that is not obvious; printed at the start of the run

    def step(self, row: StepRow) -> None: ...
    def epoch(self, row: EpochRow) -> None: ...
    def test(self, epoch: int, result: SplitResult) -> None: ...
    def event(self, what: str | Section) -> None: ...
    def finished(self, summary: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def report_failure(name: str, error: Exception) -> None:
    """A sink is never worth a run: its failure is one line on stderr."""
    reason = " ".join(str(error).split()) or type(error).__name__
    with contextlib.suppress(OSError):
        print(f"{name} failed ({reason}); training goes on without it", file=sys.stderr)


class Metrics(Sink):
    """All sinks as one. Ranks other than 0 have one without sinks, so nobody needs to ask for the rank.

    A sink that fails (a full disk, a closed pipe, a lost connection) is named on stderr and dropped; training goes on.
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = list(sinks)
        self.notes = tuple(sink.note for sink in sinks if sink.note)

    def _forward(self, verb: str, *what: Any) -> None:
        for sink in list(self._sinks):
            try:
                getattr(sink, verb)(*what)
            except Exception as error:
                self._sinks.remove(sink)
                report_failure(type(sink).__name__, error)
                if verb != "close":
                    with contextlib.suppress(Exception):
                        sink.close()

    def step(self, row: StepRow) -> None:
        self._forward("step", row)

    def epoch(self, row: EpochRow) -> None:
        self._forward("epoch", row)

    def test(self, epoch: int, result: SplitResult) -> None:
        self._forward("test", epoch, result)

    def event(self, what: str | Section) -> None:
        self._forward("event", what)

    def say(self, lines: Iterable[str | Section]) -> None:
        """An event for each of `lines`, which is not even iterated where there are no sinks."""
        for line in lines if self._sinks else ():
            self.event(line)

    def finished(self, summary: dict[str, Any]) -> None:
        self._forward("finished", summary)

    def close(self) -> None:
        self._forward("close")
