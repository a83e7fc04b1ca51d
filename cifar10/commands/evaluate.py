"""`python -m cifar10 evaluate RUN`: loss, accuracy, recall and precision by class, confusions and calibration on a split.

Several runs are evaluated as an ensemble: the mean of their probabilities.

Measured as the run itself measures, every image once, in fp32 and the same batches: the accuracy on the test split is the one
in summary.json. The logits are written to the run's folder, for reports.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from torch import Tensor, nn

from cifar10 import UsageError
from cifar10.commands.common import Count, DataDir, Device, Runs, Sealed, Threads, WhichModel, number_table, settle
from cifar10.data import registry
from cifar10.data.dataset import Images, stratified_split
from cifar10.data.ledger import Look
from cifar10.data.loader import EvaluationLoader
from cifar10.distributed.world import World
from cifar10.report.stats import BINS, calibration, confusion, most_confused
from cifar10.run import folder as run_folder
from cifar10.run import trained
from cifar10.run.evaluation import Augmented, evaluate
from cifar10.run.predictions import Predictions, save_predictions
from cifar10.run.summary import SplitResult
from cifar10.run.trained import Trained

Split = Literal["train", "val", "test"]
Tta = Literal["none", "mirror", "mirror+translate"]
CONFUSIONS = 5  # pairs that are shown


def split_images(found: Trained, split: Split, data_dir: Path | None, look: Look | None = None) -> Images:
    """All images of a split as the run had it, in their fixed order. Raises UsageError if there are none, or if `look` at the
    test split is sealed."""
    look = look or Look([found.run] if found.run else [])
    if split == "test":
        look.refuse_if_sealed()
    recipe, folder = found.recipe, run_folder.data_dir_of(found.run, data_dir)
    if split == "val" and not recipe.val_images:
        raise UsageError("invalid value for --split: val, but this run held no images out; expected train or test")
    dataset = registry.of(recipe)
    facts = dataset.describe(folder)
    if (facts.classes, facts.channels, facts.size) != (found.classes, found.channels, found.dataset_size):
        raise UsageError(f"{found.file} was trained on other images or classes than those of {recipe.dataset} in {folder}")
    if found.run and (then := run_folder.manifest_of(found.run)) not in (None, facts.manifest):
        changes = dataset.changes(folder, then)
        raise UsageError(f"the images in {folder} are not those of {found.run}: {changes}; restore them, or use predict")
    dataset.ensure(folder, need_test=split == "test")
    images = registry.images(recipe, "test" if split == "test" else "train", folder, look)
    if split == "test":
        return images
    train, val = stratified_split(images.labels, recipe.val_images, recipe.split_seed)
    chosen = val if split == "val" else train
    return Images(images.pixels[chosen], images.labels[chosen])


def first_images(images: Images, count: int | None, flag: str) -> Images:
    """The first `count` images, or all. Raises UsageError, which names `flag`, if there are fewer."""
    if count is not None and not 1 <= count <= len(images):
        raise UsageError(f"invalid value for {flag}: {count}, expected 1 to {len(images)}, for example {min(100, len(images))}")
    return Images(images.pixels[:count], images.labels[:count])


def answers(model: nn.Module, images: Images, found: Trained, world: World) -> tuple[SplitResult, Predictions]:
    """Loss and accuracy of `model` on these images, and its logits: exactly as a run tests its best model."""
    logits: list[Tensor] = []
    result = evaluate(model, EvaluationLoader.of(images.pixels, images.labels, found.recipe, world), world, keep=logits)
    return result, Predictions(torch.cat(logits).numpy(), images.labels)


def together(members: Sequence[Predictions]) -> tuple[SplitResult, Predictions]:
    """An ensemble's result: its logits are the logarithm of the members' mean probabilities."""
    logits = torch.stack([torch.from_numpy(member.logits).log_softmax(1) for member in members]).logsumexp(0) - math.log(
        len(members)
    )
    labels = torch.from_numpy(members[0].labels)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return SplitResult(F.cross_entropy(logits, labels).item(), accuracy, len(labels), 0.0), Predictions(
        logits.numpy(), members[0].labels
    )


def refuse_different(members: Sequence[Trained], split: Split) -> None:
    """Raise UsageError unless all members were trained for these images and classes, with the same images held out."""
    first = members[0]
    for member in members[1:]:
        same = [(one.recipe.dataset, one.classes, one.dataset_size) for one in (first, member)]
        held_out = [(one.recipe.val_images, one.recipe.split_seed) for one in (first, member)]
        if same[0] != same[1]:
            raise UsageError(
                f"{member.file} was trained on other images or classes than {first.file}; an ensemble needs the same"
            )
        if split != "test" and held_out[0] != held_out[1]:
            raise UsageError(f"{member.file} held out other images than {first.file}; --split test is the same for both")


def per_class(predictions: Predictions, classes: Sequence[str]) -> list[dict[str, Any]]:
    """For each class: the number of images, recall (as accuracy), and precision."""
    counts, rows = confusion(predictions), []
    for name, right, images, answered in zip(classes, counts.diagonal(), counts.sum(1), counts.sum(0), strict=True):
        recall, precision = right / images if images else None, right / answered if answered else None
        rows.append({"class": name, "images": int(images), "accuracy": recall, "precision": precision})
    return rows


def confusions(predictions: Predictions, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The most frequent confusions, most frequent first."""
    pairs = most_confused(confusion(predictions), CONFUSIONS)
    return [{"class": classes[true], "answer": classes[answer], "images": images} for true, answer, images in pairs]


