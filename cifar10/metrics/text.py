"""What a run prints: the data set, the model and the training settings at its start, the results at its end."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar10 import UsageError
from cifar10.config import schedule
from cifar10.config.recipe import Recipe
from cifar10.data import augment
from cifar10.distributed import world as distributed
from cifar10.distributed.world import World
from cifar10.metrics.sink import Section
from cifar10.plan import Plan
from cifar10.run.evaluation import VIEWS
from cifar10.run.summary import Summary

if TYPE_CHECKING:
    from torch import nn

MOST_LAYERS = 12  # that are listed one by one


@dataclass(frozen=True)
class Layer:
    """One module of the forward pass, or a block of several."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of the output for one image
    parameters: int


def layers(model: nn.Module, image_shape: tuple[int, int, int]) -> list[Layer]:
    """The layers of `model` in the order of its forward pass, shared parameters counted once.

    One black image is sent through a copy of the model in eval mode, so nothing changes, not even the random state.
    """
    import torch

    found: list[Layer] = []
    counted: set[nn.Parameter] = set()

    def add(name: str, module: nn.Module, _inputs: Any = None, output: Any = None) -> None:
        new = set(module.parameters()) - counted
        counted.update(new)
        shape = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else ()
        found.append(Layer(name, type(module).__name__ if name else "outside of layers", shape, sum(p.numel() for p in new)))

    model = deepcopy(model).eval()
    for name, module in model.named_modules():
        if name and not any(module.children()):
            module.register_forward_hook(partial(add, name))
    with torch.no_grad():
        model(torch.zeros(1, *image_shape, device=next(model.parameters()).device))
    add("", model)
    return found if found[-1].parameters else found[:-1]


def _as_one(block: list[Layer]) -> Layer:
    kinds = Counter(layer.kind for layer in block if layer.parameters)
    kind = ", ".join(f"{count} {name}" for name, count in kinds.items())
    return Layer(block[0].name.split(".")[0], kind, block[-1].shape, sum(layer.parameters for layer in block))


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def model_section(model: nn.Module, image_shape: tuple[int, int, int]) -> Section:
    """The layers (of a large model, the blocks) that have parameters, and their output shapes; `model` is the fp32 copy."""
    found = layers(model, image_shape)
    if len(listed := [layer for layer in found if layer.parameters]) > MOST_LAYERS:
        blocks = [_as_one(list(block)) for _, block in groupby(found, key=lambda layer: layer.name.split(".")[0])]
        listed = [block for block in blocks if block.parameters]
    total = sum(layer.parameters for layer in found)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    output = next(layer.shape for layer in reversed(found) if layer.shape)
    which = "all trainable" if trained == total else f"{trained:,} trainable"
    listed.append(Layer("total", which, output, total))
    digits = len(f"{max(layer.parameters for layer in listed):,}")
    rows = [(layer.name, layer.kind, _times(layer.shape), f"{layer.parameters:{digits},}") for layer in listed]
    rows[-1] = (*rows[-1][:2], f"{_times(image_shape)} -> {_times(output)}", rows[-1][3])
    return Section("model", rows, ("layer", "kind", "output", "parameters"))


def _image_sizes(recipe: Recipe, size: int) -> str:
    """The image sizes that the model is trained on, in order; empty if it is the data set's."""
    sizes, epoch = [], 1
    for first, epochs in zip(recipe.first_sizes, recipe.first_epochs, strict=True):
        when = f"epoch {epoch}" if epochs == 1 else f"epochs {epoch}-{epoch + epochs - 1}"
        sizes.append(f"{first}x{first} in {when}")
        epoch += epochs
    whole = recipe.resize or size
    if whole != size:
        sizes.append(f"resized to {whole}x{whole}")
    if recipe.image_size and recipe.image_size != whole:
        sizes.append(f"cropped to {recipe.image_size}x{recipe.image_size}")
    elif sizes and whole == size:
        sizes.append(f"then {size}x{size}")
    return ", ".join(sizes)


def data_section(plan: Plan) -> Section:
    """The images on disk, and how training augments them."""
    recipe, dataset = plan.recipe, plan.dataset
    kind = "grayscale" if dataset.channels == 1 else "RGB"
    tested = dataset.test_images if plan.options.test_images is None else plan.options.test_images
    tta = "" if recipe.tta == "none" else ", without and with test-time augmentation"
    test = f"the {tested:,} test images are used once, at the end{tta}" if tested else "the test images are not used"
    rows = [
        ("images", f"{dataset.size}x{dataset.size}, {kind}, {len(dataset.classes)} classes; {test}"),
        ("classes", ", ".join(dataset.classes)),
        *([("sizes", sizes)] if (sizes := _image_sizes(recipe, dataset.size)) else []),
        ("augmentation", augment.describe(augment.parse(recipe.augment))),
    ]
    return Section("data set", rows)


