"""summary.json: how a run stands and what it measured. Accuracies are fractions, and every one carries its split."""

from __future__ import annotations

import time
from typing import Any

import psutil

from cifar10.data.dataset import DataSet
from cifar10.run.evaluation import SplitResult
from cifar10.run.state import RunState

TIERS = ("Excellent", "Good", "Fair", "Poor")  # the reference documents'


def quality_tier(test_accuracy: float, least: tuple[float, float, float] | None) -> str | None:
    """The tier of an accuracy (a fraction) on test images: `least` are those of all tiers but the last; None has no tiers."""
    if least is None:
        return None
    return next(name for bound, name in zip((*least, 0.0), TIERS, strict=True) if test_accuracy >= bound)


def tested(results: dict[str, SplitResult], dataset: DataSet) -> dict[str, Any]:
    """What the test came to, for summary.json; None where there was none. `test_tta` is that of several views an image."""
    test, augmented = results.get("test"), results.get("test_tta")
    if test is None:
        return {"test_accuracy": None, "test_images": 0, "quality": None}
    quality = quality_tier(test.accuracy, dataset.tiers)
    summary = {"test_accuracy": test.accuracy, "test_images": test.images, "test_seconds": test.seconds, "quality": quality}
    if augmented:
        summary |= {"test_accuracy_tta": augmented.accuracy, "test_tta_seconds": augmented.seconds}
    return summary


def summary_of(state: RunState, steps_per_epoch: int) -> dict[str, Any]:
    """How a run stands, for summary.json: train accuracy and loss of the last epoch, val accuracy of best_model."""
    first, train = state.first_epoch_sums, state.last_epoch_sums
    return {
        "epochs": state.step / steps_per_epoch,
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "train_accuracy": train.accuracy if train.images else None,
        "train_loss": train.mean_loss if train.steps else None,
        "first_train_accuracy": first.accuracy if first.images else None,
        "first_train_loss": first.mean_loss if first.steps else None,
        "first_val_accuracy": state.first_val_accuracy if state.first_val_accuracy >= 0 else None,
        "best_train_accuracy": state.best_train_accuracy if state.best_train_accuracy >= 0 else None,
        "val_accuracy": state.best_accuracy if state.best_accuracy >= 0 else None,
        "best_step": state.best_step if state.best_step >= 0 else None,
        "train_seconds": state.train_seconds,
        "process_seconds": time.time() - psutil.Process().create_time(),  # since this process began, imports and all
        "images_per_second": state.trained_images / state.train_seconds if state.train_seconds else None,
        "resumed_at_steps": state.resumed_at_steps,
    }
