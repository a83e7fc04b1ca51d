"""Recipes: the hyperparameters of an experiment. Every field is a flag, which overrides the recipe (see cli.py).

The optimizer, its base learning rate, clipping, precision, ZeRO and the global batch size are in DeepSpeed's JSON.
"""

import dataclasses
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from cifar10 import UsageError, nearest
from cifar10.config import schedule
from cifar10.config.values import is_a, is_positive

PROJECT = Path(__file__).resolve().parents[2]

# Shorter metavars in the help text.
_Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
_Channels = Annotated[tuple[float, ...], tyro.conf.arg(metavar="X")]
_Count = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
_Share = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")]
_Sizes = Annotated[tuple[int, ...], tyro.conf.arg(metavar="N", help_behavior_hint="(default: none)")]
Precisions = tuple[Literal["fp32", "bf16", "fp16"], ...]


@dataclass(frozen=True)
class Recipe:
    """The experiment's hyperparameters; each flag overrides the recipe."""

    epochs: float
    """Passes over the training split; fractions are allowed. The learning rate schedule spans them."""
    warmup_epochs: float
    """Epochs of linear learning rate warmup; at most a tenth of --epochs."""
    val_images: int
    """Training images held out for validation, stratified by class. With 0, all are trained on, the last model is the best,
    and early stopping monitors the training loss."""
    lr_schedule: _Name = "cosine"
    """How the learning rate changes after the warmup: constant, cosine, linear, polynomial(power), exponential(gamma),
    step(step_size, gamma), multistep(milestones, gamma), one-cycle or restarts(T_0, T_mult), named as in torch, in epochs.
    "cosine(per_epoch=True)" changes only between epochs, as any of them can. "python -m cifar10 schedule" draws it."""
    model: str = "bn_cnn"
    """Name of the network, one of cifar10/models; or torchvision:NAME or timm:NAME, any classifier of these libraries."""
    dropout: _Share = None
    """Share of the values that dropout removes, in networks that have it (default: the network's own)."""
    drop_path: _Share = None
    """Stochastic depth: the probability of leaving out the last block for an image (default: the network's own)."""
    top_k: _Count = None
    """Experts that each token is sent to, in networks that have experts: 1 or 2 (default: the network's own)."""
    capacity_factor: _Share = None
    """Tokens that an expert takes in training, as a multiple of an equal share; the rest are dropped. With 0 none is dropped
    (default: the network's own)."""
    balance_loss: _Share = None
    """Coefficient of the auxiliary loss that evens out the experts' shares of the tokens (default: the network's own)."""
    weights: str = "none"
    """Initial weights: none (random), imagenet (torchvision's pretrained weights, downloaded), or a file: a plain state dict,
    or a best_model or final file of an earlier run."""
    train_only: Annotated[str | None, tyro.conf.arg(metavar="NAMES", help_behavior_hint="")] = None
    """Train only these parameters: head (the last layer), or patterns of names such as "layer4.* fc.*" (default: all)."""
    dataset: str = "cifar10"
    """Name of the data set, listed above."""
    mean: _Channels = (0.4914, 0.4822, 0.4465)
    """Mean of each channel for normalization, on the scale 0 to 1: three numbers, or one for gray images."""
    std: _Channels = (0.2023, 0.1994, 0.2010)
    """Standard deviation of each channel for normalization. (The default is the reference document's, a mean over images.)"""
    resize: int = 0
    """Side in pixels to which images are resized, bilinearly; 0 does not resize."""
    image_size: int = 0
    """Side in pixels of the model's input: a random crop in training, the center crop in evaluation; 0 is the whole image."""
    first_sizes: _Sizes = ()
    """Progressive resizing: sides in pixels of the images in the first epochs, one after another; full size after that."""
    first_epochs: _Sizes = ()
    """Epochs of each of --first-sizes."""
    augment: str = "RandomCrop(4) RandomHorizontalFlip"
    """Augmentations in order, instead of the recipe's, named as in torchvision where it has them: RandomCrop(padding) or
    RandomCrop(padding, reflect) and a flip first, then any others listed above; or none."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy loss: the share of each target spread evenly over all classes."""
    patience: int = 15
    """Epochs without improvement of the monitored loss before early stopping; 0 disables it."""
    min_improvement: float = 1e-5
    """How much lower the monitored loss must be to count as an improvement."""
    plateau_patience: int = 5
    """Epochs without improvement that count as a plateau, which is reported."""
    plateau_lr_factor: float = 1.0
    """Factor on the learning rate at each plateau; 1 changes nothing."""
    max_skipped_in_a_row: int = 25
    """The run fails after this many steps in a row with a non-finite loss or gradient; each is skipped."""
    sync_bn: bool = False
    """Synchronize BatchNorm statistics over all ranks; needs GPUs."""
    lr_reference_batch: int = 0
    """Linear scaling rule: the learning rate is multiplied by the global batch size / this; 0 does not scale it."""
    ema: float = 0.0
    """Decay per step of an exponential moving average of the weights, for example 0.999; 0 keeps none. Each epoch validates the
    weights and their average, and best_model is the better; without validation images it is the average."""
    swa_epochs: int = 0
    """Stochastic weight averaging: the mean of the weights at the ends of the last N epochs, validated as with --ema."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and their augmentation."""
    tta: Literal["none", "mirror", "mirror+translate"] = "none"
    """Test-time augmentation: the final test is repeated with the outputs averaged over several views of each image."""
    tta_below: float = 1.0
    """Test-time augmentation only for images whose most probable class has a probability below this."""
    split_seed: int = 0
    """Seed of the validation split, separate from --seed so that seeds can be compared on one split."""

    @property
    def is_augmented(self) -> bool:
        """Whether training images differ from those of evaluation."""
        return self.augment != "none" or bool(self.first_sizes)

    @property
    def network_options(self) -> dict[str, float | None]:
        """What can be chosen of some networks; None is the network's own value."""
        return {name: getattr(self, name) for name in ("dropout", "drop_path", "top_k", "capacity_factor", "balance_loss")}

    def network_size(self, size: int) -> int:
        """Side in pixels of the model's input, for images of `size`."""
        return self.image_size or self.resize or size

    def lr_scale(self, global_images: int) -> float:
        """The linear scaling rule's factor on the learning rate."""
        return global_images / self.lr_reference_batch if self.lr_reference_batch else 1.0


