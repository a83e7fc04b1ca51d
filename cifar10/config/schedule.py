"""Learning rate schedules as values: `--lr-schedule "step(30, 0.1)"`, or a recipe's `lr_schedule`.

Each is a closed form of the position in the run, equal to torch's scheduler of that name, so there is no state to save. To add
one, write a class here; everything else finds it by its name. Positions are in epochs, counted from the start of the run.
"""

import functools
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from cifar10 import UsageError
from cifar10.config import values
from cifar10.config.values import Value, is_positive, require


@dataclass(frozen=True)
class Schedule(Value):
    """A learning rate schedule. With `per_epoch` the rate stays for a whole epoch, as in the reference document."""

    per_epoch: bool = field(default=False, kw_only=True)

    @classmethod
    def name(cls) -> str:
        return re.sub("(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()

    def warmup(self, wanted: float, epochs: float) -> float:
        """Epochs of linear warmup before it: those of --warmup-epochs, at most a tenth of the run."""
        return min(wanted, epochs / 10)

    def factor(self, epoch: float, warmup: float, epochs: float) -> float:
        """What the base rate is multiplied by at `epoch`, after the warmup, in a run of `epochs`."""
        raise NotImplementedError

    def describe(self) -> str:
        """What it does, in a few words."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ValueError unless the arguments are in range."""


def _half_cosine(progress: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Constant(Schedule):
    """The base rate."""

    def factor(self, epoch: float, warmup: float, epochs: float) -> float:
        return 1.0

    def describe(self) -> str:
        return "constant"


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine down to 0 (Loshchilov & Hutter 2017, arXiv 1608.03983)."""

    def factor(self, epoch: float, warmup: float, epochs: float) -> float:
        return _half_cosine((epoch - warmup) / (epochs - warmup))

    def describe(self) -> str:
        return "cosine decay to 0"


@dataclass(frozen=True)
class Linear(Schedule):
    """A line down to 0."""

    def factor(self, epoch: float, warmup: float, epochs: float) -> float:
        return 1 - (epoch - warmup) / (epochs - warmup)

    def describe(self) -> str:
        return "linear decay to 0"


@dataclass(frozen=True)
class Polynomial(Schedule):
    """A line down to 0, raised to a power."""

    power: float

    def factor(self, epoch: float, warmup: float, epochs: float) -> float:
        return (1 - (epoch - warmup) / (epochs - warmup)) ** self.power

    def check(self) -> None:
        require(is_positive(self.power), "power must be above 0")

    def describe(self) -> str:
        return f"polynomial decay to 0 with power {self.power:g}"


@dataclass(frozen=True)
class Exponential(Schedule):
    """Multiplied by gamma over each epoch after the warmup, evenly."""

    gamma: float

    def factor(self, epoch: float, warmup: float, epochs: float) -> float:
        return self.gamma ** (epoch - warmup)

    def check(self) -> None:
        require(0 < self.gamma <= 1, "gamma must be above 0 and at most 1")

    def describe(self) -> str:
        return f"exponential decay by {self.gamma:g} per epoch"


@dataclass(frozen=True)
class Step(Schedule):
    """Multiplied by gamma after every `step_size` epochs."""

    step_size: float
    gamma: float = 0.1

    def factor(self, epoch: float, warmup: float, epochs: float) -> float:
        return self.gamma ** math.floor(epoch / self.step_size)

    def check(self) -> None:
        require(is_positive(self.step_size), "step_size must be above 0")
        require(0 < self.gamma <= 1, "gamma must be above 0 and at most 1")

    def describe(self) -> str:
        return f"times {self.gamma:g} every {self.step_size:g} epochs"


@dataclass(frozen=True)
class Multistep(Schedule):
    """Multiplied by gamma after each of these epochs."""

    milestones: tuple[float, ...]
    gamma: float = 0.1

    def factor(self, epoch: float, warmup: float, epochs: float) -> float:
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)

    def check(self) -> None:
        rising = self.milestones and list(self.milestones) == sorted(set(self.milestones))
        require(bool(rising) and all(map(is_positive, self.milestones)), "milestones must be rising numbers above 0")
        require(0 < self.gamma <= 1, "gamma must be above 0 and at most 1")

    def describe(self) -> str:
        return f"times {self.gamma:g} after epochs {', '.join(f'{epoch:g}' for epoch in self.milestones)}"


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Up to the base rate for a share of the run, then down, both as cosines; instead of a warmup (arXiv 1708.07120).

    The momentum stays as it is; torch's OneCycleLR can cycle it too.
    """

    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def warmup(self, wanted: float, epochs: float) -> float:
        return 0.0

    def factor(self, epoch: float, warmup: float, epochs: float) -> float:
        first, turn, now = 1 / self.div_factor, self.pct_start * epochs, epoch
        if now < turn:
            return 1 + (first - 1) * _half_cosine(now / turn)
        last = first / self.final_div_factor
        return last + (1 - last) * _half_cosine((now - turn) / (epochs - turn))

    def check(self) -> None:
        require(0 < self.pct_start < 1, "pct_start must be between 0 and 1")
        sound = all(1 <= factor < math.inf for factor in (self.div_factor, self.final_div_factor))
        require(sound, "div_factor and final_div_factor must be at least 1")

    def describe(self) -> str:
        start, down = f"1/{self.div_factor:g} of it", f"1/{self.div_factor * self.final_div_factor:g}"
        return f"one cycle from {start} up for {self.pct_start:.0%} of the run, then down to {down}, without another warmup"


@dataclass(frozen=True)
class Restarts(Schedule):
    """Cosines down to 0, of T_0 epochs after the warmup, each T_mult times as long as the one before (arXiv 1608.03983)."""

    T_0: float
    T_mult: int = 1

    def factor(self, epoch: float, warmup: float, epochs: float) -> float:
        length, start = self.T_0, warmup
        if self.T_mult == 1:
            return _half_cosine((epoch - warmup) % length / length)
        while epoch - start >= length:
            start, length = start + length, length * self.T_mult
        return _half_cosine((epoch - start) / length)

    def check(self) -> None:
        require(is_positive(self.T_0), "T_0 must be above 0")
        require(self.T_mult >= 1, "T_mult must be at least 1")

    def describe(self) -> str:
        longer = f", each {self.T_mult} times as long as the one before" if self.T_mult > 1 else ""
        return f"cosine decay to 0 with restarts after {self.T_0:g} epochs{longer}"


@functools.cache
def parse(text: str) -> Schedule:
    """The schedule that `--lr-schedule` names. Raises UsageError, one line with an example."""
    try:
        schedule = values.read(text, Schedule, "schedule")
        schedule.check()
    except ValueError as error:
        raise UsageError(
            f'invalid value for --lr-schedule: {text}: {error}; for example --lr-schedule "step(30, 0.1)"'
        ) from None
    return schedule


def with_old_settings(schedule: str, shape: str | None, moves: str | None) -> str:
    """The schedule with the settings of 0.2 applied: lr_shape (cosine or linear), lr_moves (per-step or per-epoch)."""
    found = parse(schedule)
    found = found if shape is None else replace(parse(shape), per_epoch=found.per_epoch)
    return str(found if moves is None else replace(found, per_epoch=moves == "per-epoch"))


def modern(settings: dict[str, Any]) -> dict[str, Any]:
    """A recipe's settings as version 0.2 saved them -> as this one does; others stay as they are."""
    kept = {key: value for key, value in settings.items() if key not in ("lr_shape", "lr_moves")}
    shape, moves = settings.get("lr_shape", "cosine"), settings.get("lr_moves", "per-step")
    if len(kept) == len(settings) or shape not in ("cosine", "linear") or moves not in ("per-step", "per-epoch"):
        return settings
    return {"lr_schedule": with_old_settings("cosine", shape, moves), **kept}


def get_lr_schedule(epoch: int, initial_lr: float, warmup_epochs: float = 5, total_epochs: float = 50) -> float:
    """The reference document's learning rate in whole epochs, counted from 0: a linear warmup, then a cosine towards 0.

    Kept for those who import it from the script; a run's own rate is the script's `lr_multiplier`.

    >>> [float(f"{get_lr_schedule(e, 0.01, 5, 50):.4g}") for e in (0, 25, 49)]
    [0.002, 0.005868, 1.218e-05]
    """
    if epoch < warmup_epochs:
        return initial_lr * min(1.0, (epoch + 1) / warmup_epochs)
    progress = (epoch - warmup_epochs) / (total_epochs - warmup_epochs)
    return initial_lr * 0.5 * (1 + math.cos(math.pi * progress))