def predictions_file(split: Split, which: str, tta: Tta) -> str:
    """test_predictions.npz, which reports read, is best_model's without TTA; everything else has a name of its own."""
    extra = "".join(f"_{word}" for word in (which, tta) if word not in ("best_model", "none"))
    return f"{split}_predictions{extra}.npz"


def tta_below(found: Trained, tta: Tta) -> float:
    """The confidence below which an image gets TTA: the recipe's for its own kind of TTA, else 1 (all images)."""
    return found.recipe.tta_below if tta == found.recipe.tta else 1.0


def measure(
    members: Sequence[Trained],
    world: World,
    split: Split,
    tta: Tta,
    data_dir: Path | None,
    num_images: int | None,
    sealed: bool = False,
) -> dict[str, Any]:
    """The results, as plain values for JSON; the logits of a whole split go to the run's folder, if one model is in one."""
    refuse_different(members, split)
    found, several = members[0], len(members) > 1
    look = Look([one.run for one in members if one.run], num_images, sealed)
    whole = split_images(found, split, data_dir, look)
    images = first_images(whole, num_images, "--images")
    each = [answers(member.model, images, member, world) for member in members]
    plain, predictions = together([own for _, own in each]) if several else each[0]
    with_tta = None
    if tta != "none":
        viewed = [answers(Augmented(one.model, tta, tta_below(one, tta)), images, one, world) for one in members]
        result, predictions = together([own for _, own in viewed]) if several else viewed[0]
        with_tta = {"loss": result.loss, "accuracy": result.accuracy}
    look.learned(accuracy=plain.accuracy, accuracy_with_tta=with_tta["accuracy"] if with_tta else None)
    written = None
    if found.run is not None and len(images) == len(whole) and not several:
        file = found.run / predictions_file(split, found.which, tta)
        written = str(file) if save_predictions(file, [predictions.logits], images.labels) else None
    return {
        "file": str(found.file),
        "which": found.which,
        "step": found.step,
        "members": [
            {"file": str(one.file), "loss": own.loss, "accuracy": own.accuracy}
            for one, (own, _) in zip(members, each, strict=True)
        ],
        "dataset": found.recipe.dataset,
        "split": split,
        "images": len(images),
        "loss": plain.loss,
        "accuracy": plain.accuracy,
        "tta": tta,
        "with_tta": with_tta,
        "calibration_error": calibration(predictions).error,
        "per_class": per_class(predictions, found.classes),
        "confusions": confusions(predictions, found.classes),
        "written": written,
        "note": registry.of(found.recipe).describe(run_folder.data_dir_of(found.run, data_dir)).note,
    }


