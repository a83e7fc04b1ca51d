"""main.py --budget 60s: the recipe and the number of epochs that promise the most in that time on this machine.

recipes/frontier.json says how accurate recipes are after how many epochs, as runs in records/ have measured it
(`python -m cifar10 frontier`). What they cost on this machine is measured when the ranks start (commands/budget.py). The
choice is written to budget.json in the run's folder, as flags of an ordinary run, which the same command continues.
"""

import bisect
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cifar10 import UsageError, at_home
from cifar10.config.cli import early_value
from cifar10.config.recipe import PROJECT, Recipe, load
from cifar10.run.folder import damaged, holds_training, read_json, write_json
from cifar10.run.summary import FILE as SUMMARY
from cifar10.run.summary import read_summary

FRONTIER = PROJECT / "recipes" / "frontier.json"
FILE = "budget.json"
UNITS = {"s": 1, "m": 60, "h": 3600}
LEAST_RESERVE, MOST_RESERVE = 0.04, 0.15  # shares of the time left after the probe that are not planned with

_LEFT_TO_THE_USER = {"seed", "split_seed", "dataset", "mean", "std"}
_OPTIONS = "recipe deepspeed_config set lr micro_batch_size global_batch_size precision max_steps"
DECIDED = {"--" + name.replace("_", "-") for name in {f.name for f in fields(Recipe)} - _LEFT_TO_THE_USER | {*_OPTIONS.split()}}


def seconds(text: str) -> float:
    """`90s`, `3m` or `0.5h` in seconds. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found or not float(found[1]):
        raise UsageError(f"invalid value for --budget: {text}, expected a time such as 60s, 3m or 1h")
    return float(found[1]) * UNITS[found[2]]


def refuse_decided(flags: Sequence[str]) -> None:
    """Raise UsageError for the first flag that sets what --budget decides."""
    names = (re.sub("^--no-", "--", word.partition("=")[0].replace("_", "-")) for word in flags if word.startswith("--"))
    if flag := next((name for name in names if name in DECIDED), None):
        raise UsageError(
            f"--budget chooses the recipe and all its settings, and {flag} is one of them; leave out one of the two"
        )


# --- what is known of the recipes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Runs of a recipe that took this many epochs, and their mean accuracy."""

    epochs: float
    accuracy: float
    n: int
    split: str  # val; test for recipes that hold nothing out
    views: float  # time of a test with test-time augmentation, relative to one without


@dataclass(frozen=True)
class Candidate:
    """A recipe, and its points by rising epochs."""

    recipe: str
    flops: float  # of a forward pass of one image
    flags: tuple[str, ...]  # beside --recipe
    points: tuple[Point, ...]

    @cached_property
    def settings(self) -> Recipe:
        return load(self.recipe).recipe

    def accuracy(self, epochs: float) -> float:
        """Interpolated over the logarithm of the epochs; after more than were measured, that of the longest runs."""
        known = [math.log(point.epochs) for point in self.points]
        return float(np.interp(math.log(epochs), known, [point.accuracy for point in self.points]))

    def around(self, epochs: float) -> list[Point]:
        """The measured points that an accuracy comes from: one, or two."""
        below = [point for point in self.points if point.epochs <= epochs]
        above = [point for point in self.points if point.epochs >= epochs]
        return list(dict.fromkeys([*below[-1:], *above[:1]]))

    def views(self, epochs: float) -> float:
        """The cost of testing, in passes over the test images: of the points around, the larger."""
        return 1 + max(point.views for point in self.around(epochs))

    def first_epochs(self, epochs: float) -> tuple[int, ...]:
        """The epochs of each of the recipe's first sizes, in a run of this many."""
        return tuple(max(1, int(epochs * n / self.settings.epochs)) for n in self.settings.first_epochs)

    def flags_for(self, epochs: float) -> list[str]:
        """The flags of an ordinary run."""
        first = ["--first-epochs", *map(str, self.first_epochs(epochs))] if self.settings.first_epochs else []
        return ["--recipe", self.recipe, "--epochs", f"{epochs:.6g}", *first, *self.flags]


