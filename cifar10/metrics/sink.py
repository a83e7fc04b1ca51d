"""Sinks receive what a run measures and reports, row by row. Only rank 0 has any; `open.py` opens them."""

import contextlib
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

from cifar10.plan import Plan
from cifar10.run.state import Routing, RunState, Sums
from cifar10.run.summary import SplitResult


@dataclass(frozen=True)
class StepRow:
    """Means over the steps since the previous row: one row of steps.csv."""

    step: int
    epoch: int  # the epoch in progress, from 1
    loss: float
    accuracy: float
    grad_norm: float
    lr: float
    skipped: int  # steps skipped since the previous row


@dataclass(frozen=True)
class EpochRow:
    """The end of an epoch: training during it (augmented images, changing weights), and validation after it.

    The watched loss and the best accuracy are validation's; without a validation split, training's.
    """

    epoch: int  # from 1
    train: SplitResult
    val: SplitResult | None
    grad_norm: float
    lr: float
    skipped: int
    best_loss: float = math.nan  # the lowest watched loss so far
    best_accuracy: float = math.nan
    waited: int = 0  # epochs since the watched loss improved
    val_averaged: SplitResult | None = None  # validation of the averaged weights, if there is an average
    routing: Routing | None = None  # during the epoch, of networks with experts

    @classmethod
    def of(cls, epoch: int, sums: Sums, lr: float, train: SplitResult, val: SplitResult | None, *others: Any) -> "EpochRow":
        """The row of an epoch's `sums`, which are of its training."""
        return cls(epoch, train, val, sums.mean_grad_norm, lr, sums.skipped, *others, routing=sums.routing)


@dataclass(frozen=True)
class Steps:
    """Where a run's epochs lie on its step axis."""

    per_epoch: int
    last: int  # the run's last step, unless it stops early

    def at_end_of(self, epoch: int) -> int:
        """The step at which the rows of an epoch (from 1) are written: its last, or the run's."""
        return min(epoch * self.per_epoch, self.last)


@dataclass(frozen=True)
class Context:
    """A run as its sinks are opened; each sink decides from it whether it is wanted."""

    plan: Plan
    folder: Path
    state: RunState  # where the run starts or resumes; sinks only read it
    steps: Steps

    @property
    def settings(self) -> dict[str, Any]:
        """Flat settings to compare runs by: the recipe's fields, and what changes most often in the DeepSpeed config."""
        plan, optimizer = self.plan, self.plan.ds_config.get("optimizer", {})
        batch = {"global_batch_size": plan.batch.global_images, "world_size": plan.batch.world_size}
        lr = optimizer.get("params", {}).get("lr")
        return {"recipe": plan.options.recipe, **plan.settings["recipe"], **batch, "lr": lr, "optimizer": optimizer.get("type")}


@dataclass(frozen=True)
class Section:
    """A titled table: rendered as one in a terminal, elsewhere printed as lines that begin with the title."""

    title: str
    rows: Sequence[tuple[str, ...]]
    header: tuple[str, ...] = ()  # for the terminal


class Sink:
    """Where rows go. The base class ignores everything; a sink overrides what it needs."""

    note = ""  # where to find the rows, if that is not obvious; printed at the start of the run

    def step(self, row: StepRow) -> None: ...
    def epoch(self, row: EpochRow) -> None: ...
    def test(self, epoch: int, result: SplitResult) -> None: ...
    def event(self, what: str | Section) -> None: ...
    def finished(self, summary: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class ScalarSink(Sink):
    """A sink of scalars over the run's step: step/*, train/*, val/*, test/*, final/*. A subclass has `steps` and `log`."""

    steps: Steps

    def log(self, prefix: str, step: int, **values: float) -> None:
        raise NotImplementedError

    def step(self, row: StepRow) -> None:
        means = {"loss": row.loss, "accuracy": row.accuracy, "gradient_norm": row.grad_norm}
        self.log("step", row.step, **means, learning_rate=row.lr, skipped=row.skipped)

    def epoch(self, row: EpochRow) -> None:
        step = self.steps.at_end_of(row.epoch)
        self.log("train", step, **row.train.measures, gradient_norm=row.grad_norm, epoch=row.epoch)
        if row.val is not None:
            self.log("val", step, **row.val.measures)
        if row.val_averaged is not None:
            self.log("val_averaged", step, **row.val_averaged.measures)
        if row.routing is not None:
            self.log("experts", step, **row.routing.measures)

    def test(self, epoch: int, result: SplitResult) -> None:
        self.log("test", self.steps.at_end_of(epoch), **result.measures)

    def finished(self, summary: dict[str, Any]) -> None:
        numbers = {k: v for k, v in summary.items() if isinstance(v, float | int) and not isinstance(v, bool)}
        self.log("final", summary["steps"], **numbers)


def report_failure(name: str, error: BaseException) -> None:
    """A failing sink never ends a run: it is reported in one line on stderr."""
    reason = " ".join(str(error).split()) or type(error).__name__
    with contextlib.suppress(Exception):
        print(f"{name} failed ({reason}); training continues without it", file=sys.stderr)


def failure(sink: Sink, verb: str, *what: Any) -> BaseException | None:
    """What `sink.verb(*what)` raises, of any kind: rich makes a SystemExit of a broken pipe. Only Ctrl-C goes through."""
    try:
        getattr(sink, verb)(*what)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error
    return None


class Metrics(Sink):
    """All sinks as one; without sinks on ranks other than 0, so that no caller needs to check the rank.

    A sink that fails (a full disk, a closed pipe, a lost connection) is reported and dropped.
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = list(sinks)
        self.notes = tuple(sink.note for sink in sinks if sink.note)

    def _forward(self, verb: str, *what: Any) -> None:
        for sink in list(self._sinks):
            if error := failure(sink, verb, *what):
                self._sinks.remove(sink)
                report_failure(type(sink).__name__, error)
                if verb != "close":
                    failure(sink, "close")

    step = partialmethod(_forward, "step")
    epoch = partialmethod(_forward, "epoch")
    test = partialmethod(_forward, "test")
    event = partialmethod(_forward, "event")
    finished = partialmethod(_forward, "finished")
    close = partialmethod(_forward, "close")

    def say(self, lines: Iterable[str | Section]) -> None:
        """An event for each of `lines`, which are not even computed where there are no sinks."""
        for line in lines if self._sinks else ():
            self.event(line)