def _learning_rate(plan: Plan) -> str:
    recipe = plan.recipe
    if scheduler := plan.ds_config.get("scheduler"):
        return f"set by the config's {scheduler.get('type')}"
    found = schedule.parse(recipe.lr_schedule)
    warmup = found.warmup(recipe.warmup_epochs, recipe.epochs)
    rises = f"linear warmup over {warmup:g} epoch{'' if warmup == 1 else 's'}, then " if warmup else ""
    return f"{rises}{found.describe()}, updated per {'epoch' if found.per_epoch else 'step'}"


def training_section(plan: Plan) -> Section:
    """Batch, optimizer, learning rate, precision and early stopping, in the terms of DeepSpeed's config and the recipe."""
    recipe, config, batch = plan.recipe, plan.ds_config, plan.batch
    optimizer = config.get("optimizer", {})
    settings, scale = {"lr": None, **optimizer.get("params", {})}, recipe.lr_scale(batch.global_images)
    if settings["lr"] is not None and scale != 1:
        settings["lr"] = f"{settings['lr'] * scale:g}"
    shown = [f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if value not in (None, True, False)]
    passes = f" x {batch.accumulation} micro-batches" if batch.accumulation > 1 else ""
    ranks = f"{batch.data_ranks} rank{'' if batch.data_ranks == 1 else 's'}{passes} x {batch.micro_images}"
    stages = f"{batch.stages} stages, one a rank" + f", of {batch.data_ranks} pipelines" * (batch.data_ranks > 1)
    clipping, stage = config.get("gradient_clipping", 0), config.get("zero_optimization", {}).get("stage", 0)
    clipped = f"gradients clipped to norm {clipping:g}" if clipping else "no gradient clipping"
    watched = "validation" if recipe.val_images else "training"
    patience = f"after {recipe.patience} epochs without an improvement of the {watched} loss by {recipe.min_improvement:g}"
    smoothing = f", label smoothing {recipe.label_smoothing:g}" if recipe.label_smoothing else ""
    mixed = "; mixed images have mixed targets" if augment.mixing(augment.parse(recipe.augment)) else ""
    precision = "fp32" if plan.precision == "fp32" else f"{plan.precision} (torch_autocast), weights in fp32"
    rows = [
        ("batch", f"{batch.global_images} images per step = {ranks}"),
        ("loss", f"cross-entropy{smoothing}{mixed}"),
        ("optimizer", ": ".join(filter(None, (optimizer.get("type", "none in the config"), ", ".join(shown))))),
        ("learning rate", _learning_rate(plan)),
        ("precision", f"{precision}; ZeRO stage {stage}; {clipped}"),
        *([("pipeline", stages)] if batch.stages > 1 else []),
        ("early stopping", patience if recipe.patience else "off"),
    ]
    return Section("training", rows)


# --- the first and the last lines ---------------------------------------------------------------------------------------


def opening_lines(
    plan: Plan, folder: Path, place: str, model: Any, images: tuple[int, int], steps: tuple[int, int, int]
) -> Iterator[str | Section]:
    """What will be trained: `images` counts train and val, `steps` is the first, the last, and the schedule's total."""
    (train, val), (first_step, last_step, total_steps) = images, steps
    parameters = sum(p.numel() for p in model.parameters())
    yield f"recipe {plan.options.recipe}: {plan.recipe.model}, {parameters:,} parameters; run folder {folder}"
    yield (
        f"{plan.recipe.dataset}: {train:,} train and {val:,} val images;"
        f" {plan.recipe.epochs:g} epochs = {total_steps:,} steps of {plan.batch.global_images} images"
    )
    yield place
    yield data_section(plan)
    yield model_section(model, plan.image_shape)
    yield training_section(plan)
    yield from (f"note: {note}" for note in plan.notes)
    if first_step:
        yield f"resumed at step {first_step}"
    if last_step < total_steps:
        yield f"stops at step {last_step} (--max-steps) of a schedule of {total_steps:,} steps"


def train_images(recipe: Recipe) -> str:
    """What the train accuracy is measured on, if the images are augmented."""
    mixed = augment.mixing(augment.parse(recipe.augment))
    return "augmented images, " + ("mixed two by two, of which the larger share's class counts, " if mixed else "")


