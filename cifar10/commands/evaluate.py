"""What a trained model answers on a whole split: `python -m cifar10 evaluate RUN`.

Loss, accuracy, a row for each class, what is taken for what, and how far its confidence can be believed. The logits are kept
in the run's folder, for reports. Measured as the run itself measures: every image once, fp32, in the same batches, so for the
test split the accuracy is the one in summary.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cifar10 import UsageError
from cifar10.data import registry
from cifar10.data.dataset import Images, stratified_split
from cifar10.data.loader import EvaluationLoader
from cifar10.distributed.world import World
from cifar10.report.stats import BINS, calibration, confusion
from cifar10.run import folder as run_folder
from cifar10.run import trained
from cifar10.run.evaluation import Augmented, evaluate
from cifar10.run.predictions import Predictions, save_predictions
from cifar10.run.summary import SplitResult
from cifar10.run.trained import Trained, Which

Split = Literal["train", "val", "test"]
Tta = Literal["none", "mirror", "mirror+translate"]
CONFUSIONS = 5  # that are shown


# --- the images of a split ----------------------------------------------------------------------------------------------


def split_images(found: Trained, split: Split, data_dir: Path | None) -> Images:
    """All images of a split as the run had it, in their fixed order. Raises UsageError if there are none."""
    recipe, folder = found.recipe, registry.folder(data_dir)
    if split == "val" and not recipe.val_images:
        raise UsageError(f"--split val: recipe {recipe.model} held no images out (val_images is 0); type --split train or test")
    dataset = registry.find(recipe.dataset)
    facts = dataset.describe(folder)
    if (facts.classes, facts.channels, facts.size) != (found.classes, found.channels, found.dataset_size):
        raise UsageError(f"{found.file} was trained on other images or classes than those of {recipe.dataset} in {folder}")
    dataset.ensure(folder, need_test=split == "test")
    images = dataset.load("test" if split == "test" else "train", folder, recipe.split_seed)
    if split == "test":
        return images
    train, val = stratified_split(images.labels, recipe.val_images, recipe.split_seed)
    chosen = val if split == "val" else train
    return Images(images.pixels[chosen], images.labels[chosen])


# --- measuring ----------------------------------------------------------------------------------------------------------


def answers(model: nn.Module, images: Images, found: Trained, here: World) -> tuple[SplitResult, Predictions]:
    """Loss and accuracy of `model` on these images, and its logits: exactly as a run tests its best model."""
    logits: list[Tensor] = []
    result = evaluate(model, EvaluationLoader.of(images.pixels, images.labels, found.recipe, here), here, keep=logits)
    return result, Predictions(torch.cat(logits).numpy(), images.labels)


@dataclass(frozen=True)
class Evaluation:
    """What a model came to on a split, with and without the other views."""

    found: Trained
    split: Split
    images: int
    plain: SplitResult
    tta: Tta
    with_views: SplitResult | None
    predictions: Predictions  # with the views, if there are any
    written: Path | None
    note: str | None = None  # the data set's

    @property
    def best(self) -> SplitResult:
        """The result that was asked for: with the views, if there are any."""
        return self.with_views or self.plain

    def per_class(self) -> list[dict[str, Any]]:
        """Of each class: how many images, recall (as accuracy), and precision."""
        counts = confusion(self.predictions)
        right, there, answered = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
        return [
            {
                "class": name,
                "images": int(there[i]),
                "accuracy": right[i] / there[i] if there[i] else None,
                "precision": right[i] / answered[i] if answered[i] else None,
            }
            for i, name in enumerate(self.found.classes)
        ]

    def confusions(self) -> list[dict[str, Any]]:
        """What was most often taken for something else, the most frequent first."""
        counts = confusion(self.predictions)
        np.fill_diagonal(counts, 0)
        pairs = [divmod(int(place), len(counts)) for place in np.argsort(-counts, axis=None, kind="stable")[:CONFUSIONS]]
        names = self.found.classes
        return [{"class": names[i], "answer": names[j], "images": int(counts[i, j])} for i, j in pairs if counts[i, j]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; accuracies are fractions."""
        views = self.with_views and {"loss": self.with_views.loss, "accuracy": self.with_views.accuracy}
        return {
            "file": str(self.found.file),
            "which": self.found.which,
            "step": self.found.step,
            "dataset": self.found.recipe.dataset,
            "split": self.split,
            "images": self.images,
            "loss": self.plain.loss,
            "accuracy": self.plain.accuracy,
            "tta": self.tta,
            "with_tta": views,
            "calibration_error": calibration(self.predictions).error,
            "per_class": self.per_class(),
            "confusions": self.confusions(),
            "written": str(self.written) if self.written else None,
        }


def predictions_file(split: Split, which: str, tta: Tta) -> str:
    """test_predictions.npz, which reports read, is best_model's without other views; all else has a name of its own."""
    extra = "".join(f"_{word}" for word in (which, tta) if word not in ("best_model", "none"))
    return f"{split}_predictions{extra}.npz"