@dataclass(frozen=True)
class Experiment:
    """One file in recipes/: a recipe, its DeepSpeed config (a dict or a JSON file), its preferred precisions in order, and the
    level that --engine-level auto takes where it is supported."""

    recipe: Recipe
    deepspeed: dict[str, Any] | Path
    precision: Precisions = ()
    engine_level: Literal["eager", "fused", "compile", "graph", "captured"] = "eager"


_EXAMPLES: dict[str, object] = {"epochs": 50, "mean": "0.4914 0.4822 0.4465", "std": "0.2023 0.1994 0.201", "lr": 0.1}
_EXAMPLES |= {"global_batch_size": 128, "val_images": 5000, "first_sizes": "24 28", "first_epochs": "3 3"}
_EXAMPLES |= {"dropout": 0.1, "drop_path": 0.1, "top_k": 2, "capacity_factor": 1.25, "balance_loss": 0.01}


def invalid(flag: str, value: object, expected: str, example: object) -> UsageError:
    example = example if str(example).startswith("--") else f"{flag} {example}"
    return UsageError(f"invalid value for {flag}: {value}, expected {expected}, for example {example}")


def check_values(settings: Any, *checks: tuple[str, Callable[[Any], bool], str]) -> None:
    """Raise UsageError for the first invalid setting. A check is names, a predicate, and what is expected; None is valid."""
    for names, is_valid, expected in checks:
        for name in names.split():
            value, default = getattr(settings, name), getattr(type(settings), name, None)
            if value is not None and not is_valid(value):
                example = _EXAMPLES.get(name, 1 if default is None else default)
                raise invalid("--" + name.replace("_", "-"), value, expected, example)


