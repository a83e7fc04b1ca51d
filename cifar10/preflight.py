"""Everything that can be refused before a process group starts, and without importing torch: one Plan, or one UsageError.

The launcher checks before it starts any rank; a rank started by another launcher checks the same things itself.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from cifar10 import UsageError, data, device, ds_json, run_folder
from cifar10.recipe import Options, Precisions, Recipe, parse

TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000


@dataclass(frozen=True)
class Plan:
    """A command line, understood: what to train, how to carry it out, and DeepSpeed's JSON for this world size."""

    recipe: Recipe
    options: Options
    ds_config: dict[str, Any]
    batch: ds_json.Batch
    notes: list[str]  # what was changed in the JSON, a line each

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two runs the same experiment, as it comes back from JSON."""
        return json.loads(json.dumps({"recipe": dataclasses.asdict(self.recipe), "deepspeed": self.ds_config}))

    @property
    def about_the_model(self) -> dict[str, Any]:
        """What a file of weights says of itself: how to feed the model, and what it answers."""
        return {
            "recipe": self.settings["recipe"],
            "model": self.recipe.model,
            "classes": list(data.CLASSES),
            "normalisation": {"mean": list(self.recipe.mean), "std": list(self.recipe.std)},
        }


def choose_precision(wanted: Precisions) -> tuple[str | None, list[str]]:
    """The precision to train in, and a line on how it was chosen; None leaves it to the JSON.

    Raises UsageError if several are wanted and this machine computes in none of them.
    """
    if len(wanted) < 2:
        return (wanted[0] if wanted else None), []
    native = device.native_precisions()
    taken = next((name for name in wanted if name in native), None)
    if taken is None:
        raise UsageError(f"--precision {' '.join(wanted)}: this {device.name()} computes in none of them; add fp32 at the end")
    missed = ", ".join(wanted[: wanted.index(taken)])
    reason = f"this {device.name()} does not compute in {missed}" if missed else "the first choice"
    return taken, [f"precision: {taken} of {', '.join(wanted)} ({reason})"]


def check(argv: list[str], world_size: int, program: str, description: str | None = None) -> Plan:
    """Read and check a command line for `world_size` ranks; nothing is written but a data set that had to be downloaded.

    Raises UsageError (one line). `--help` prints and exits with 0.
    """
    recipe, options = parse(argv, program, description)
    assert options.deepspeed_config is not None  # parse fills it in
    config = ds_json.override(
        ds_json.read(options.deepspeed_config), lr=options.lr, global_batch_size=options.global_batch_size
    )
    precision, notes = choose_precision(options.precision)
    if precision is not None:
        config = ds_json.with_precision(config, precision)
    config, batch, changes = ds_json.resolve(config, world_size)
    _check_sizes(recipe, options, batch)
    if recipe.lr_reference_batch:
        changes.append(
            f"learning rate: the JSON's x {batch.global_images} / {recipe.lr_reference_batch} (global batch / reference)"
        )
    if recipe.sync_bn and not device.count_gpus():
        raise UsageError("--sync-bn needs GPUs: PyTorch shares statistics between ranks on GPUs only; leave it out")
    log_every = options.log_every_steps or config.get("steps_per_print") or 100
    options = dataclasses.replace(options, log_every_steps=log_every)
    plan = Plan(recipe, options, config, batch, [*notes, *changes])
    if options.resume not in ("auto", "never"):
        run_folder.refuse_other_position(run_folder.find_checkpoint(options.resume)[0].parent, plan.settings)
    if options.output_dir is not None:
        run_folder.refuse_unwritable(options.output_dir)
        run_folder.refuse_if_never(options.output_dir, options.resume)
        run_folder.refuse_other_settings(options.output_dir, plan.settings)
        run_folder.read_json(options.output_dir / "summary.json")
    if recipe.dataset == "cifar10":
        data.ensure_cifar10(options.data_dir, need_test=options.test_images != 0)
    return plan


def _check_sizes(recipe: Recipe, options: Options, batch: ds_json.Batch) -> None:
    if recipe.val_images >= TRAIN_IMAGES:
        raise UsageError(f"--val-images {recipe.val_images} leaves no training images; type 0 to {TRAIN_IMAGES - 1}")
    train_images = TRAIN_IMAGES - recipe.val_images
    if batch.global_images > train_images:
        raise UsageError(
            f"global batch {batch.global_images} is larger than the {train_images} training images;"
            f" try --global-batch-size {min(128, train_images) // batch.world_size * batch.world_size}"
        )
    if options.test_images is not None and options.test_images > TEST_IMAGES:
        raise UsageError(f"--test-images {options.test_images}: there are {TEST_IMAGES}; type 0 to {TEST_IMAGES}")