def compared_with_summary(done: dict[str, Any], found: Trained) -> Iterator[str]:
    """How the accuracies compare with those in the run's summary.json, if these are of the same model and images."""
    summary = (run_folder.read_json(found.run / "summary.json") if found.run else None) or {}
    if (
        len(done["members"]) > 1
        or done["split"] != "test"
        or found.which != "best_model"
        or summary.get("test_images") != done["images"]
    ):
        return
    results = [("own test", "test_accuracy", done["accuracy"])]
    if done["with_tta"] and done["tta"] == found.recipe.tta:
        results.append((f"own test with {done['tta']}", "test_accuracy_tta", done["with_tta"]["accuracy"]))
    for name, key, accuracy in results:
        own = summary.get(key)
        if own == accuracy:
            yield f"the run's {name} gave the same {own:.2%}"
        elif own is not None:
            yield f"the run's {name} gave {own:.2%}: other ranks, threads or libraries round differently"


def show(done: dict[str, Any], found: Trained, console: Console) -> None:
    split, with_tta = done["split"], done["with_tta"]
    images = f"{done['images']:,} {split} images of {done['dataset']}"
    console.print(f"{found.recipe.model} of {found.file}, step {found.step:,}: {images}")
    for member in done["members"] if len(done["members"]) > 1 else ():
        console.print(f"member {member['file']}: {split} accuracy {member['accuracy']:.2%}  loss {member['loss']:.4f}")
    console.print(f"{split} accuracy {done['accuracy']:.2%}  loss {done['loss']:.4f}")
    if with_tta:
        gain, below = 100 * (with_tta["accuracy"] - done["accuracy"]), tta_below(found, done["tta"])
        unsure = f" for images with a confidence below {below:.0%}" if below < 1 else ""
        result = f"{split} accuracy {with_tta['accuracy']:.2%}  loss {with_tta['loss']:.4f}"
        console.print(f"{result}  with --tta {done['tta']}{unsure} ({gain:+.2f} points); everything below is with it")
    for line in compared_with_summary(done, found):
        console.print(line)
    console.print(f"calibration error {done['calibration_error']:.2%}  (ECE, {BINS} bins)")
    table = number_table("class", "images", "recall", "precision")
    for row in done["per_class"]:
        shares = ("-" if row[key] is None else f"{row[key]:.2%}" for key in ("accuracy", "precision"))
        table.add_row(row["class"], f"{row['images']:,}", *shares)
    console.print(table)
    for pair in done["confusions"]:
        console.print(f"{pair['class']} classified as {pair['answer']}: {pair['images']:,}")
    if done["written"]:
        console.print(f"logits written to {done['written']}")
    if done["note"]:
        console.print(f"note: {done['note']}")


def run(
    runs: Runs,
    split: Split = "test",
    tta: Tta = "none",
    which: WhichModel = "best_model",
    data_dir: DataDir = None,
    images: Count = None,
    threads: Threads = None,
    device: Device = "auto",
    sealed: Sealed = False,
    json_: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Loss, accuracy by class, confusions and calibration of a trained model, or of an ensemble of several, on a split.

    Args:
        split: train and val as the run split them; train images are not augmented here.
        tta: Test-time augmentation: the mean of the logits over several views of each image: flipped, or also shifted by a
            pixel. The recipe's own kind is done as in the run's own test, also with its tta_below.
        images: Evaluate only the first so many images, and write nothing.
        json_: Print JSON, and nothing else.
    """
    settle(device)
    if not runs:
        raise UsageError("evaluate needs a run's folder, for example runs/mine")
    world = trained.alone(threads)
    members = [trained.load(where, which, world) for where in runs]
    done = measure(members, world, split, tta, data_dir, images, sealed)
    if json_:
        print(json.dumps(done, indent=2))
    else:
        show(done, members[0], Console(highlight=False, soft_wrap=True, markup=False))