def check_recipe(recipe: Recipe) -> None:
    """Validate ranges. Raises UsageError, which names the flag and an example."""
    sizes = len(recipe.first_sizes)
    check_values(
        recipe,
        ("epochs", lambda n: 0 < n <= 1e6, "a number above 0, and at most a million"),
        ("min_improvement plateau_lr_factor", is_positive, "a number above 0"),
        ("resize image_size", lambda n: 0 <= n <= 1024, "an integer from 0 to 1024"),
        (
            "patience val_images lr_reference_batch seed split_seed swa_epochs",
            lambda n: 0 <= n < 2**31,
            "an integer >= 0, below 2**31",
        ),
        ("plateau_patience max_skipped_in_a_row", lambda n: n >= 1, "an integer >= 1"),
        ("top_k", lambda n: n in (1, 2), "1 or 2"),
        ("capacity_factor balance_loss", lambda n: 0 <= n < math.inf, "a number >= 0"),
        ("tta_below", lambda p: 0 < p <= 1, "a probability above 0"),
        ("first_sizes", lambda ns: all(8 <= n <= 1024 for n in ns), "integers from 8 to 1024"),
        ("first_epochs", lambda ns: len(ns) == sizes and all(n >= 1 for n in ns), f"{sizes} integers >= 1, as --first-sizes"),
        ("warmup_epochs", lambda n: 0 <= n < math.inf, "a number >= 0"),
        ("label_smoothing dropout drop_path ema", lambda n: 0 <= n < 1, "a number from 0 to below 1"),
        ("mean", lambda ns: len(ns) in (1, 3) and all(map(math.isfinite, ns)), "3 finite numbers, or 1 for gray images"),
        ("std", lambda ns: len(ns) in (1, 3) and all(map(is_positive, ns)), "3 numbers above 0, or 1 for gray images"),
    )
    schedule.parse(recipe.lr_schedule)
    if recipe.ema and recipe.swa_epochs:
        raise UsageError("--ema is not supported with --swa-epochs; leave out one of them")


def recipe_names() -> list[str]:
    """The names of the files in recipes/."""
    return sorted(p.stem for p in (PROJECT / "recipes").glob("*.py") if p.stem != "__init__")


def load(name: str) -> Experiment:
    """Load the recipe called `name`, or the recipe.json at that path; code is never loaded from a path. Raises UsageError."""
    if name.endswith(".json"):
        return _load_json(Path(name))
    if name not in recipe_names():
        raise UsageError(f"--recipe {name} is unknown{nearest(name, recipe_names())}")
    return importlib.import_module(f"recipes.{name}").EXPERIMENT


def from_settings(values: dict[str, Any]) -> Recipe:
    """A recipe from JSON values; missing fields get their defaults.

    Raises UsageError for invalid values, and ValueError, TypeError, AttributeError or OverflowError for anything else.
    """
    values = schedule.modern(values)
    recipe = Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    for name, kind in get_type_hints(Recipe).items():
        if not is_a(getattr(recipe, name), kind):
            raise TypeError(f"{name} is {values[name]!r}")
    check_recipe(recipe)
    return recipe


FORMAT = "cifar10-deepspeed/2"  # of recipe.json, checkpoints and files of weights


def refuse_other_format(content: dict[str, Any], file: Path) -> None:
    """Raise UsageError unless a file's content has this program's format."""
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
    """The text of recipe.json, for --recipe; `dataset` is the data set's description, for reports."""
    content = {"format": FORMAT, "recipe": name, "settings": dataclasses.asdict(recipe), "dataset": dataset}
    return json.dumps(content, indent=2) + "\n"