def read_frontier(file: Path | None = None) -> list[Candidate]:
    """The candidates, those with the least arithmetic first. Raises UsageError for a damaged file."""
    try:
        found = [
            Candidate(one["recipe"], one["flops"], tuple(one["flags"]), tuple(Point(**point) for point in one["points"]))
            for one in json.loads((file or FRONTIER).read_text(encoding="utf-8"))["candidates"]
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{file or FRONTIER} cannot be used ({error}); write it again: python -m cifar10 frontier") from None
    return sorted(found, key=lambda candidate: candidate.flops)


# --- what they cost on a machine ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a candidate takes on one machine, in seconds."""

    start: float  # to load the images and build the engine; saving and closing too
    steps: tuple[float, ...]  # one training step at each size of its images, the last at full size
    steps_per_epoch: int
    validation: float  # a pass over the held-out images; 0 without
    test: float  # a pass over the test images, without further views

    def of(self, candidate: Candidate, steps: int) -> float:
        """From the start of a run of `steps` steps to its test accuracy."""
        epochs, left, total = steps / self.steps_per_epoch, steps, self.start
        for first, step in zip(candidate.first_epochs(epochs), self.steps, strict=False):
            now = min(left, first * self.steps_per_epoch)
            total, left = total + now * step, left - now
        return total + left * self.steps[-1] + math.ceil(epochs) * self.validation + candidate.views(epochs) * self.test

    def most_steps(self, candidate: Candidate, limit: float) -> int | None:
        """The longest run within `limit` seconds, of at least the epochs that were measured; None if none fits."""
        fewest = math.ceil(candidate.points[0].epochs * self.steps_per_epoch)
        lengths = range(fewest, max(fewest, int((limit - self.start) / min(self.steps))) + 1)
        steps = fewest - 1 + bisect.bisect_right(lengths, limit, key=lambda steps: self.of(candidate, steps))
        while steps >= fewest and self.of(candidate, steps) > limit:  # another epoch at a first size makes a run shorter
            steps -= 1
        return steps if steps >= fewest else None

    def least(self, candidate: Candidate) -> float:
        """The shortest run whose accuracy is known."""
        return self.of(candidate, math.ceil(candidate.points[0].epochs * self.steps_per_epoch))


def reserve(spread: float) -> float:
    """The share of the time left that is not planned with: twice the relative standard error of the probe, within bounds."""
    return min(MOST_RESERVE, max(LEAST_RESERVE, 2 * spread))


@dataclass(frozen=True)
class Choice:
    """What to train, and what is expected of it."""

    budget: str
    flags: tuple[str, ...]
    accuracy: float
    expected: str  # the accuracy in words
    seconds: float  # from the start of main.py to the test accuracy
    reserve: float

    @classmethod
    def read(cls, folder: Path, budget: str) -> "Choice | None":
        """The choice of an earlier start in this folder. Raises UsageError if it holds another run."""
        content = read_json(folder / FILE)
        if content is None:
            if holds_training(folder):
                raise UsageError(f"--output-dir {folder} holds a run that was started without --budget; choose another")
            return None
        try:
            choice = cls(**{**content["choice"], "flags": tuple(content["choice"]["flags"])})
        except (KeyError, TypeError):
            raise damaged(folder / FILE, "no choice") from None
        if choice.budget != budget:
            raise UsageError(
                f"--output-dir {folder} holds a run of --budget {choice.budget}; choose another, or leave out --budget"
            )
        return choice

    def write(self, folder: Path, **facts: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, {"choice": asdict(self), **facts})


def choose(budget: str, frontier: Sequence[Candidate], costs: Mapping[str, Cost], spread: float, gone: float) -> Choice:
    """The best choice for what is left of the budget, `gone` seconds after its start, on a machine with these costs.

    `spread` is the relative standard error of the measured steps. Raises UsageError if no run fits that is long enough.
    """
    share = reserve(spread)
    limit = (seconds(budget) - gone) * (1 - share)
    fitting = []
    for candidate in frontier:
        cost = costs.get(candidate.recipe)
        steps = cost.most_steps(candidate, limit) if cost else None
        if cost and steps:
            epochs = steps / cost.steps_per_epoch
            fitting.append((candidate.accuracy(epochs), candidate, epochs, cost.of(candidate, steps)))
    if not fitting:
        shortest = min(cost.least(candidate) for candidate in frontier if (cost := costs.get(candidate.recipe)))
        least = math.ceil(gone + shortest / (1 - share))
        raise UsageError(f"--budget {budget} is too short for this machine, which needs {least}s at least: --budget {least}s")
    accuracy, candidate, epochs, needed = max(fitting, key=lambda one: one[0])
    measured = (f"{p.accuracy:.1%} ({p.split}) after {p.epochs:g} epochs, n = {p.n}" for p in candidate.around(epochs))
    expected = f"about {accuracy:.1%} on CIFAR-10; measured: {'; '.join(measured)}"
    return Choice(budget, tuple(candidate.flags_for(epochs)), accuracy, expected, gone + needed, share)


def flags_to_check(budget: str, flags: Sequence[str]) -> list[str]:
    """Flags that make a whole command of these: the choice of an earlier start in their --output-dir, else some candidate's."""
    folder = early_value(at_home(list(flags)), "--output-dir") or early_value(at_home(list(flags)), "--output_dir")
    choice = Choice.read(Path(folder), budget) if folder else None
    return list(choice.flags) if choice else read_frontier()[0].flags_for(1.0)


def verdict(budget: str, folder: Path, began: float) -> str | None:
    """How long a run that began at this Unix time took to its test accuracy, after which its summary was written.

    None if it is not finished, and if it was stopped on the way: its time says nothing.
    """
    summary = read_summary(folder)
    if not summary or summary.status != "finished" or summary.resumed_at_steps:
        return None
    used, given = (folder / SUMMARY).stat().st_mtime - began, seconds(budget)
    if used <= given:
        return f"budget {budget}: the test accuracy was known after {used:.1f} s, {used / given:.0%} of the budget"
    return (
        f"budget {budget}: the test accuracy was known after {used:.1f} s, {used - given:.1f} s too late: the machine was"
        " slower than measured; the run was not cut short, because its learning rate follows a schedule"
    )
