"""What a run says: the data set, the network and the training at its start, the results at its end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar10.config.recipe import Recipe
from cifar10.metrics.sink import Section
from cifar10.plan import Plan
from cifar10.run.evaluation import VIEWS

if TYPE_CHECKING:
    from torch import nn

MOST_LAYERS = 12  # that are listed one by one


@dataclass(frozen=True)
class Layer:
    """One module that an image passes, or several that are told as one."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of what comes out for one image
    parameters: int


def layers(model: nn.Module, image_shape: tuple[int, int, int]) -> list[Layer]:
    """The layers of `model` in the order in which an image passes them, the parameters of each counted once.

    One black image is sent through the model as it evaluates, so that nothing in it changes and nothing random is drawn.
    """
    import torch

    found: list[Layer] = []
    counted: set[int] = set()

    def count(parameters: Any) -> int:
        fresh = [p for p in parameters if id(p) not in counted]
        counted.update(map(id, fresh))
        return sum(p.numel() for p in fresh)

    def hook(name: str) -> Any:
        def passed(module: nn.Module, _inputs: Any, output: Any) -> None:
            shape = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else ()
            found.append(Layer(name, type(module).__name__, shape, count(module.parameters())))

        return passed

    leaves = [(name, module) for name, module in model.named_modules() if name and not any(module.children())]
    hooks = [module.register_forward_hook(hook(name)) for name, module in leaves]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *image_shape, device=next(model.parameters()).device))
    finally:
        for handle in hooks:
            handle.remove()
        for module, was_training in training.items():
            module.training = was_training
    if others := count(model.parameters()):
        found.append(Layer("", "outside of layers", (), others))
    return found


def with_parameters(found: list[Layer]) -> list[Layer]:
    """The layers that have any; where they are too many, each block of the network as one."""
    told = [layer for layer in found if layer.parameters]
    if len(told) <= MOST_LAYERS:
        return told
    blocks = [list(block) for _, block in groupby(found, key=lambda layer: layer.name.split(".")[0])]
    return [block for block in map(_as_one, blocks) if block.parameters]


def _as_one(block: list[Layer]) -> Layer:
    kinds = Counter(layer.kind for layer in block if layer.parameters)
    kind = ", ".join(f"{count} {name}" for name, count in kinds.items())
    parameters = sum(layer.parameters for layer in block)
    return Layer(block[0].name.split(".")[0], kind, block[-1].shape, parameters)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def model_section(model: nn.Module, image_shape: tuple[int, int, int]) -> Section:
    """The network's layers that have parameters, and what comes out of each; `model` is the plain one, in fp32."""
    found = layers(model, image_shape)
    rows = [(layer.name, layer.kind, _times(layer.shape), f"{layer.parameters:,}") for layer in with_parameters(found)]
    total = sum(layer.parameters for layer in found)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    which = "all of them trained" if trained == total else f"{trained:,} of them trained"
    answer = next(layer.shape for layer in reversed(found) if layer.shape)
    rows.append(("total", which, f"{_times(image_shape)} -> {_times(answer)}", f"{total:,}"))
    digits = max(len(row[-1]) for row in rows)
    return Section("model", [(*row[:-1], row[-1].rjust(digits)) for row in rows], ("layer", "kind", "output", "parameters"))


def augmentation(recipe: Recipe, dataset_size: int) -> str:
    """What training cuts out of an image before the network sees it, in words; "" if it stays as evaluation has it."""
    whole, words, epoch = recipe.resize or dataset_size, [], 1
    for size, epochs in zip(recipe.first_sizes, recipe.first_epochs, strict=True):
        when = f"epoch {epoch}" if epochs == 1 else f"epochs {epoch}-{epoch + epochs - 1}"
        words.append(f"{size}x{size} in {when}")
        epoch += epochs
    if recipe.resize and recipe.resize != dataset_size:
        words.append(f"resized to {whole}x{whole}{' after them' if words else ''}")
    cut = recipe.image_size or whole
    if recipe.crop_padding or cut < whole:
        kind = " reflected pixels" if recipe.padding_mode == "reflect" else ""
        padding = f" after padding by {recipe.crop_padding}{kind}" if recipe.crop_padding else ""
        words.append(f"a random crop{'' if recipe.first_sizes else f' of {cut}x{cut}'}{padding}")
    if recipe.flip:
        words.append("mirrored in every other epoch" if recipe.alternate_flip else "mirrored at random")
    if recipe.cutout:
        words.append(f"{recipe.cutout}x{recipe.cutout} cut out")
    return ", ".join(words)


