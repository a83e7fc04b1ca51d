"""Loading a trained model for evaluate, predict and export: from a run's folder, its best_model or final, or an export.

Files are read as data: nothing in them is executed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cifar10 import UsageError, reason
from cifar10.config.recipe import FORMAT, Recipe, from_settings, refuse_other_format
from cifar10.data.dataset import about_model
from cifar10.distributed import cpus
from cifar10.distributed.device import count_gpus, keep_freed_memory
from cifar10.distributed.world import World
from cifar10.models.registry import build_model
from cifar10.models.weights import check_shapes, first_difference, read_weights
from cifar10.run.checkpoint import PORTABLE_FILE

Which = Literal["best_model", "final"]
SAFETENSORS_FILE = "model.safetensors"
LARGEST_SIZE = 8192  # pixels a side of the images that a file may claim
HOW = "choose the folder of a run or of an export, checkpoints/best_model or checkpoints/final, or a file in them"


@dataclass(frozen=True)
class Trained:
    """An fp32 network in evaluation mode, with what its file says of its inputs and outputs."""

    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]
    channels: int
    dataset_size: int  # pixels a side of the data set's images
    step: int  # of the optimizer
    val_accuracy: float | None  # a fraction; None if it was not measured for these weights
    file: Path
    run: Path | None  # the folder of the run, if the file is in one
    which: str  # best_model, final, or the file's name elsewhere

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of the network's input: [C, S, S]."""
        size = self.recipe.network_size(self.dataset_size)
        return self.channels, size, size

    @property
    def about(self) -> dict[str, Any]:
        """How to feed the model and what its outputs mean: plain values, which `load` can read."""
        described = about_model(self.recipe, self.classes, self.channels, self.dataset_size)
        return {"format": FORMAT, **described, "step": self.step, "val_accuracy": self.val_accuracy}


def alone(threads: int | None = None) -> World:
    """This process as the only rank, on the GPU if there is one, without a process group."""
    if threads is not None and threads < 1:
        raise UsageError(f"invalid value for --threads: {threads}, expected a whole number from 1 up, for example --threads 1")
    torch.set_num_threads(threads or cpus.threads())
    device = torch.device("cuda" if count_gpus() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # as in training: fp32 means fp32
    return World(rank=0, local_rank=0, size=1, local_size=1, device=device, launcher="python")


def find(where: Path, which: Which) -> Path:
    """The file of weights that `where` means. Raises UsageError, which says what there is instead."""
    try:
        if where.is_file():
            return where
        for name in (PORTABLE_FILE, SAFETENSORS_FILE):
            if (where / name).is_file():
                return where / name
        folder = where if where.name == "checkpoints" else where / "checkpoints"
        there = [name for name in ("best_model", "final") if (folder / name / PORTABLE_FILE).is_file()]
        is_run, exists = (where / "recipe.json").is_file(), where.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or with a zero byte
        raise UsageError(f"{where}: {getattr(error, 'strerror', None) or error}; {HOW}") from None
    if which in there:
        return folder / which / PORTABLE_FILE
    if there:
        raise UsageError(f"{where} has no {which} yet; use --which {there[0]}")
    if is_run:
        raise UsageError(f"{where} is a run without a trained model yet; resume it with the command that started it")
    raise UsageError(f"{where} {'holds no trained model' if exists else 'does not exist'}; {HOW}")


def _facts(about: dict[str, Any]) -> dict[str, Any]:
    """What a file says of its model, as fields of Trained. Raises all kinds of errors for foreign values."""
    classes, image, val_accuracy = tuple(about["classes"]), about["image"], about.get("val_accuracy")
    if not classes or not all(isinstance(name, str) for name in classes):
        raise TypeError("its classes are not names")
    if val_accuracy is not None and not isinstance(val_accuracy, (int, float)):
        raise TypeError("its val_accuracy is not a number")
    channels, size = image["channels"], image["dataset_size"]
    if not all(isinstance(value, int) and 1 <= value <= LARGEST_SIZE for value in (channels, size)):
        raise ValueError(f"its images have {channels} channels and {size} pixels a side")
    facts = {"classes": classes, "channels": channels, "dataset_size": size}
    return {**facts, "recipe": from_settings(about["recipe"]), "step": int(about["step"]), "val_accuracy": val_accuracy}


def load(where: Path, which: Which = "best_model", world: World | None = None) -> Trained:
    """The trained model in `where`; of a run's folder, `which`. Raises UsageError for anything else."""
    file = find(where, which)
    weights, about = read_weights(file, str(file), HOW)
    try:
        if not about:
            raise ValueError("a plain state dict does not say which network it is of")
        refuse_other_format(about, file)
        facts = _facts(about)
    except UsageError:
        raise
    except Exception as error:  # a corrupt or foreign file
        raise UsageError(f"{file} is not a trained model of this program ({reason(error)}); {HOW}") from None
    recipe, num_classes = facts["recipe"], len(facts["classes"])
    size = recipe.network_size(facts["dataset_size"])
    shape = facts["channels"], size, size
    model = build_model(recipe.model, recipe.seed, num_classes, shape, **recipe.network_options)
    if difference := first_difference(model.state_dict(), weights):
        raise UsageError(f"{file} does not hold weights of {recipe.model}: {difference}; choose another file")
    model.load_state_dict(weights)
    check_shapes(model, recipe.model, shape, num_classes)
    model = model.eval().to(world.device if world else "cpu").requires_grad_(False)
    folder, is_in_checkpoints = file.parent.parent.parent, file.parent.parent.name == "checkpoints"
    run = folder if file.name == PORTABLE_FILE and is_in_checkpoints and (folder / "recipe.json").is_file() else None
    return Trained(model, file=file, run=run, which=file.parent.name if run else file.name, **facts)
