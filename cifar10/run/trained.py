"""A trained model, from wherever it lies: a run's folder, its best_model or final, one file of weights, or an export.

Files are read as data: nothing in them is executed. What evaluate, predict and export have in common is here, and they are
the only ones to use it; like them it sees the whole program.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cifar10 import UsageError
from cifar10.config.recipe import Recipe, from_settings
from cifar10.data.dataset import DataSet
from cifar10.data.registry import DATASETS, image_shape
from cifar10.distributed import world
from cifar10.distributed.device import count_gpus, keep_freed_memory
from cifar10.distributed.world import World
from cifar10.models.registry import build_model
from cifar10.models.weights import refuse_other_images
from cifar10.run.checkpoint import PORTABLE_FILE

Which = Literal["best_model", "final"]
SAFETENSORS_FILE = "model.safetensors"
METADATA_KEY = "about"  # of a safetensors file's header: JSON of `Trained.about`
HOW = "type the folder of a run, its checkpoints/best_model or checkpoints/final, a file in them, or the folder of an export"


@dataclass(frozen=True)
class Trained:
    """A network in evaluation mode, fp32, on the CPU or the GPU, and how it was made to see."""

    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]
    step: int  # of the optimizer, at which these weights were taken
    val_accuracy: float | None  # a fraction; None where it was not measured for these weights
    file: Path  # where the weights were read
    run: Path | None  # the folder of the run that they belong to, if they lie in one
    which: str  # best_model, final, or the file's name elsewhere

    @property
    def dataset(self) -> DataSet:
        return DATASETS[self.recipe.dataset]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """What the network sees of an image: [C, S, S]."""
        return image_shape(self.recipe)

    @property
    def about(self) -> dict[str, Any]:
        """How to feed the model, and what it answers: plain values, which `load` reads again."""
        channels, size, _ = self.image_shape
        return {
            "model": self.recipe.model,
            "classes": list(self.classes),
            "normalisation": {"mean": list(self.recipe.mean), "std": list(self.recipe.std)},
            "image": {"channels": channels, "size": size, "resize": self.recipe.resize, "dataset_size": self.dataset.size},
            "step": self.step,
            "val_accuracy": self.val_accuracy,
            "recipe": json.loads(json.dumps(asdict(self.recipe))),
        }


def alone(threads: int | None = None) -> World:
    """This process as the only rank, on the GPU if there is one; nothing is started. Raises UsageError for bad `threads`."""
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads} is impossible; type a whole number from 1 up")
    torch.set_num_threads(threads or world.cores())
    device = torch.device("cuda" if count_gpus() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # as in training: fp32 means fp32
    return World(rank=0, local_rank=0, size=1, local_size=1, device=device, launcher="python")


# --- finding it -------------------------------------------------------------------------------------------------------


def _names_in(folder: Path) -> list[str]:
    return [name for name in (PORTABLE_FILE, SAFETENSORS_FILE) if (folder / name).is_file()]


def find(where: Path, which: Which) -> Path:
    """The file of weights that `where` means. Raises UsageError, which says what there is instead."""
    try:
        if where.is_file():
            return where
        if names := _names_in(where):
            return where / names[0]
        folder = where if where.name == "checkpoints" else where / "checkpoints"
        if (folder / which / PORTABLE_FILE).is_file():
            return folder / which / PORTABLE_FILE
        there = [name for name in ("best_model", "final") if (folder / name / PORTABLE_FILE).is_file()]
        is_run, exists = (where / "recipe.json").is_file(), where.exists()
    except (OSError, ValueError) as error:  # a name that is too long; one with a zero byte
        raise UsageError(f"{where}: {getattr(error, 'strerror', None) or error}; {HOW}") from None
    if there:
        raise UsageError(f"{where} has no {which} yet; type --which {there[0]}")
    if is_run:
        raise UsageError(f"{where} is a run without a trained model yet; let it finish an epoch with the command that began it")
    raise UsageError(f"{where} {'holds no trained model' if exists else 'does not exist'}; {HOW}")


def _run_of(file: Path) -> Path | None:
    """The run's folder, if the file is its best_model or final."""
    folder = file.parent.parent
    is_one = file.name == PORTABLE_FILE and folder.name == "checkpoints" and (folder.parent / "recipe.json").is_file()
    return folder.parent if is_one else None


# --- reading it -------------------------------------------------------------------------------------------------------


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        return weights, json.loads((content.metadata() or {})[METADATA_KEY])


def _read_portable(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it is about to refuse
        content = torch.load(file, map_location="cpu", weights_only=True)
    return dict(content["module"]), {name: value for name, value in content.items() if name != "module"}


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any], Recipe]:
    """Weights, what the file says of them, and the recipe in that. Raises UsageError for anything else."""
    try:
        weights, about = (_read_safetensors if file.suffix == ".safetensors" else _read_portable)(file)
        recipe, step, classes = from_settings(about["recipe"]), int(about["step"]), list(about["classes"])
        if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
            raise TypeError("its weights are no tensors")
        val_accuracy = about.get("val_accuracy")
        if val_accuracy is not None and not isinstance(val_accuracy, (int, float)):
            raise TypeError("its val_accuracy is no number")
        if not all(isinstance(name, str) for name in classes) or len(classes) != len(DATASETS[recipe.dataset].classes):
            raise ValueError(f"its classes are not those of {recipe.dataset}")
    except MemoryError:
        raise UsageError(f"{file} does not fit into this machine's memory; use a larger one") from None
    except Exception as error:  # whatever bytes that are no such file make of a reader
        said = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {said[0][:160] if said else 'no more is known'}"
        hint = "; a plain state dict says nothing of how to use it: type the folder it lies in" if file.suffix == ".pt" else ""
        raise UsageError(f"{file} is not a trained model of this program ({reason}){hint or f'; {HOW}'}") from None
    facts = {"step": step, "val_accuracy": val_accuracy, "classes": tuple(classes)}
    return weights, facts, recipe


def _put(weights: dict[str, Tensor], model: nn.Module, file: Path, name: str) -> None:
    """Load the weights. Raises UsageError, which names the first difference, unless they are those of such a model."""
    ours = model.state_dict()
    for key in (*ours, *weights):
        if key not in weights or key not in ours:
            fault = f"it has no {key}" if key not in weights else f"it holds {key}, which the model has not"
        elif weights[key].shape != ours[key].shape:
            fault = f"{key} is {list(weights[key].shape)} there, {list(ours[key].shape)} here"
        elif not weights[key].isfinite().all():
            fault = f"{key} holds values that are not finite"
        else:
            continue
        raise UsageError(f"{file} does not hold weights of {name}: {fault}; restore it, or name another run")
    model.load_state_dict(weights)


def load(where: Path, which: Which = "best_model", here: World | None = None) -> Trained:
    """The trained model in `where`: a run's folder (then `which` picks), best_model's or final's, a file, or an export's.

    Raises UsageError, one line with the remedy, for whatever is not one.
    """
    file = find(where, which)
    weights, facts, recipe = _read(file)
    model = build_model(recipe.model, recipe.seed, len(facts["classes"]))
    _put(weights, model, file, recipe.model)
    refuse_other_images(model, recipe.model, image_shape(recipe), len(facts["classes"]))
    model = model.eval().to(here.device if here else "cpu").requires_grad_(False)
    run = _run_of(file)
    return Trained(model, recipe, file=file, run=run, which=file.parent.name if run else file.name, **facts)