def _since_first(summary: Summary, split: str) -> str:
    """How much an accuracy has gained since the first epoch, in percentage points."""
    first, now = getattr(summary, f"first_{split}_accuracy"), getattr(summary, f"{split}_accuracy")
    if first is None or summary.epochs <= 1:
        return ""
    best = f", best {summary.best_train_accuracy:.2%}" if split == "train" else ""
    return f"; first epoch {first:.2%}, gain {100 * (now - first):+.2f} points{best}"


def closing_lines(summary: Summary, val_images: int, plan: Plan) -> list[str]:
    """The results of a finished run, a line for each split that was measured."""
    lines = [
        f"finished ({summary.ended_by}): {summary.epochs:.4g} epochs, {summary.steps:,} steps,"
        f" {summary.train_seconds / 60:.1f} minutes of training, {summary.images_per_second or 0:,.0f} images/s;"
        f" {summary.process_seconds:.1f} seconds since this process started"
    ]
    since = ""
    if summary.train_accuracy is not None:
        images, since = train_images(plan.recipe) if plan.recipe.is_augmented else "", _since_first(summary, "train")
        lines.append(f"train accuracy {summary.train_accuracy:.2%}  (last epoch: {images}measured during training{since})")
    if summary.train_loss is not None:
        first = f"; first epoch {summary.first_train_loss:.4f}" if since else ""
        lines.append(f"training loss  {summary.train_loss:.4f}  (last epoch{first})")
    if summary.val_accuracy is not None:
        weights = ", averaged weights" if summary.best_is_averaged else ""
        which = f"best_model, step {summary.best_step}{weights}; {val_images:,} images{_since_first(summary, 'val')}"
        lines.append(f"val accuracy   {summary.val_accuracy:.2%}  ({which})")
    if summary.test_accuracy is not None:
        used, total = summary.test_images, plan.dataset.test_images
        which = f"all {used:,} images" if used == total else f"the first {used:,} of {total:,} images"
        lines.append(f"test accuracy  {summary.test_accuracy:.2%}  (best_model; {which})  {summary.quality or ''}".rstrip())
    if summary.test_accuracy_tta is not None:
        views, below = f"{VIEWS[plan.recipe.tta]} views per image", plan.recipe.tta_below
        unsure = f", where the model's confidence is below {below:.0%}" if below < 1 else ""
        lines.append(f"test accuracy  {summary.test_accuracy_tta:.2%}  with test-time augmentation: {views}{unsure}")
    return [*lines, *([f"note: {plan.dataset.note}"] if plan.dataset.note else [])]


def failure(error: Exception, rank: int, step: int, micro_images: int) -> str:
    """Why a run failed, in one line: which rank, at which step, and what to change if that is known."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    reason = re.sub(r"^\[\S+\] ", "", reason).split(" This is typically")[0]  # gloo's source file, and its guesses
    if isinstance(error, MemoryError) or "out of memory" in reason.lower() or "allocate memory" in reason.lower():
        smaller = f"--micro-batch-size {max(1, micro_images // 2)}"
        return f"rank {rank} is out of memory at step {step}; use {smaller}, which keeps the global batch, or a ZeRO stage"
    if re.search("Timed out|timed out|Timeout", reason):
        return f"rank {rank} timed out at step {step} waiting for another rank, which died or hangs: {reason}"
    if re.search("closed by peer|Connection reset|Broken pipe|Connection refused", reason):
        return f"rank {rank} lost another rank at step {step}, which died: {reason}"
    return f"rank {rank} failed at step {step}: {type(error).__name__}: {reason}"


@contextmanager
def beginning(plan: Plan, world: World) -> Iterator[None]:
    """Within, whatever is raised means that the run has not begun."""
    try:
        yield
    except Exception as error:
        raise not_begun(error, plan, world) from error


def not_begun(error: Exception, plan: Plan, world: World) -> Exception:
    """What an error before the first step is raised as: a command that cannot be carried out, unless another rank is lost."""
    if isinstance(error, UsageError):
        return error
    reason = failure(error, world.rank, 0, plan.batch.micro_images)
    lost, alike = "another rank" in reason, isinstance(error, (ValueError, TypeError, AssertionError, ImportError))
    if lost or not (alike or distributed.is_local_main()):  # else main() reports it, once
        print(f"error: {reason}", file=sys.stderr)
    return error if lost else UsageError(reason)
