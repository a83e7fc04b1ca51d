"""What a run is about to do and what it came to, in numbers and in words.

Accuracies are fractions, and every one of them carries its split.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from cifar10 import overview
from cifar10.data.dataset import DataSet
from cifar10.metrics import Section, SplitResult
from cifar10.plan import Plan
from cifar10.run.evaluation import VIEWS
from cifar10.run.state import RunState

TIERS = ("Excellent", "Good", "Fair", "Poor")  # the reference documents'


def quality_tier(test_accuracy: float, least: tuple[float, float, float] | None) -> str | None:
    """The tier of an accuracy (a fraction) on test images: `least` are those of all tiers but the last; None has no tiers."""
    if least is None:
        return None
    return next(name for bound, name in zip((*least, 0.0), TIERS, strict=True) if test_accuracy >= bound)


def opening_lines(
    plan: Plan, folder: Path, place: str, model: Any, images: tuple[int, int], steps: tuple[int, int, int]
) -> Iterator[str | Section]:
    """What is about to be trained: `images` are those of train and val, `steps` the first, the last and the schedule's."""
    (train, val), (first_step, last_step, total_steps) = images, steps
    parameters = sum(p.numel() for p in model.parameters())
    yield f"recipe {plan.options.recipe}: {plan.recipe.model}, {parameters:,} parameters; run folder {folder}"
    yield (
        f"{train:,} train and {val:,} val images of {plan.recipe.dataset};"
        f" {total_steps:,} steps of {plan.batch.global_images} images = {plan.recipe.epochs:g} epochs"
    )
    yield place
    yield overview.data_section(plan)
    yield overview.model_section(model, plan.image_shape)
    yield overview.training_section(plan)
    yield from (f"note: {note}" for note in plan.notes)
    if first_step:
        yield f"resumed at step {first_step}"
    if last_step < total_steps:
        yield f"ends at step {last_step} (--max-steps); the schedule stays that of {total_steps:,} steps"


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


def summary(state: RunState, steps_per_epoch: int) -> dict[str, Any]:
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


def _since_first(summary: dict[str, Any], split: str) -> str:
    """How far an accuracy has come since the first epoch, in points: percent of the images."""
    first, now = summary.get(f"first_{split}_accuracy"), summary[f"{split}_accuracy"]
    if first is None or summary["epochs"] <= 1:
        return ""
    best = f", best {summary['best_train_accuracy']:.2%}" if split == "train" else ""
    return f"; first epoch {first:.2%}, gain {100 * (now - first):+.2f} points{best}"


def closing_lines(summary: dict[str, Any], val_images: int, plan: Plan) -> list[str]:
    """The end of a finished run, a line for each split that was measured."""
    lines = [
        f"finished ({summary['ended_by']}): {summary['epochs']:.4g} epochs, {summary['steps']:,} steps,"
        f" {summary['train_seconds'] / 60:.1f} minutes of training, {summary['images_per_second'] or 0:,.0f} images/s;"
        f" this process began {summary['process_seconds']:.1f} seconds ago"
    ]
    since = _since_first(summary, "train") if summary["train_accuracy"] is not None else ""
    if summary["train_accuracy"] is not None:
        images = "augmented images, " if plan.augments else ""
        lines.append(f"train accuracy {summary['train_accuracy']:.2%}  (last epoch: {images}weights still moving{since})")
    if summary.get("train_loss") is not None:
        first = f"; first epoch {summary['first_train_loss']:.4f}" if since else ""
        lines.append(f"training loss  {summary['train_loss']:.4f}  (last epoch{first})")
    if summary["val_accuracy"] is not None:
        lines.append(
            f"val accuracy   {summary['val_accuracy']:.2%}  (best_model, step {summary['best_step']}; {val_images:,} images"
            f"{_since_first(summary, 'val')})"
        )
    if summary["test_accuracy"] is not None:
        used, there = summary["test_images"], plan.dataset.test_images
        which = f"all {used:,} images" if used == there else f"the first {used:,} of {there:,} images"
        lines.append(
            f"test accuracy  {summary['test_accuracy']:.2%}  (best_model; {which})  {summary['quality'] or ''}".rstrip()
        )
    if summary.get("test_accuracy_tta") is not None:
        views = f"{VIEWS[plan.recipe.tta]} views of an image"
        unsure = f" of which the model is less than {plan.recipe.tta_below:.0%} sure" if plan.recipe.tta_below < 1 else ""
        lines.append(f"test accuracy  {summary['test_accuracy_tta']:.2%}  with test-time augmentation: {views}{unsure}")
    if plan.dataset.note:
        lines.append(f"note: {plan.dataset.note}")
    return lines


def last_words(error: Exception, rank: int, step: int, micro_images: int) -> str:
    """Why a run has failed, in one line: which rank, at which step, and what to change where that is known."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    said = re.sub(r"^\[\S+\] ", "", said).split(" This is typically")[
        0
    ]  # gloo begins with its source file, and ends with guesses
    if isinstance(error, MemoryError) or "out of memory" in said.lower() or "allocate memory" in said.lower():
        advice = (
            f"type --micro-batch-size {max(1, micro_images // 2)}, which keeps the global batch, or a ZeRO stage in the JSON"
        )
        return f"rank {rank} is out of memory at step {step}; {advice}"
    if any(sign in said for sign in ("Timed out", "timed out", "Timeout")):
        return f"rank {rank} has waited in vain for another at step {step}, which has died or hangs: {said}"
    if any(sign in said for sign in ("closed by peer", "Connection reset", "Broken pipe", "Connection refused")):
        return f"rank {rank} has lost another at step {step}, which has died: {said}"
    return f"rank {rank} failed at step {step}: {type(error).__name__}: {said}"
