"""Everything that can be refused before a process group starts, and without importing torch: one Plan, or one UsageError.

The launcher checks before it starts any rank; a rank started by another launcher checks the same things itself.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from cifar10 import UsageError
from cifar10.config import ds_config
from cifar10.config.cli import Options, parse, take_old_flags
from cifar10.config.recipe import RECIPE_DEFAULTS, Precisions, Recipe, load
from cifar10.data import augment, registry
from cifar10.data.dataset import Description, Images, Split, about_model
from cifar10.distributed import device
from cifar10.engine import levels
from cifar10.models import weights
from cifar10.models.registry import model_names, refuse_unknown_model
from cifar10.run import folder as run_folder
from cifar10.run.summary import read_summary


@dataclass(frozen=True)
class Plan:
    """A command line, understood: what to train, how to carry it out, and DeepSpeed's JSON for this world size."""

    recipe: Recipe
    options: Options
    given_config: dict[str, Any]  # DeepSpeed's JSON as the recipe, a file and the command line have it
    ds_config: dict[str, Any]  # the same as DeepSpeed gets it: resolved for this world size
    batch: ds_config.Batch
    notes: list[str]  # what was changed in the JSON, and what to know of the data set, a line each
    dataset: Description

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """What the network sees of an image: [C, S, S]."""
        size = self.recipe.network_size(self.dataset.size)
        return self.dataset.channels, size, size

    @property
    def precision(self) -> str:
        """What matrix products are computed in: fp32, bf16 or fp16."""
        return precision_of(self.ds_config)

    def images(self, split: Split) -> Images:
        """The data set's train or test images, all of them in their fixed order: uint8 [N, S, S, C], and labels."""
        return registry.load(self.recipe.dataset, split, self.options.data_dir, self.recipe.split_seed)

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two runs the same experiment, as it comes back from JSON."""
        return json.loads(json.dumps({"recipe": dataclasses.asdict(self.recipe), "deepspeed": self.ds_config}))

    @property
    def about_the_model(self) -> dict[str, Any]:
        """What a file of weights says of itself: how to feed the model, and what it answers."""
        return about_model(self.recipe, self.dataset.classes, self.dataset.channels, self.dataset.size)


def precision_of(config: dict[str, Any]) -> str:
    """The precision that a resolved DeepSpeed config asks for: fp32, bf16 or fp16."""
    autocast = config.get("torch_autocast", {})
    name = str(autocast.get("dtype", "bfloat16")).lower() if autocast.get("enabled") else "float32"  # or bf16, half, ...
    return "bf16" if "b" in name else "fp32" if "32" in name else "fp16"


def choose_precision(wanted: Precisions) -> tuple[str | None, list[str]]:
    """The precision to train in, and a line on how it was chosen; None leaves it to the JSON.

    Raises UsageError if several are wanted and this machine computes in none of them.
    """
    if len(wanted) < 2:
        return (wanted[0] if wanted else None), []
    native = device.native_precisions()
    taken = next((name for name in wanted if name in native), None)
    if taken is None:
        raise UsageError(f"--precision {' '.join(wanted)}: this {device.name()} is fast in none of them; add fp32 at the end")
    missed = ", ".join(wanted[: wanted.index(taken)])
    reason = f"this {device.name()} is not fast in {missed}" if missed else "the first choice"
    return taken, [f"precision: {taken} of {', '.join(wanted)} ({reason})"]


def _given_config(options: Options) -> dict[str, Any]:
    """The DeepSpeed config that is asked for: the file's or the recipe's, with what the command line overrides."""
    config = ds_config.read(options.deepspeed_config or load(options.recipe).deepspeed)
    sizes = {"global_batch_size": options.global_batch_size, "micro_batch_size": options.micro_batch_size}
    return ds_config.override(config, lr=options.lr, **sizes)


def _resolve_config(
    given: dict[str, Any], precisions: Precisions, world_size: int
) -> tuple[dict[str, Any], ds_config.Batch, list[str]]:
    """The config for this machine and world size, its batch, and a note for each change."""
    precision, notes = choose_precision(precisions)
    if precision is not None:
        given = ds_config.with_precision(given, precision)
    config, batch, changes = ds_config.resolve(given, world_size)
    if precision_of(config) == "fp16" and not device.count_gpus():
        changes.append("fp16 on a CPU can take 400 times as long as fp32; --precision bf16 or --precision fp32 avoids that")
    return config, batch, [*notes, *changes]


def _resolve_augment(recipe: Recipe, old: dict[str, Any], dataset: Description) -> tuple[Recipe, list[str]]:
    """The recipe with its augmentation checked and in one spelling; a note if flags of 0.1 were used."""
    operations, whole = augment.parse(recipe.augment), recipe.resize or dataset.size
    if old:
        operations = augment.with_old_flags(operations, {"crops": 0 < recipe.image_size < whole, **old})
    augment.check(operations, min((whole, *recipe.first_sizes)))
    text = augment.as_text(operations)
    flags = ", ".join("--" + name.replace("_", "-") for name in old)
    notes = [f'{flags}: deprecated, to be removed after 0.2; use --augment "{text}"'] if old else []
    return dataclasses.replace(recipe, augment=text), notes


def make_plan(
    argv: list[str], world_size: int, program: str, description: str | None = None, extra: type | None = None
) -> Plan:
    """Read and check a command line for `world_size` ranks; nothing is written but a download that is missing.

    Raises UsageError (one line). `--help` prints and exits with 0.
    """
    argv, old_flags = take_old_flags(argv)
    names = f"models: {', '.join(model_names())}\n\ndata sets: {', '.join(registry.DATASETS)}"
    recipe, options = parse(argv, program, f"{description}\n\n{names}" if description else names, extra)
    refuse_unknown_model(recipe.model)
    dataset = registry.find(recipe.dataset)
    facts = dataset.describe(options.data_dir)
    given = _given_config(options)
    config, batch, notes = _resolve_config(given, options.precision, world_size)
    recipe, augment_notes = _resolve_augment(recipe, old_flags, facts)
    log_every = options.log_every_steps or config.get("steps_per_print") or 100
    level = levels.resolve_level(options.engine_level, config, world_size, sync_bn=recipe.sync_bn)
    options = dataclasses.replace(options, log_every_steps=log_every, engine_level=level)
    _check_schedule(recipe, config)
    _check_sizes(recipe, options, batch, facts)
    _check_images(recipe, facts)
    if recipe.lr_reference_batch:
        notes.append(f"learning rate: the config's x global batch {batch.global_images} / {recipe.lr_reference_batch}")
    notes += [*augment_notes, *([facts.note] if facts.note else [])]
    plan = Plan(recipe, options, given, config, batch, notes, facts)
    if recipe.sync_bn and not device.count_gpus():
        raise UsageError("--sync-bn needs GPUs: PyTorch shares statistics between ranks on GPUs only; leave it out")
    if options.resume not in ("auto", "never"):
        run_folder.refuse_other_position(run_folder.find_checkpoint(options.resume)[0].parent, plan.settings)
    if options.output_dir is not None:
        run_folder.refuse_unwritable(options.output_dir)
        run_folder.refuse_if_never(options.output_dir, options.resume)
        run_folder.refuse_other_settings(options.output_dir, plan.settings)
        read_summary(options.output_dir)  # refuses a damaged one
    dataset.ensure(options.data_dir, need_test=options.test_images != 0)
    weights.ensure(recipe.weights, recipe.model)
    return plan


def _check_schedule(recipe: Recipe, config: dict[str, Any]) -> None:
    """Refuse what a scheduler of the config would ignore in silence."""
    for name, flag in (("lr_reference_batch", "--lr-reference-batch"), ("plateau_lr_factor", "--plateau-lr-factor")):
        if config.get("scheduler") and getattr(recipe, name) != RECIPE_DEFAULTS[name]:
            raise UsageError(
                f"{flag} is not supported with a scheduler in the config ({config['scheduler'].get('type')}), which sets the"
                f" learning rate itself; leave out {flag} or the scheduler"
            )


def _check_sizes(recipe: Recipe, options: Options, batch: ds_config.Batch, dataset: Description) -> None:
    """Refuse a split or a batch that the data set is too small for."""
    if recipe.val_images >= dataset.train_images:
        raise UsageError(f"--val-images {recipe.val_images} leaves no training images; type 0 to {dataset.train_images - 1}")
    train_images = dataset.train_images - recipe.val_images
    if batch.global_images > train_images:
        raise UsageError(
            f"global batch {batch.global_images} is larger than the {train_images} training images;"
            f" try --global-batch-size {min(128, train_images) // batch.world_size * batch.world_size}"
        )
    if options.test_images is not None and options.test_images > dataset.test_images:
        raise UsageError(
            f"--test-images {options.test_images}: there are {dataset.test_images}; type 0 to {dataset.test_images}"
        )


def _flag(name: str, numbers: tuple[float, ...]) -> str:
    return f"--{name} {' '.join(f'{number:g}' for number in numbers)}"


def _check_images(recipe: Recipe, dataset: Description) -> None:
    """Refuse a normalization for other channels than the data set's, and crops that reach over the image."""
    if len(recipe.mean) != dataset.channels or len(recipe.std) != dataset.channels:
        kind = "grey: 1 channel" if dataset.channels == 1 else f"in colour: {dataset.channels} channels"
        raise UsageError(
            f"{_flag('mean', recipe.mean)} {_flag('std', recipe.std)} does not fit --dataset {recipe.dataset}, whose images are"
            f" {kind}; type {_flag('mean', dataset.mean)} {_flag('std', dataset.std)}"
        )
    whole = recipe.resize or dataset.size
    if recipe.image_size > whole:
        raise UsageError(
            f"--image-size {recipe.image_size} is larger than the images, {whole}x{whole} pixels; type --image-size {whole}"
            f" or less, or --resize {recipe.image_size} too"
        )
