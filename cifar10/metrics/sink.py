"""A sink takes what a run measures and says, row by row; only rank 0 has any."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cifar10.run.evaluation import SplitResult


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
