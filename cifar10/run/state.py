"""Training progress: the only mutable record of a run. Everything else is frozen, or owned by the engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, TypeVar

T = TypeVar("T")
LARGEST_COUNT = 2**53


@dataclass(frozen=True)
class Routing:
    """How the tokens of some steps were spread over the experts, in all layers of experts together."""

    balance_loss: float  # the auxiliary loss without its coefficient; per layer 1 if all experts get equal shares
    dropped: float  # the share of the choices that a full expert refused
    shares: tuple[float, ...]  # of the choices, per expert, before any was dropped

    @property
    def measures(self) -> dict[str, float]:
        shares = {f"share_{expert}": share for expert, share in enumerate(self.shares)}
        return {"balance_loss": self.balance_loss, "dropped": self.dropped, **shares}


@dataclass
class Sums:
    """Metrics summed over several steps; skipped steps are only counted."""

    steps: int = 0
    images: int = 0
    loss: float = 0.0  # sum over steps of the mean loss of the global batch
    correct: int = 0
    grad_norm: float = 0.0
    skipped: int = 0
    routed: list[float] = field(default_factory=list)  # with experts: [auxiliary loss, tokens dropped, tokens per expert ...]

    def add(self, images: int, loss: float, correct: int, grad_norm: float, routed: Sequence[float] = ()) -> None:
        """Add one applied step."""
        self.steps += 1
        self.images += images
        self.loss += loss
        self.correct += correct
        self.grad_norm += grad_norm
        self.routed = [sum(pair) for pair in zip_longest(self.routed, routed, fillvalue=0.0)]

    @property
    def mean_loss(self) -> float:
        return self.loss / self.steps if self.steps else float("nan")

    @property
    def accuracy(self) -> float:
        """From 0 to 1."""
        return self.correct / self.images if self.images else float("nan")

    @property
    def mean_grad_norm(self) -> float:
        return self.grad_norm / self.steps if self.steps else float("nan")

    @property
    def routing(self) -> Routing | None:
        """None for a network without experts."""
        if not self.routed:
            return None
        balance, dropped, *chosen = self.routed
        return Routing(balance / self.steps, dropped / sum(chosen), tuple(tokens / sum(chosen) for tokens in chosen))


def _plain(record: T) -> T:
    """Check the types and ranges of a record read from a file."""
    for field_ in dataclasses.fields(record):
        value, kind = getattr(record, field_.name), field_.type
        if kind == "int" and not (type(value) is int and -1 <= value < LARGEST_COUNT):
            raise ValueError(f"{field_.name} is {value!r}")
        if kind == "float" and type(value) not in (float, int):
            raise TypeError(f"{field_.name} is {value!r}")
    return record


@dataclass
class RunState:
    """Progress so far; data order and augmentation follow from `epoch` and `epoch_step`, so resuming needs no more."""

    step: int = 0  # optimizer steps so far, including skipped ones
    epoch: int = 0  # complete passes over the training split
    epoch_step: int = 0  # steps in the current epoch
    epoch_sums: Sums = field(default_factory=Sums)
    interval_sums: Sums = field(default_factory=Sums)  # since the last row of steps.csv
    first_epoch_sums: Sums = field(default_factory=Sums)
    last_epoch_sums: Sums = field(default_factory=Sums)
    first_val_accuracy: float = -1.0  # after the first epoch
    best_train_accuracy: float = -1.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    trained_images: int = 0
    train_seconds: float = 0.0  # wall time of training, without evaluation and checkpoints
    seconds_before_epoch: float = 0.0  # train_seconds at the start of the current epoch
    lr_factor: float = 1.0  # learning rate multiplier after plateaus
    best_loss: float = float("inf")  # validation loss, or training loss if no images are held out
    epochs_without_improvement: int = 0
    best_accuracy: float = -1.0  # of best_model, on its split
    best_step: int = -1
    best_is_averaged: bool = False  # best_model is the average of the weights
    resumed_at_steps: list[int] = field(default_factory=list)
    chain: str = ""  # the hash of the newest link in chain.jsonl

    def ends_epoch_of(self, *every_epochs: int) -> bool:
        """Whether an epoch has just ended whose number is a multiple of one of `every_epochs`, of which 0 has none."""
        return self.epoch_step == 0 and any(every and self.epoch % every == 0 for every in every_epochs)

    def remember_epoch(self, sums: Sums, val_accuracy: float | None) -> None:
        """Keep the first, last and best epoch's metrics for the summary."""
        if self.epoch == 0:
            self.first_epoch_sums, self.first_val_accuracy = sums, -1.0 if val_accuracy is None else val_accuracy
        self.last_epoch_sums = sums
        self.best_train_accuracy = max(self.best_train_accuracy, sums.accuracy)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunState:
        """The inverse of `as_dict`. Raises TypeError, KeyError or ValueError for invalid values."""
        keys = ("epoch_sums", "interval_sums", "first_epoch_sums", "last_epoch_sums")
        sums = {key: _plain(Sums(**values[key])) for key in keys}
        state = _plain(cls(**{**values, **sums}))
        if (
            not math.isfinite(state.lr_factor)
            or not isinstance(state.resumed_at_steps, list)
            or not isinstance(state.chain, str)
        ):
            raise ValueError(
                f"lr_factor {state.lr_factor!r}, resumed_at_steps {state.resumed_at_steps!r}, chain {state.chain!r}"
            )
        return state
