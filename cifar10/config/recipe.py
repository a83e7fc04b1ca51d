"""A recipe is a frozen description of one experiment: everything that changes its result, but for what DeepSpeed's JSON says.

The optimizer, its base learning rate, clipping, precision, ZeRO and the global batch belong to DeepSpeed's JSON. Every field of
a recipe is a flag, and a flag wins over the recipe (see cli.py).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from cifar10 import UsageError, nearest

PROJECT = Path(__file__).resolve().parents[2]

# Flags whose default the help text explains in words.
_Channels = Annotated[tuple[float, ...], tyro.conf.arg(metavar="X")]
_Sizes = Annotated[tuple[int, ...], tyro.conf.arg(metavar="N")]
Precisions = tuple[Literal["fp32", "bf16", "fp16"], ...]


@dataclass(frozen=True)
class Recipe:
    """One experiment. Every field is a flag; its comment is that flag's help text."""

    epochs: float
    """Passes over the training split; fractions are allowed. Shortening a run shortens its schedule with it."""
    warmup_epochs: float
    """Epochs until the full learning rate; never more than a tenth of --epochs, so that a short run reaches it too."""
    val_images: int
    """Training images held out for validation, stratified by class. 0 trains on all of them: the best model is then the
    last one, and early stopping watches the training loss."""
    lr_moves: Literal["per-step", "per-epoch"] = "per-step"
    """Whether the learning rate moves at every step, or once an epoch as in the reference document."""
    lr_shape: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls to zero after the warmup."""
    model: str = "bn_cnn"
    """Name of the network, one of cifar10/models."""
    weights: str = "none"
    """Where training starts: none (the model's own random initialisation), imagenet (torchvision's weights for the model, which
    are downloaded), or a file: a plain state dict, or a best_model or final file of an earlier run."""
    dataset: str = "cifar10"
    """Name of the data set, one of those listed above."""
    mean: _Channels = (0.4914, 0.4822, 0.4465)
    """Mean of each channel that normalisation subtracts, on the scale 0..1: three numbers, or one for grey images."""
    std: _Channels = (0.2023, 0.1994, 0.2010)
    """Deviation of each channel that normalisation divides by. (The document's: the mean of per-image deviations.)"""
    resize: int = 0
    """Pixels a side to which images are resized, bilinearly; 0 leaves them as they are."""
    image_size: int = 0
    """Pixels a side that the network sees: of a random crop in training, of the middle in evaluation; 0 is the whole image."""
    first_sizes: _Sizes = ()
    """Pixels a side that images are resized to at the start of training, one size after another; then they are whole."""
    first_epochs: _Sizes = ()
    """Epochs of each of --first-sizes."""
    augment: str = "RandomCrop(4) RandomHorizontalFlip"
    """What changes training images at random, in order, named as in torchvision: RandomCrop(padding, constant|reflect) and
    RandomHorizontalFlip or AlternatingFlip first, then Cutout(size), BrightnessContrast(most, most), ...; or none."""
    label_smoothing: float = 0.0
    """Share of each training target spread evenly over all classes."""
    patience: int = 15
    """Epochs without improvement of the watched loss before the run stops early; 0 never stops early."""
    min_improvement: float = 1e-5
    """How much lower the watched loss must be to count as an improvement."""
    plateau_patience: int = 5
    """Epochs without improvement that count as a plateau, which is reported."""
    plateau_lr_factor: float = 1.0
    """The learning rate is multiplied by this at each plateau; 1 leaves it alone."""
    max_skipped_in_a_row: int = 25
    """Steps in a row with a non-finite loss or gradient (each is skipped) that end the run."""
    sync_bn: bool = False
    """BatchNorm over the images of all ranks, not of each rank alone; needs GPUs."""
    lr_reference_batch: int = 0
    """The learning rate is multiplied by global batch / this (the linear scaling rule); 0 leaves it as the JSON has it."""
    seed: int = 0
    """Seeds the initial weights, the order of the images and their augmentation."""
    tta: Literal["none", "mirror", "mirror+translate"] = "none"
    """Test-time augmentation: the final test is done once more with the mean of the outputs for several views of an image."""
    tta_below: float = 1.0
    """Only images whose most probable class has a probability below this get more views."""
    split_seed: int = 0
    """Seeds the choice of validation images, apart from --seed so that seeds can be compared on one split."""

    @property
    def is_augmented(self) -> bool:
        """Whether training sees other images than evaluation does."""
        return self.augment != "none" or bool(self.first_sizes)

    def network_size(self, size: int) -> int:
        """Pixels a side that the network sees of the data set's images of `size`."""
        return self.image_size or self.resize or size

    def lr_scale(self, global_images: int) -> float:
        """What the linear scaling rule multiplies the learning rate by."""
        return global_images / self.lr_reference_batch if self.lr_reference_batch else 1.0


RECIPE_DEFAULTS = {f.name: f.default for f in fields(Recipe) if f.default is not dataclasses.MISSING}


@dataclass(frozen=True)
class Experiment:
    """What one file in recipes/ defines: a recipe, the DeepSpeed config that goes with it (a dict, or the path of a JSON file),
    and the precisions it prefers, best first; without any, the precision is the config's."""

    recipe: Recipe
    deepspeed: dict[str, Any] | Path
    precision: Precisions = ()


def check_value(settings: Any, name: str, ok: bool, wanted: str) -> None:
    if not ok:
        flag = "--" + name.replace("_", "-")
        example = f"for example {flag} {_example(settings, name)}"
        raise UsageError(f"invalid value for {flag}: {getattr(settings, name)}, expected {wanted}, {example}")


_EXAMPLES: dict[str, object] = {
    "epochs": 50,
    "mean": "0.4914 0.4822 0.4465",
    "std": "0.2023 0.1994 0.201",
    "lr": 0.1,
    "global_batch_size": 128,
    "val_images": 5000,
    "first_sizes": "24 28",
    "first_epochs": "3 3",
}


def _example(settings: Any, name: str) -> object:
    default = {f.name: f.default for f in fields(settings)}[name]
    return _EXAMPLES.get(name, 1 if default in (None, dataclasses.MISSING) else default)


def check_recipe(recipe: Recipe) -> None:
    """Refuse values that cannot be meant. Raises UsageError, which says what to type."""
    positive = "a number above 0"
    check_value(recipe, "epochs", 0 < recipe.epochs <= 1e6, f"{positive}, and at most a million")
    for name in ("min_improvement", "plateau_lr_factor"):
        value = getattr(recipe, name)
        check_value(recipe, name, math.isfinite(value) and value > 0, positive)
    for name in ("resize", "image_size"):
        check_value(recipe, name, 0 <= getattr(recipe, name) <= 1024, "a whole number of pixels from 0 to 1024")
    for name in ("patience", "val_images", "lr_reference_batch", "seed", "split_seed"):
        check_value(recipe, name, 0 <= getattr(recipe, name) < 2**31, "a whole number from 0 up")
    check_value(recipe, "tta_below", 0 < recipe.tta_below <= 1, "a probability above 0")
    sizes, epochs = recipe.first_sizes, recipe.first_epochs
    check_value(recipe, "first_sizes", all(8 <= size <= 1024 for size in sizes), "pixels a side from 8 up")
    fits = len(epochs) == len(sizes) and all(count >= 1 for count in epochs)
    check_value(recipe, "first_epochs", fits, f"{len(sizes)} whole numbers from 1 up, one for each of --first-sizes")
    if recipe.lr_shape == "linear" and recipe.lr_moves == "per-epoch":
        raise UsageError("--lr-shape linear moves at every step; type --lr-moves per-step, or --lr-shape cosine")
    for name in ("plateau_patience", "max_skipped_in_a_row"):
        check_value(recipe, name, getattr(recipe, name) >= 1, "a whole number from 1 up")
    check_value(
        recipe, "warmup_epochs", math.isfinite(recipe.warmup_epochs) and recipe.warmup_epochs >= 0, "a number from 0 up"
    )
    check_value(recipe, "label_smoothing", 0 <= recipe.label_smoothing < 1, "a share from 0 to below 1")
    finite, above_0 = all(map(math.isfinite, recipe.mean)), all(math.isfinite(s) and s > 0 for s in recipe.std)
    check_value(recipe, "mean", finite and len(recipe.mean) in (1, 3), "3 finite numbers, or 1 for grey images")
    check_value(recipe, "std", above_0 and len(recipe.std) in (1, 3), "3 numbers above 0, or 1 for grey images")


def recipe_names() -> list[str]:
    """The names of the files in recipes/."""
    return sorted(p.stem for p in (PROJECT / "recipes").glob("*.py") if p.stem != "__init__")


def load(name: str) -> Experiment:
    """The experiment called `name`, or written in the file `name` (a recipe.json; code is never loaded from a path).

    Raises UsageError for an unknown name and for a file that is not a recipe.
    """
    if name.endswith(".json"):
        return _load_json(Path(name))
    if name not in recipe_names():
        raise UsageError(f"--recipe {name} is unknown{nearest(name, recipe_names())}")
    return importlib.import_module(f"recipes.{name}").EXPERIMENT


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON fits a field of this type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(is_a(value, one) for one in args)
    if origin is Literal:
        return value in args
    if origin in (tuple, list):
        return isinstance(value, origin) and all(is_a(one, args[0]) for one in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def from_settings(values: dict[str, Any]) -> Recipe:
    """The recipe with these fields, as they come back from JSON; a field that is not named has its default.

    Raises UsageError for values that cannot be meant, and ValueError, TypeError, AttributeError or OverflowError for what is
    no recipe.
    """
    recipe = Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    for name, kind in get_type_hints(Recipe).items():
        if not is_a(getattr(recipe, name), kind):
            raise TypeError(f"{name} is {values[name]!r}")
    check_recipe(recipe)
    return recipe


FORMAT = "cifar10-deepspeed/2"  # of recipe.json, checkpoints and files of weights


def refuse_other_format(content: dict[str, Any], file: Path) -> None:
    """Raise UsageError unless a file's content says that it has this program's format."""
    if content.get("format") != FORMAT:
        found = f"format {str(content['format'])[:60]!r}" if "format" in content else "no format"
        raise UsageError(f"{file} has {found}, expected {FORMAT!r}; use the version of the program that wrote it")


def _load_json(path: Path) -> Experiment:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        refuse_other_format(content, path)
        recipe = from_settings(content["settings"])
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UsageError(f"--recipe {path} is not the recipe.json of a run: {reason}") from None
    return Experiment(recipe, path.absolute().parent / "ds_config.json")


def as_json(recipe: Recipe, name: str, dataset: dict[str, Any]) -> str:
    """The text of recipe.json, which `--recipe` reads again; `dataset` is the data set's description, for reports."""
    content = {"format": FORMAT, "recipe": name, "settings": dataclasses.asdict(recipe), "dataset": dataset}
    return json.dumps(content, indent=2) + "\n"
