"""What a run came to, in numbers and in words. Accuracies are fractions, and every one of them carries its split."""

from __future__ import annotations

from typing import Any

from cifar10.state import RunState

TIERS = ((0.80, "Excellent"), (0.70, "Good"), (0.60, "Fair"), (0.0, "Poor"))  # the reference document's, for CIFAR-10


def quality_tier(test_accuracy: float) -> str:
    """The tier of an accuracy (a fraction) on test images."""
    return next(name for least, name in TIERS if test_accuracy >= least)


def summary(state: RunState, steps_per_epoch: int) -> dict[str, Any]:
    """How a run stands, for summary.json: train accuracy of the last epoch, val accuracy of best_model."""
    train = state.last_epoch_sums
    return {
        "epochs": state.step / steps_per_epoch,
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "train_accuracy": train.accuracy if train.images else None,
        "val_accuracy": state.best_accuracy if state.best_accuracy >= 0 else None,
        "best_step": state.best_step if state.best_step >= 0 else None,
        "train_seconds": state.train_seconds,
        "images_per_second": state.trained_images / state.train_seconds if state.train_seconds else None,
        "resumed_at_steps": state.resumed_at_steps,
    }


def closing_lines(summary: dict[str, Any], val_images: int, all_test_images: int) -> list[str]:
    """The end of a finished run, a line for each split that was measured."""
    lines = [
        f"finished ({summary['ended_by']}): {summary['epochs']:.4g} epochs, {summary['steps']:,} steps,"
        f" {summary['train_seconds'] / 60:.1f} minutes of training, {summary['images_per_second'] or 0:,.0f} images/s"
    ]
    if summary["train_accuracy"] is not None:
        lines.append(f"train accuracy {summary['train_accuracy']:.2%}  (last epoch: augmented images, weights still moving)")
    if summary["val_accuracy"] is not None:
        lines.append(
            f"val accuracy   {summary['val_accuracy']:.2%}  (best_model, step {summary['best_step']}; {val_images:,} images)"
        )
    if summary["test_accuracy"] is not None:
        used = summary["test_images"]
        which = f"all {used:,} images" if used == all_test_images else f"the first {used:,} of {all_test_images:,} images"
        lines.append(f"test accuracy  {summary['test_accuracy']:.2%}  (best_model; {which})  {summary['quality']}")
    return lines
