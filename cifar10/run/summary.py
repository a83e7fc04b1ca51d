"""summary.json: a run's status and results. Accuracies are fractions, and each name says its split."""

import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import psutil

from cifar10.config.values import is_a
from cifar10.data.dataset import Description
from cifar10.run.folder import damaged, read_json, write_json
from cifar10.run.state import RunState

FILE = "summary.json"
Status = Literal["running", "stopped", "failed", "finished"]
EndedBy = Literal["epochs", "max_steps", "early_stopping"]
TIERS = ("Excellent", "Good", "Fair", "Poor")  # the reference documents'


@dataclass(frozen=True)
class SplitResult:
    """Mean loss and accuracy over a split, each image counted once."""

    loss: float
    accuracy: float
    images: int
    seconds: float

    @property
    def throughput(self) -> float:
        """Images per second."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def measures(self) -> dict[str, float]:
        return {"loss": self.loss, "accuracy": self.accuracy, "throughput": self.throughput}


@dataclass(frozen=True)
class Summary:
    """The content of summary.json; None is what has not been measured."""

    status: Status
    recipe: str = "?"
    seed: int = 0
    world_size: int = 1
    epochs: float = 0.0
    steps: int = 0
    skipped_steps: int = 0
    train_accuracy: float | None = None  # of the last epoch, on augmented images
    train_loss: float | None = None
    first_train_accuracy: float | None = None  # of the first epoch
    first_train_loss: float | None = None
    first_val_accuracy: float | None = None
    best_train_accuracy: float | None = None
    val_accuracy: float | None = None  # of best_model
    best_step: int | None = None
    best_is_averaged: bool = False  # best_model is the average of the weights
    train_seconds: float = 0.0  # of training steps
    capture_seconds: float | None = None  # of this process, beside them: to capture CUDA graphs
    process_seconds: float = 0.0  # since the process started, imports included
    images_per_second: float | None = None
    resumed_at_steps: list[int] | None = None
    test_accuracy: float | None = None  # of best_model
    test_images: int | None = None
    test_seconds: float | None = None
    test_accuracy_tta: float | None = None  # the same with test-time augmentation
    test_tta_seconds: float | None = None
    quality: str | None = None
    balance_loss: float | None = None  # with experts, of the last epoch: the auxiliary loss, without its coefficient
    dropped_tokens: float | None = None  # the share of the tokens' choices that a full expert refused
    expert_shares: list[float] | None = None  # each expert's share of the tokens' choices
    peak_memory_mib: list[int] | None = None  # of each rank's process
    peak_gpu_memory_mib: list[int] | None = None
    weights_sha256: str | None = None  # of checkpoints/final
    ended_by: EndedBy | None = None
    reason: str | None = None  # why the run failed

    def is_complete(self, max_steps: int | None) -> bool:
        """Whether nothing is left to train; a run ended by --max-steps can go on to a larger --max-steps."""
        more_steps = self.ended_by == "max_steps" and (max_steps is None or max_steps > self.steps)
        return self.status == "finished" and not more_steps

    def write(self, folder: Path) -> None:
        """Write summary.json. A full disk does not end the run: it is reported, and the earlier file is kept."""
        try:
            write_json(folder / FILE, asdict(self))
        except OSError as error:
            print(f"{folder / FILE} could not be written: {error.strerror}", file=sys.stderr)


def read_summary(folder: Path) -> Summary | None:
    """The summary in a run's folder, or None. Raises UsageError for a damaged file."""
    content = read_json(folder / FILE)
    if content is None:
        return None
    required = ("status", "steps") if content.get("status") == "finished" else ("status",)
    for name, kind in get_type_hints(Summary).items():
        if (name in content or name in required) and not is_a(content.get(name), kind):
            raise damaged(folder / FILE, f"{name} is {str(content.get(name))[:60]}")
    return Summary(**{f.name: content[f.name] for f in fields(Summary) if f.name in content})


def has_finished(folder: Path, max_steps: int | None) -> bool:
    """Whether the run in a folder has come to its end, or to this many steps; if so, a line says it."""
    summary = read_summary(folder)
    finished = summary is not None and summary.is_complete(max_steps)
    if finished:
        print(f"{folder} holds a finished run; its results are in its summary.json", flush=True)
    return finished


def quality_tier(test_accuracy: float, bounds: tuple[float, float, float] | None) -> str | None:
    """The documents' word for a test accuracy (a fraction); `bounds` are the lower ends of all tiers but the last."""
    if bounds is None:
        return None
    return next(name for bound, name in zip((*bounds, 0.0), TIERS, strict=True) if test_accuracy >= bound)


def test_fields(results: dict[str, SplitResult], dataset: Description) -> dict[str, Any]:
    """The fields of a summary for the test's results: `test`, and `test_tta` if there is one."""
    test, augmented = results.get("test"), results.get("test_tta")
    if test is None:
        return {"test_images": 0}
    found = {"test_accuracy": test.accuracy, "test_images": test.images, "test_seconds": test.seconds}
    if augmented:
        found |= {"test_accuracy_tta": augmented.accuracy, "test_tta_seconds": augmented.seconds}
    return {**found, "quality": quality_tier(test.accuracy, dataset.tiers)}


def summarize(state: RunState, steps_per_epoch: int, status: Status, **known: Any) -> Summary:
    """The summary of a run at `state`."""
    first, train = state.first_epoch_sums, state.last_epoch_sums
    if routing := train.routing:
        known |= {"balance_loss": routing.balance_loss, "dropped_tokens": routing.dropped, "expert_shares": [*routing.shares]}
    return Summary(
        status=status,
        epochs=state.step / steps_per_epoch,
        steps=state.step,
        skipped_steps=state.skipped_steps,
        train_accuracy=train.accuracy if train.images else None,
        train_loss=train.mean_loss if train.steps else None,
        first_train_accuracy=first.accuracy if first.images else None,
        first_train_loss=first.mean_loss if first.steps else None,
        first_val_accuracy=state.first_val_accuracy if state.first_val_accuracy >= 0 else None,
        best_train_accuracy=state.best_train_accuracy if state.best_train_accuracy >= 0 else None,
        val_accuracy=state.best_accuracy if state.best_accuracy >= 0 else None,
        best_step=state.best_step if state.best_step >= 0 else None,
        best_is_averaged=state.best_is_averaged,
        train_seconds=state.train_seconds,
        process_seconds=time.time() - psutil.Process().create_time(),
        images_per_second=state.trained_images / state.train_seconds if state.train_seconds else None,
        resumed_at_steps=state.resumed_at_steps,
        **known,
    )