def colours(recipe: Recipe) -> str:
    """What training makes of an image's colours, in words; "" if it leaves them alone."""
    most = (("brightness", recipe.brightness), ("contrast", recipe.contrast))
    return ", ".join(f"{name} changed by up to {value:g}" for name, value in most if value)


def data_section(plan: Plan) -> Section:
    """The images as they are on disk, and what training makes of them."""
    recipe, dataset = plan.recipe, plan.dataset
    kind = "grey" if dataset.channels == 1 else "colour"
    tested = dataset.test_images if plan.options.test_images is None else plan.options.test_images
    again = "" if recipe.tta == "none" else ", without and with test-time augmentation"
    test = f"{tested:,} test images are opened once, at the end{again}" if tested else "the test images stay unopened"
    rows = [
        ("images", f"{dataset.size}x{dataset.size}, {kind}, {len(dataset.classes)} classes; {test}"),
        ("classes", ", ".join(dataset.classes)),
        ("augmentation", augmentation(recipe, dataset.size) or "none"),
        *([("colours", colours(recipe))] if colours(recipe) else []),
    ]
    return Section("data set", rows)


def _learning_rate(plan: Plan) -> str:
    recipe = plan.recipe
    if scheduler := plan.ds_config.get("scheduler"):
        return f"moved by the JSON's {scheduler.get('type')}"
    warmup = min(recipe.warmup_epochs, recipe.epochs / 10)
    rises = f"a linear warmup over {warmup:g} epoch{'' if warmup == 1 else 's'}, then " if warmup else ""
    falls = "a line" if recipe.lr_shape == "linear" else "a cosine"
    return f"{rises}{falls} to 0, moving {recipe.lr_moves.replace('-', ' ')}"


def training_section(plan: Plan) -> Section:
    """Batch, optimizer, learning rate, precision and the end, in the words of DeepSpeed's JSON and the recipe."""
    recipe, config, batch = plan.recipe, plan.ds_config, plan.batch
    optimizer = config.get("optimizer", {})
    settings = {"lr": None, **optimizer.get("params", {})}
    scale = recipe.lr_scale(batch.global_images)
    if settings["lr"] is not None and scale != 1:
        settings["lr"] = f"{settings['lr'] * scale:g}"
    told = {name: value for name, value in settings.items() if value not in (None, True, False)}
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in told.items())
    passes = f" x {batch.accumulation} micro-batches" if batch.accumulation > 1 else ""
    ranks = "1 rank" if batch.world_size == 1 else f"{batch.world_size} ranks"
    clipping, stage = config.get("gradient_clipping", 0), config.get("zero_optimization", {}).get("stage", 0)
    clipped = f"gradients clipped to norm {clipping:g}" if clipping else "gradients as they are"
    watched = "validation" if recipe.val_images else "training"
    waits = f"after {recipe.patience} epochs in which the {watched} loss has not fallen by {recipe.min_improvement:g}"
    smoothing = f", label smoothing {recipe.label_smoothing:g}" if recipe.label_smoothing else ""
    precision = "fp32" if plan.precision == "fp32" else f"{plan.precision} (torch_autocast), weights in fp32"
    rows = [
        ("batch", f"{batch.global_images} images a step: {ranks}{passes} x {batch.micro_images}; cross-entropy{smoothing}"),
        ("optimizer", f"{optimizer.get('type', 'the JSON has none')}: {words}" if words else str(optimizer.get("type"))),
        ("learning rate", _learning_rate(plan)),
        ("precision", f"{precision}; ZeRO stage {stage}; {clipped}"),
        ("stops early", waits if recipe.patience else "never"),
    ]
    return Section("training", rows)


# --- the first and the last lines ---------------------------------------------------------------------------------------


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
    yield data_section(plan)
    yield model_section(model, plan.image_shape)
    yield training_section(plan)
    yield from (f"note: {note}" for note in plan.notes)
    if first_step:
        yield f"resumed at step {first_step}"
    if last_step < total_steps:
        yield f"ends at step {last_step} (--max-steps); the schedule stays that of {total_steps:,} steps"


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
