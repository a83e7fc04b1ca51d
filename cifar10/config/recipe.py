"""A recipe is a frozen description of one experiment; this file checks it, loads it by name, and reads the command line.

Two layers and no third: a flag wins over the recipe. The optimizer, its base learning rate, clipping, precision, ZeRO and
the global batch belong to DeepSpeed's JSON; everything else that changes the result belongs to the recipe. What changes
only how a run is carried out (folders, threads, logging) is in `Options`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import io
import json
import math
import os
import re
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from cifar10 import UsageError

PROJECT = Path(__file__).resolve().parents[2]

# Options whose default the help text explains in words.
_Whole = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
_Number = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")]
_Channels = Annotated[tuple[float, ...], tyro.conf.arg(metavar="X")]
_Sizes = Annotated[tuple[int, ...], tyro.conf.arg(metavar="N")]
_File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
Precisions = tuple[Literal["fp32", "bf16", "fp16"], ...]
_Precisions = Annotated[Precisions, tyro.conf.arg(metavar="P [P ...]", help_behavior_hint="")]
_Words = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
_Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]


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
    dataset: Literal["cifar10", "synthetic", "mnist", "synthetic_mnist", "random_mnist"] = "cifar10"
    """The images: real ones, learnable synthetic ones in their shape that need no download, or noise with random labels."""
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
    crop_padding: int = 4
    """Pixels added on each side of the image before the random crop; 0 with image size 0 turns the crop off."""
    padding_mode: Literal["constant", "reflect"] = "constant"
    """What --crop-padding adds: constant, black; reflect, the image mirrored at its border, which itself is not repeated."""
    flip: bool = True
    """Mirror every other training image, at random."""
    alternate_flip: bool = False
    """Mirror each image in every other epoch instead, which half of them in the first being left to chance."""
    cutout: int = 0
    """Pixels a side of a black square that is laid over each training image, anywhere inside it; 0 lays none."""
    brightness: float = 0.0
    """The most that is added to all normalised pixels of a training image, or taken from them, at random; in units of --std."""
    contrast: float = 0.0
    """The most by which the contrast of a training image changes, at random: with 0.1 its pixels' distance from --mean is
    multiplied by 0.9 to 1.1."""
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

    def lr_scale(self, global_images: int) -> float:
        """What the linear scaling rule multiplies the learning rate by."""
        return global_images / self.lr_reference_batch if self.lr_reference_batch else 1.0


RECIPE_DEFAULTS = {f.name: f.default for f in fields(Recipe) if f.default is not dataclasses.MISSING}


@dataclass(frozen=True)
class Options:
    """How a run is carried out, and what the command line overrides in DeepSpeed's JSON."""

    recipe: str = "bn_cnn"
    """A name from recipes/, or the recipe.json of an earlier run."""
    deepspeed_config: _File = None
    """DeepSpeed's JSON; default: the recipe's own."""
    lr: _Number = None
    """Base learning rate, instead of the JSON's."""
    micro_batch_size: _Whole = None
    """Images of one forward pass on one rank, instead of the JSON's; the global batch stays, in more passes."""
    precision: _Precisions = ()
    """Instead of the JSON's. One alone is taken as it is; of several, in order of preference, the first that this machine's
    GPU or CPU computes in natively (default: the recipe's preference, if it has one and its own JSON is used)."""
    global_batch_size: _Whole = None
    """Images per step over all ranks and accumulation, instead of the JSON's."""
    data_dir: Annotated[Path, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = Path("data")
    """Where CIFAR-10 is looked for, or downloaded to (default: $CIFAR10_DIR, else data/)."""
    output_dir: _Folder = None
    """The run's own folder (default: runs/<recipe>-<time>). The same command with the same folder continues the run."""
    resume: str = "auto"
    """auto: continue an unfinished run in --output-dir; never: refuse a folder that is not empty; or another run's folder, or
    one of its checkpoints/latest, best, epoch_005: this run then starts from there."""
    max_steps: _Whole = None
    """End the run in good order after this many steps; the schedule stays that of --epochs."""
    max_minutes: _Number = None
    """Save and stop after this many minutes, as on a signal; the same command goes on."""
    stop_at: _Number = None
    """The same at a point in time, in seconds since 1970: shortly before a job's time limit, as run_deepspeed.sh knows it."""
    timeout_minutes: float = 10.0
    """How long a rank waits for the others before it gives up, and the run ends: the others have died, or hang."""
    test_images: _Whole = None
    """How many test images the final test uses (default: all); 0 leaves the test split unopened, as tuning should."""
    threads: _Whole = None
    """CPU threads per rank (default: cores of this machine over ranks on it)."""
    num_workers: _Whole = None
    """Changes nothing, and is here for command lines of other programs: there are no worker processes, a batch is cut out of
    images that lie on the device."""
    engine_level: Literal["auto", "eager", "compile", "graph", "captured"] = "auto"
    """How a step is carried out: eager, one operation after another; compile, as kernels that PyTorch's compiler makes; graph,
    forward and backward as CUDA graphs; captured, the whole step as one (one GPU, no ZeRO). auto is eager, on GPUs too: none of
    the others has been measured on one yet."""
    deterministic: bool = False
    """On a GPU, algorithms that give the same bits each time, where there are any; a CPU's do anyway."""
    log_every_steps: _Whole = None
    """Steps between two rows of steps.csv (default: the JSON's steps_per_print, else 100); nothing is read back from the
    device in between."""
    save_every_epochs: int = 1
    """Epochs between two resumable checkpoints; 0 saves only at the end or at a stop."""
    keep_checkpoints: int = 2
    """How many resumable checkpoints are kept, beside the best and those of --save-frequency."""
    save_frequency: int = 0
    """Epochs between two resumable checkpoints that are kept for good, as checkpoints/epoch_005; 0 keeps none."""
    tensorboard: bool = True
    """Write the run's metrics for TensorBoard as well, to tensorboard/ in its folder."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases: online, or offline for `wandb sync` later; auto does what $WANDB_MODE says, and without it is online
    where there is a key ($WANDB_API_KEY, or that of `wandb login`), else off."""
    wandb_project: _Words = None
    """The W&B project that collects the runs (default: $WANDB_PROJECT, else deepspeed-cifar10)."""
    wandb_name: _Words = None
    """The run's name in that project (default: $WANDB_NAME, else that of the run's folder)."""
    report: bool = True
    """Make report.html and its pictures when the run has finished (default: yes, unless $CIFAR10_REPORT is 0)."""


@dataclass(frozen=True)
class Experiment:
    """What one file in recipes/ defines: a recipe, the DeepSpeed JSON that goes with it (a path inside the project), and
    the precisions it prefers, best first; with none, the precision is the JSON's."""

    recipe: Recipe
    deepspeed_config: str = "ds_config.json"
    precision: Precisions = ()


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean X?` for a misspelt word, or the list of what there is."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(sorted(known))}"


def _check(settings: Recipe | Options, name: str, ok: bool, wanted: str) -> None:
    if not ok:
        flag = "--" + name.replace("_", "-")
        raise UsageError(f"{flag} {getattr(settings, name)} is impossible; type {wanted}, as in {flag} {_example(name)}")


def _example(name: str) -> object:
    examples = {
        "epochs": 50,
        "mean": "0.4914 0.4822 0.4465",
        "std": "0.2023 0.1994 0.201",
        "lr": 0.1,
        "global_batch_size": 128,
        "val_images": 5000,
        "first_sizes": "24 28",
        "first_epochs": "3 3",
    }
    defaults = {
        f.name: f.default for cls in (Recipe, Options) for f in fields(cls) if f.default not in (None, dataclasses.MISSING)
    }
    return examples.get(name, defaults.get(name, 1))


def check_recipe(recipe: Recipe) -> None:
    """Refuse values that cannot be meant. Raises UsageError, which says what to type."""
    positive = "a number above 0"
    _check(recipe, "epochs", 0 < recipe.epochs <= 1e6, f"{positive}, and at most a million")
    for name in ("min_improvement", "plateau_lr_factor"):
        value = getattr(recipe, name)
        _check(recipe, name, math.isfinite(value) and value > 0, positive)
    _check(recipe, "cutout", 0 <= recipe.cutout <= 1024, "a whole number of pixels from 0 to 1024")
    _check(recipe, "crop_padding", 0 <= recipe.crop_padding <= 32, "a whole number from 0 to 32, the size of an image")
    for name in ("brightness", "contrast"):
        _check(recipe, name, 0 <= getattr(recipe, name) <= 1, "a number from 0 to 1")
    for name in ("resize", "image_size"):
        _check(recipe, name, 0 <= getattr(recipe, name) <= 1024, "a whole number of pixels from 0 to 1024")
    for name in ("patience", "val_images", "lr_reference_batch", "seed", "split_seed"):
        _check(recipe, name, 0 <= getattr(recipe, name) < 2**31, "a whole number from 0 up")
    _check(recipe, "tta_below", 0 < recipe.tta_below <= 1, "a probability above 0")
    sizes, epochs = recipe.first_sizes, recipe.first_epochs
    _check(recipe, "first_sizes", all(8 <= size <= 1024 for size in sizes), "pixels a side from 8 up")
    fits = len(epochs) == len(sizes) and all(count >= 1 for count in epochs)
    _check(recipe, "first_epochs", fits, f"{len(sizes)} whole numbers from 1 up, one for each of --first-sizes")
    if recipe.lr_shape == "linear" and recipe.lr_moves == "per-epoch":
        raise UsageError("--lr-shape linear moves at every step; type --lr-moves per-step, or --lr-shape cosine")
    for name in ("plateau_patience", "max_skipped_in_a_row"):
        _check(recipe, name, getattr(recipe, name) >= 1, "a whole number from 1 up")
    _check(recipe, "warmup_epochs", math.isfinite(recipe.warmup_epochs) and recipe.warmup_epochs >= 0, "a number from 0 up")
    _check(recipe, "label_smoothing", 0 <= recipe.label_smoothing < 1, "a share from 0 to below 1")
    finite, above_0 = all(map(math.isfinite, recipe.mean)), all(math.isfinite(s) and s > 0 for s in recipe.std)
    _check(recipe, "mean", finite and len(recipe.mean) in (1, 3), "3 finite numbers, or 1 for grey images")
    _check(recipe, "std", above_0 and len(recipe.std) in (1, 3), "3 numbers above 0, or 1 for grey images")


def check_options(options: Options) -> None:
    """Refuse values that cannot be meant. Raises UsageError, which says what to type."""
    for name in ("max_steps", "global_batch_size", "micro_batch_size", "threads", "log_every_steps", "keep_checkpoints"):
        value = getattr(options, name)
        _check(options, name, value is None or value >= 1, "a whole number from 1 up")
    for name in ("test_images", "save_every_epochs", "save_frequency", "num_workers"):
        value = getattr(options, name)
        _check(options, name, value is None or value >= 0, "a whole number from 0 up")
    for name in ("max_minutes", "stop_at", "timeout_minutes"):
        value = getattr(options, name)
        _check(options, name, value is None or (math.isfinite(value) and value > 0), "a number above 0")
    _check(options, "lr", options.lr is None or (math.isfinite(options.lr) and options.lr > 0), "a number above 0")


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


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value from JSON can stand where a field of this type is wanted."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return isinstance(value, tuple) and all(_is_a(one, kinds[0]) for one in value)
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
        if not _is_a(getattr(recipe, name), kind):
            raise TypeError(f"{name} is {values[name]!r}")
    check_recipe(recipe)
    return recipe


def _load_json(path: Path) -> Experiment:
    try:
        recipe = from_settings(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UsageError(f"--recipe {path} is not the recipe.json of a run: {reason}") from None
    return Experiment(recipe, deepspeed_config=str(path.absolute().parent / "ds_config.json"))


def as_json(recipe: Recipe, name: str) -> str:
    """The text of recipe.json, which `--recipe` reads again."""
    return json.dumps({"recipe": name, "settings": dataclasses.asdict(recipe)}, indent=2) + "\n"


def without_launcher_flags(argv: list[str]) -> list[str]:
    """`argv` without what launchers add and older command lines carry: --local_rank[=]N and --deepspeed.

    --no-amp, the word of torchrun scripts, becomes --precision fp32.
    """
    kept, skip = [], False
    words = [part for word in argv for part in (("--precision", "fp32") if word == "--no-amp" else (word,))]
    for word in words:
        if skip:
            skip = False
        elif re.fullmatch(r"--local[_-]rank", word):
            skip = True
        elif word != "--deepspeed" and not re.match(r"--local[_-]rank=", word):
            kept.append(word)
    return kept


@dataclass(frozen=True)
class _CommandLine:
    run: Options
    experiment: Recipe


def _early_value(argv: list[str], flag: str) -> str | None:
    """The last value of one flag, read before the others because their defaults depend on it."""
    value = None
    for word, following in zip_longest(argv, argv[1:]):
        if word == flag:
            value = following
        elif word.startswith(flag + "="):
            value = word[len(flag) + 1 :]
    return value


def _one_line(printed: str) -> str:
    """The sentence in the box that tyro prints about a bad value: what stands between its title and its first rule."""
    lines = [line.strip("│|╭╮╰╯─- ") for line in printed.strip().splitlines()[1:]]
    while lines and not lines[0]:
        lines.pop(0)
    sentence = " ".join(lines[: lines.index("")] if "" in lines else lines).removeprefix("Error parsing ")
    sentence = re.sub(r"^(--\S+): no type matching .* from \['(.*)'\]\.?$", r"\1 \2 is impossible; it takes a number", sentence)
    return f"{sentence.rstrip('.')}; --help lists every flag"


def _refuse_empty(argv: list[str]) -> None:
    """Raise UsageError for a flag without its value, as `--output-dir "$UNSET"` leaves it."""
    for flag, word in zip(["", *argv], argv, strict=False):
        if not word or re.fullmatch("--.*=", word):
            raise UsageError(
                f"{flag or 'a word' if not word else word[:-1]} is empty; type a value after it, or leave the flag out"
            )


def _refuse_unknown(words: list[str]) -> None:
    """Raise UsageError for the first word that no flag claims, with the nearest flag."""
    if not words:
        return
    flags = ["--" + f.name.replace("_", "-") for cls in (Options, Recipe) for f in fields(cls)]
    flag = words[0].split("=")[0]
    raise UsageError(f"{flag} is not a flag of this program{nearest(flag.replace('_', '-'), flags)}")


def parse(argv: list[str], program: str = "cifar10_deepspeed.py", description: str | None = None) -> tuple[Recipe, Options]:
    """Read a command line: the recipe's fields and the options, all of them flags made from the dataclasses above.

    Raises UsageError (one line) for whatever cannot be meant. `--help` prints and exits with 0.
    """
    argv = without_launcher_flags(argv)
    _refuse_empty(argv)
    name = _early_value(argv, "--recipe")
    experiment = load(Options.recipe if name is None else name)
    names_a_json = any(_early_value(argv, flag) is not None for flag in ("--deepspeed_config", "--deepspeed-config"))
    options = Options(
        data_dir=Path(os.environ.get("CIFAR10_DIR") or "data"),
        deepspeed_config=PROJECT / experiment.deepspeed_config,  # an absolute path stays as it is
        precision=() if names_a_json else experiment.precision,
        report=os.environ.get("CIFAR10_REPORT") != "0",
    )
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            line, unknown = tyro.cli(
                _CommandLine,
                args=argv,
                default=_CommandLine(options, experiment.recipe),
                prog=program,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
            )
    except SystemExit as leave:
        if leave.code == 0:  # --help
            raise
        raise UsageError(_one_line(printed.getvalue())) from None
    _refuse_unknown(unknown)
    check_recipe(line.experiment)
    check_options(line.run)
    return line.experiment, line.run
