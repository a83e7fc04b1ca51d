"""The command line: the recipe's fields and the options of a run, all of them flags made from dataclasses.

A flag wins over the recipe. What changes only how a run is carried out (folders, threads, logging), and what overrides
DeepSpeed's JSON, is in `Options`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import re
from dataclasses import dataclass, fields, make_dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cifar10 import UsageError, nearest
from cifar10.config.recipe import Precisions, Recipe, check_recipe, check_value, load

# Flags whose default the help text explains in words.
_Whole = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
_Number = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")]
_File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
_Precisions = Annotated[Precisions, tyro.conf.arg(metavar="P [P ...]", help_behavior_hint="")]
_Words = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
_Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]


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


def check_options(options: Options) -> None:
    """Refuse values that cannot be meant. Raises UsageError, which says what to type."""
    for name in ("max_steps", "global_batch_size", "micro_batch_size", "threads", "log_every_steps", "keep_checkpoints"):
        value = getattr(options, name)
        check_value(options, name, value is None or value >= 1, "a whole number from 1 up")
    for name in ("test_images", "save_every_epochs", "save_frequency", "num_workers"):
        value = getattr(options, name)
        check_value(options, name, value is None or value >= 0, "a whole number from 0 up")
    for name in ("max_minutes", "stop_at", "timeout_minutes"):
        value = getattr(options, name)
        check_value(options, name, value is None or (math.isfinite(value) and value > 0), "a number above 0")
    check_value(options, "lr", options.lr is None or (math.isfinite(options.lr) and options.lr > 0), "a number above 0")


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


def _refuse_unknown(words: list[str], kinds: list[type]) -> None:
    """Raise UsageError for the first word that no flag claims, with the nearest flag."""
    if not words:
        return
    flags = ["--" + f.name.replace("_", "-") for kind in kinds for f in fields(kind)]
    flag = words[0].split("=")[0]
    raise UsageError(f"{flag} is not a flag of this program{nearest(flag.replace('_', '-'), flags)}")


def _tyro(kind: type, argv: list[str], **how: Any) -> tuple[Any, list[str]]:
    """The dataclass that tyro reads from a command line, and the words that it does not know. Raises UsageError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=argv, config=(tyro.conf.OmitArgPrefixes,), return_unknown_args=True, **how)
    except SystemExit as leave:
        if leave.code == 0:  # --help
            raise
        raise UsageError(_one_line(printed.getvalue())) from None


def split_options(argv: list[str], kind: type) -> tuple[Any, list[str]]:
    """The options of a dataclass `kind`, wherever they are in a command line, and the other words as they are.

    Raises UsageError for a value of the wrong type; --help is one of the other words.
    """
    _refuse_empty(argv)
    return _tyro(kind, argv, add_help=False)


def parse(
    argv: list[str], program: str = "cifar10_deepspeed.py", description: str | None = None, extra: type | None = None
) -> tuple[Recipe, Options]:
    """Read a command line: the recipe's fields and the options, all of them flags made from the dataclasses above.

    `extra` is a dataclass of the program's own options, which split_options has taken out: --help lists them as well.
    Raises UsageError (one line) for invalid flags and values. `--help` prints and exits with 0.
    """
    argv = without_launcher_flags(argv)
    _refuse_empty(argv)
    name = _early_value(argv, "--recipe")
    experiment = load(Options.recipe if name is None else name)
    names_a_json = any(_early_value(argv, flag) is not None for flag in ("--deepspeed_config", "--deepspeed-config"))
    options = Options(
        data_dir=Path(os.environ.get("CIFAR10_DIR") or "data"),
        precision=() if names_a_json else experiment.precision,
        report=os.environ.get("CIFAR10_REPORT") != "0",
    )
    tables = {**({"launch": extra()} if extra else {}), "run": options, "experiment": experiment.recipe}
    kind = make_dataclass("CommandLine", [(table, type(values)) for table, values in tables.items()])
    line, unknown = _tyro(kind, argv, default=kind(**tables), prog=program, description=description)
    _refuse_unknown(unknown, [type(values) for values in tables.values()])
    check_recipe(line.experiment)
    check_options(line.run)
    return line.experiment, line.run


def take_old_flags(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """`argv` without the flags of 0.1 that --augment replaces, and their values; to be removed after 0.2."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, kind in (
        ("crop-padding", int),
        ("cutout", int),
        ("brightness", float),
        ("contrast", float),
        ("padding-mode", str),
    ):
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", type=kind)
    for name in ("flip", "alternate-flip"):
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", action=argparse.BooleanOptionalAction)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            old, rest = parser.parse_known_args(argv)
    except SystemExit:
        raise UsageError(
            f"{printed.getvalue().strip().splitlines()[-1].partition('error: ')[2]}; --augment replaces it"
        ) from None
    return rest, {name.replace("-", "_"): value for name, value in vars(old).items()}