def looks_again_below(found: Trained, tta: Tta) -> float:
    """Of which images there are more views: those that the recipe's own test looks at again, else all of them."""
    return found.recipe.tta_below if tta == found.recipe.tta else 1.0


def measure(found: Trained, here: World, split: Split, tta: Tta, data_dir: Path | None, num_images: int | None) -> Evaluation:
    """Evaluate, and keep the logits of a whole split in the run's folder, if the model lies in one."""
    whole = split_images(found, split, data_dir)
    if num_images is not None and not 1 <= num_images <= len(whole):
        raise UsageError(f"--images {num_images} is impossible: {split} has {len(whole)}; type 1 to {len(whole)}")
    images = Images(whole.pixels[:num_images], whole.labels[:num_images])
    plain, predictions = answers(found.model, images, found, here)
    with_views = None
    if tta != "none":
        with_views, predictions = answers(Augmented(found.model, tta, looks_again_below(found, tta)), images, found, here)
    written = None
    if found.run is not None and len(images) == len(whole):
        file = found.run / predictions_file(split, found.which, tta)
        written = file if save_predictions(file, [predictions.logits], images.labels) else None
    note = registry.find(found.recipe.dataset).describe(registry.folder(data_dir)).note
    return Evaluation(found, split, len(images), plain, tta, with_views, predictions, written, note)


# --- saying it ----------------------------------------------------------------------------------------------------------


def beside_the_runs_own(done: Evaluation) -> Iterator[str]:
    """How accuracies compare with those in the run's summary.json; nothing where these are of something else."""
    found = done.found
    summary = (run_folder.read_json(found.run / "summary.json") if found.run else None) or {}
    if done.split != "test" or found.which != "best_model" or summary.get("test_images") != done.images:
        return
    results = [("own test", "test_accuracy", done.plain)]
    if done.with_views and done.tta == found.recipe.tta:
        results.append((f"own test with {done.tta}", "test_accuracy_tta", done.with_views))
    for name, key, result in results:
        own = summary.get(key)
        if own == result.accuracy:
            yield f"the run's {name} came to the same {own:.2%}"
        elif own is not None:
            yield f"the run's {name} came to {own:.2%}: other ranks, threads or libraries round differently"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def show(done: Evaluation, console: Console) -> None:
    """The numbers, a row for each class, and what was taken for what."""
    found, step = done.found, f"step {done.found.step:,}"
    console.print(
        f"{found.recipe.model} of {found.file}, {step}: {done.images:,} {done.split} images of {found.recipe.dataset}"
    )
    console.print(f"{done.split} accuracy {done.plain.accuracy:.2%}  loss {done.plain.loss:.4f}")
    if done.with_views:
        gain = 100 * (done.with_views.accuracy - done.plain.accuracy)
        below = looks_again_below(found, done.tta)
        unsure = f" of images of which the model is less than {below:.0%} sure" if below < 1 else ""
        console.print(
            f"{done.split} accuracy {done.with_views.accuracy:.2%}  loss {done.with_views.loss:.4f}"
            f"  with --tta {done.tta}{unsure} ({gain:+.2f} points); all that follows is with it"
        )
    for line in beside_the_runs_own(done):
        console.print(line)
    console.print(f"calibration error {calibration(done.predictions).error:.2%}  (ECE, {BINS} bins)")
    table = Table("class", "images", "recall", "precision")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in done.per_class():
        table.add_row(row["class"], f"{row['images']:,}", _percent(row["accuracy"]), _percent(row["precision"]))
    console.print(table)
    for pair in done.confusions():
        console.print(f"{pair['class']} taken for {pair['answer']}: {pair['images']:,}")
    if done.written:
        console.print(f"logits written to {done.written}")
    if done.note:
        console.print(f"note: {done.note}")


def run(
    where: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
    split: Split = "test",
    tta: Tta = "none",
    which: Which = "best_model",
    data_dir: Path | None = None,
    images: int | None = None,
    threads: int | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Loss, accuracy by class, confusions and calibration of a trained model on a split.

    Args:
        where: A run's folder, its checkpoints/best_model or checkpoints/final, a file of weights, or an export's folder.
        split: train and val as the run split them; train images are not augmented here.
        tta: Test-time augmentation: the mean of the logits for several views of each image: mirror, or also shifted by a pixel.
            The kind that the recipe has is done as the run's own test did it, also with its tta_below.
        which: Of a run's folder, the model that validation chose or the last one.
        data_dir: Where the data set lies, or is downloaded to (default: $CIFAR10_DIR, else data/).
        images: Only the first so many; nothing is written then.
        threads: CPU threads (default: cores of this machine).
        json_: Print JSON, and nothing else.
    """
    here = trained.alone(threads)
    done = measure(trained.load(where, which, here), here, split, tta, data_dir, images)
    if json_:
        json.dump(done.as_dict(), sys.stdout, indent=2)
        print()
    else:
        show(done, Console(highlight=False, soft_wrap=True, markup=False))
