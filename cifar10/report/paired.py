"""Is B better than A? Differences of paired runs, and a test that may be looked at after every pair.

The test is the scale-invariant mixture of Wang and Ramdas, "Anytime-valid t-tests and confidence sequences for Gaussian means
with unknown variance" (2024, arXiv:2310.03722), which goes back to Lai (1976); as a Bayes factor of a normal prior on
mean / standard deviation against a mean of 0 it is Gönen's (2005). For normal differences of any variance its chance of ever
reaching 1 / error rate, if there is no difference, is at most the error rate: at every n, however often one looks, and however
one stops. At 5% it cannot decide before the fifth pair.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from cifar10.run.record import Record

ERROR_RATE = 0.05
SCALE = 1.0  # the prior's standard deviation of mean / standard deviation


def log_evidence(differences: np.ndarray) -> np.ndarray:
    """The logarithm of the evidence against a mean of 0 after each of the differences [..., n], in the same shape."""
    n = np.arange(1, differences.shape[-1] + 1)
    mean = differences.cumsum(-1) / n
    squares = np.maximum((differences**2).cumsum(-1) - n * mean**2, 0)  # around the mean
    ratio = n * mean**2 / np.maximum(squares, 1e-12 * np.maximum(n * mean**2, 1e-300))  # t squared / (n - 1)
    prior = 1 + n * SCALE**2
    return np.where(n > 1, n / 2 * (np.log1p(ratio) - np.log1p(ratio / prior)) - np.log(prior) / 2, 0.0)


def half_width(n: int, sd: float, error_rate: float) -> float:
    """Of the interval of means that `n` differences with this standard deviation do not exclude; infinite for few."""
    prior = 1 + n * SCALE**2
    power = (math.sqrt(prior) / error_rate) ** (2 / n)
    return sd * math.sqrt((power - 1) / (1 - power / prior) * (n - 1) / n) if n > 1 and power < prior else math.inf


@dataclass(frozen=True)
class Differences:
    """B - A of each pair, in the order in which they were measured, as fractions of the validation images."""

    values: tuple[float, ...]
    error_rate: float

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else 0.0

    def interval(self, n: int | None = None) -> tuple[float, float]:
        """The means that the first `n` pairs, or all, do not exclude."""
        known = self.values[:n]
        if len(known) < 2:
            return -math.inf, math.inf
        half = half_width(len(known), float(np.std(known, ddof=1)), self.error_rate)
        return float(np.mean(known)) - half, float(np.mean(known)) + half

    @property
    def decided_after(self) -> int | None:
        """The number of pairs after which one was better; None if that is not decided."""
        reached = np.flatnonzero(log_evidence(np.array(self.values)) >= -math.log(self.error_rate)) if self.values else []
        return int(reached[0]) + 1 if len(reached) else None

    @property
    def b_is_better(self) -> bool:
        """At the time of the decision."""
        return sum(self.values[: self.decided_after]) > 0

    @property
    def in_points(self) -> str:
        """`+0.31 points, 95% interval +0.05 to +0.57, n = 12 pairs`"""
        if not self.n:
            return "not measured, as no epoch is that short"
        low, high = (100 * end for end in self.interval())
        within = f"{100 * (1 - self.error_rate):.4g}% interval"
        found = f"{within} {low:+.2f} to {high:+.2f}" if math.isfinite(high) else "too few pairs for an interval"
        return f"{100 * self.mean:+.2f} points, {found}, n = {self.n} pair{'s' * (self.n != 1)}"


@dataclass(frozen=True)
class Pairing:
    """Two experiments on the same validation images, and their runs pair by pair."""

    a: str
    b: str
    runs: tuple[tuple[Record, Record], ...]
    error_rate: float = ERROR_RATE

    def _of(self, values: Sequence[tuple[float | None, float | None]]) -> Differences:
        return Differences(tuple(b - a for a, b in values if a is not None and b is not None), self.error_rate)

    @property
    def at_the_end(self) -> Differences:
        """Of the best models: the difference that is tested."""
        return self._of([(a.number("val_accuracy"), b.number("val_accuracy")) for a, b in self.runs])

    @property
    def at_equal_epochs(self) -> tuple[Differences, float]:
        """Of the weights after as many epochs as the shorter run has, and that number."""
        last = min((rows[-1]["epoch"] for pair in self.runs for run in pair if (rows := run.epochs.get("val"))), default=0)
        return self._of([(accuracy_after(a, last), accuracy_after(b, last)) for a, b in self.runs]), last

    @property
    def at_equal_minutes(self) -> tuple[Differences, float]:
        """Of the best models after as many minutes of training as the quicker run of a pair took, and their mean."""
        limits = [min(run.number("train_seconds") or 0 for run in pair) for pair in self.runs]
        best = [(best_within(a, end), best_within(b, end)) for (a, b), end in zip(self.runs, limits, strict=True)]
        return self._of(best), float(np.mean(limits or [0])) / 60

    @property
    def verdict(self) -> str:
        """Which is better and by how much, or which difference could still have been missed."""
        found = self.at_the_end
        if n := found.decided_after:
            better, worse = (self.b, self.a) if found.b_is_better else (self.a, self.b)
            return f"{better} is better than {worse}, decided after {n} pairs; {self.b} - {self.a}: {found.in_points}"
        low, high = (100 * end for end in found.interval())
        missed = f"up to {max(high, 0):.2f} points for {self.b} or {max(-low, 0):.2f} for {self.a}"
        still = f"{missed} could still have been missed" if math.isfinite(high) else "any difference could have been missed"
        return f"not decided between {self.a} and {self.b}: {self.b} - {self.a}: {found.in_points}; {still}"


def accuracy_after(run: Record, epoch: float) -> float | None:
    """The validation accuracy of the weights at the end of an epoch."""
    return next((row["accuracy"] for row in run.epochs.get("val", ()) if row["epoch"] == epoch), None)


def best_within(run: Record, seconds: float) -> float | None:
    """The best validation accuracy within so many seconds of training; an epoch's time is in proportion to its images and
    throughput."""
    train, total, epochs = run.epochs.get("train", []), run.number("train_seconds") or 0, run.number("epochs") or 0
    shares = [min(1, epochs - row["epoch"] + 1) / row["throughput"] if row["throughput"] > 0 else 0 for row in train]
    ends = np.cumsum(shares) / (sum(shares) or 1) * total
    at = {row["epoch"]: end for row, end in zip(train, ends, strict=True)}
    reached = [row["accuracy"] for row in run.epochs.get("val", ()) if at.get(row["epoch"], math.inf) <= seconds * (1 + 1e-9)]
    return max(reached, default=None)


def _split(run: Record) -> tuple[str, ...]:
    return tuple(repr(run.settings.get(key)) for key in ("dataset", "val_images", "split_seed"))


def by_seed(labeled: Sequence[tuple[str, Sequence[Record]]]) -> list[Pairing]:
    """The finished runs of each two experiments with the same validation images, paired where they have the same seed."""
    found = []
    for (a, ours), (b, theirs) in combinations(labeled, 2):
        one, other = ({r.settings.get("seed"): r for r in them if r.is_finished} for them in (ours, theirs))
        runs = tuple((one[seed], other[seed]) for seed in one if seed in other and _split(one[seed]) == _split(other[seed]))
        found += [(a, b, runs)] if len(runs) > 1 else []
    return [Pairing(a, b, runs, ERROR_RATE / len(found)) for a, b, runs in found]
