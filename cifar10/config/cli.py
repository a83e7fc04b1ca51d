"""The command line: every field of `Recipe` and `Options` is a flag, and flags override the recipe.

`Options` holds what does not define the experiment (folders, threads, logging) and what overrides DeepSpeed's JSON.
"""

import argparse
import contextlib
import io
import os
import re
from dataclasses import dataclass, fields, make_dataclass
from itertools import dropwhile, takewhile, zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import docstring_parser
import tyro

from cifar10 import UsageError, at_home
from cifar10.config import habits
from cifar10.config.recipe import Precisions, Recipe, check_recipe, check_values, load
from cifar10.config.values import is_positive
from cifar10.distributed.device import Choice
from cifar10.files import data_folder

# Flags whose help text states the default itself.
_Whole = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
_Number = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")]
_Sets = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE ...", help_behavior_hint="")]
_File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
_Precisions = Annotated[Precisions, tyro.conf.arg(metavar="P [P ...]", help_behavior_hint="")]
_Name = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
_Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]


@dataclass(frozen=True)
class Options:
    """Runtime settings, and overrides of DeepSpeed's JSON."""

    dry_run: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Say what would be trained, on what, with which DeepSpeed JSON and for how long, measured on random images; nothing is
    written or downloaded."""
    recipe: str = "bn_cnn"
    """A recipe's name (recipes/ holds one file each), or the path of an earlier run's recipe.json."""
    deepspeed_config: _File = None
    """DeepSpeed config file in JSON (default: the recipe's own)."""
    set: _Sets = ()
    """Overrides keys of the JSON, as in --set optimizer.params.weight_decay=1e-3 zero_optimization.stage=1; values are JSON."""
    lr: _Number = None
    """Base learning rate; overrides the JSON."""
    micro_batch_size: _Whole = None
    """Images per forward pass and rank; overrides the JSON. The global batch size stays, with more accumulation steps."""
    precision: _Precisions = ()
    """Overrides the JSON. Given several, in order of preference, the run uses the first that this machine's GPU or CPU supports
    natively; a single one is always used (default: the recipe's preference, if it has one and its own JSON is used)."""
    global_batch_size: _Whole = None
    """Images per optimizer step, over all ranks and accumulation steps; overrides the JSON."""
    pipeline_stages: _Whole = None
    """Split the network's layers into N stages, one a rank, through which micro-batches pass; overrides the JSON. The number of
    ranks is a multiple of it, the network one like vgg11."""
    data_dir: Annotated[Path, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = Path("data")
    """Folder of the data set; CIFAR-10 is downloaded to it if missing (default: $CIFAR10_DIR, else data/)."""
    output_dir: _Folder = None
    """The run's folder (default: runs/<recipe>-<time>). Repeat the command with the same folder to resume the run."""
    resume: str = "auto"
    """auto: resume an unfinished run in --output-dir; never: fail if that folder is not empty; or start from another run's
    folder, or from one of its checkpoints: RUN/checkpoints/latest, best or epoch_005."""
    max_steps: _Whole = None
    """Finish the run after this many steps; the learning rate schedule still follows --epochs."""
    max_minutes: _Number = None
    """Save a checkpoint and stop after this many minutes; the same command resumes the run."""
    stop_at: _Number = None
    """Save a checkpoint and stop at this Unix time, in seconds; run_deepspeed.sh sets it from the job's time limit."""
    timeout_minutes: float = 10.0
    """How long a rank waits for the other ranks before it fails because they have crashed or hang."""
    test_images: _Whole = None
    """Number of test images in the final test (default: all); 0 never reads the test split, for hyperparameter tuning."""
    sealed: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Refuse any opening of the test split: the run ends without a test accuracy (default: no, unless $CIFAR10_SEALED is 1)."""
    device: Choice = "auto"
    """Train on GPUs (cuda, also AMD's) or on the CPU; auto takes the GPUs if there is a sign of any, and never the CPU in place
    of GPUs that PyTorch cannot use. $DS_ACCELERATOR=cpu, or an empty $CUDA_VISIBLE_DEVICES, asks for the CPU as well."""
    threads: _Whole = None
    """CPU threads per rank (default: $OMP_NUM_THREADS, else the cores of this machine or container, divided by its ranks)."""
    engine_level: Literal["auto", "eager", "fused", "compile", "graph", "captured"] = "auto"
    """How a step runs: eager; fused, on a CPU with BatchNorm, pooling and ReLU as one operation; compile, with torch.compile;
    graph, forward and backward as CUDA graphs; captured, the whole step as one CUDA graph (one GPU, no ZeRO). auto is what the
    recipe asks for where it is supported, as bn_cnn does for fused and speedrun94 for captured, else eager."""
    gradient_checkpointing: bool = False
    """Save memory: keep only each block's input for the backward pass, which computes the rest again with the same results."""
    expert_parallel: _Whole = None
    """Ranks over which each layer of experts is divided: 1, 2 or 4; groups of so many ranks hold copies (default: the most that
    divide both the ranks and the experts)."""
    deterministic: bool = False
    """Use deterministic algorithms on a GPU, where PyTorch has them; runs on a CPU are deterministic anyway."""
    log_every_steps: _Whole = None
    """Steps per row of steps.csv (default: the JSON's steps_per_print, else 100); metrics stay on the device in between."""
    save_every_epochs: int = 1
    """Epochs between resumable checkpoints; 0 saves only at the end or when stopped."""
    keep_checkpoints: int = 2
    """Number of resumable checkpoints to keep, besides the best and those of --save-frequency."""
    save_frequency: int = 0
    """Epochs between resumable checkpoints that are never deleted, such as checkpoints/epoch_005; 0 keeps none."""
    tensorboard: bool = True
    """Also log metrics for TensorBoard, to tensorboard/ in the run's folder."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases: online; offline, for `wandb sync` later; or off. auto follows $WANDB_MODE; without it, online if there
    is an API key ($WANDB_API_KEY or `wandb login`), else off."""
    wandb_project: _Name = None
    """The W&B project to log to (default: $WANDB_PROJECT, else deepspeed-cifar10)."""
    wandb_name: _Name = None
    """The run's name in W&B (default: $WANDB_NAME, else the name of the run's folder)."""
    report: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = True
    """Write report.html and its plots when the run has finished (default: yes, unless $CIFAR10_REPORT is 0)."""


def check_options(options: Options) -> None:
    """Validate ranges. Raises UsageError, which names the flag and an example."""
    at_least_1 = "max_steps global_batch_size micro_batch_size threads log_every_steps keep_checkpoints pipeline_stages"
    check_values(
        options,
        (at_least_1, lambda n: n >= 1, "an integer >= 1"),
        ("expert_parallel", lambda n: n in (1, 2, 4), "1, 2 or 4"),
        ("test_images save_every_epochs save_frequency", lambda n: n >= 0, "an integer >= 0"),
        ("lr max_minutes stop_at timeout_minutes", is_positive, "a number above 0"),
    )


def without_launcher_flags(argv: list[str]) -> list[str]:
    """`argv` without flags that launchers and other scripts add: --local_rank[=]N, --deepspeed, and --num-workers[=]N, which
    has no meaning here (images are on the device). --no-amp becomes --precision fp32."""
    kept, words = [], iter(zip_longest(argv, argv[1:], fillvalue="--"))
    for word, following in words:
        if re.fullmatch("--(local[_-]rank|num[_-]workers)", word):
            next(words, None)
        elif word == "--no-amp":
            kept += ["--precision", "fp32"]
        elif word != "--deepspeed" or not following.startswith("-"):  # with a file: refused, with what to type
            kept += [] if re.match("--(local[_-]rank|num[_-]workers)=", word) else [word]
    return kept


def _one_word_each(argv: list[str]) -> list[str]:
    """`--set A B` as `--set A --set B`, so that both can be written."""
    words: list[str] = []
    for word in argv:
        more = "=" in word and not word.startswith("-") and len(words) > 1 and words[-2] == "--set"
        words += ["--set", word] if more else [word]
    return words


def early_value(argv: list[str], flag: str) -> str | None:
    """The last value of one flag, read before the others because their defaults depend on it."""
    words = ((*word.partition("=")[::2], following) for word, following in zip_longest(argv, argv[1:]))
    values = [value or following for name, value, following in words if name == flag]
    return values[-1] if values else None


def _one_line(printed: str) -> str:
    """The message in the box that tyro prints about a bad value: the lines between its title and its first rule."""
    lines = (line.strip("│|╭╮╰╯─- ") for line in printed.strip().splitlines()[1:])
    sentence = " ".join(takewhile(bool, dropwhile(lambda line: not line, lines))).removeprefix("Error parsing ")
    number = r"^(--\S+): no type matching .* from \['(.*)'\]\.?$"
    return re.sub(number, r"invalid value for \1: \2, expected a number", sentence).rstrip(".") + "; see --help"


def _refuse_empty(argv: list[str]) -> None:
    """Raise UsageError for a flag without its value, as `--output-dir "$UNSET"` leaves it."""
    for flag, word in zip(["", *argv], argv, strict=False):
        if not word or re.fullmatch("--.*=", word):
            raise UsageError(f"{flag or 'an argument' if not word else word[:-1]} is empty; give it a value or omit it")


def join_lines_of_help(kind: type) -> None:
    """Make one line of each docstring of a dataclass's fields, for --help: tyro keeps the breaks of those that are indented."""
    for field in docstring_parser.parse_from_object(kind).params:
        text = tyro.conf.arg(help=" ".join((field.description or "").split()))
        kind.__annotations__[field.arg_name] = Annotated[kind.__annotations__[field.arg_name], text]


def _tyro(kind: type, argv: list[str], **how: Any) -> tuple[Any, list[str]]:
    """Parse a command line into a dataclass and the arguments that tyro does not know. Raises UsageError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=argv, config=(tyro.conf.OmitArgPrefixes,), return_unknown_args=True, **how)
    except SystemExit as leave:
        if leave.code == 0:  # --help
            raise
        raise UsageError(_one_line(printed.getvalue())) from None


def split_options(argv: list[str], kind: type) -> tuple[Any, list[str]]:
    """Parse the flags of the dataclass `kind`, and return the other arguments, --help included. Raises UsageError."""
    _refuse_empty(argv)
    return _tyro(kind, at_home(argv), add_help=False)


def parse(
    argv: list[str], program: str = "cifar10_deepspeed.py", description: str | None = None, extra: type | None = None
) -> tuple[Recipe, Options]:
    """Parse and validate a command line. Raises UsageError (one line) for invalid flags and values.

    `extra` is a dataclass of flags that `split_options` has already parsed, so that --help lists them too.
    """
    argv = at_home(_one_word_each(without_launcher_flags(argv)))
    _refuse_empty(argv)
    name = early_value(argv, "--recipe")
    experiment = load(Options.recipe if name is None else name)
    names_a_json = any(early_value(argv, flag) is not None for flag in ("--deepspeed_config", "--deepspeed-config"))
    names_a_json |= any(re.match(r"(--set=)?(fp16|bf16|torch_autocast)\b.*=", word) for word in argv)
    options = Options(
        data_dir=data_folder(),
        precision=() if names_a_json else experiment.precision,
        report=os.environ.get("CIFAR10_REPORT") != "0",
        sealed=os.environ.get("CIFAR10_SEALED", "0") not in ("", "0"),
    )
    own = "launch" if program == "main.py" else program.split()[-1].replace("-", "_")
    tables = {**({own: extra()} if extra else {}), "run": options, "experiment": experiment.recipe}
    if {"-h", "--help"} & {*argv}:
        for values in tables.values():
            join_lines_of_help(type(values))
    kind = make_dataclass("CommandLine", [(table, type(values)) for table, values in tables.items()])
    line, unknown = _tyro(kind, argv, default=kind(**tables), prog=program, description=description)
    if unknown:
        flags = ["--" + f.name.replace("_", "-") for values in tables.values() for f in fields(values)]
        raise UsageError(habits.refusal(unknown, flags))
    check_recipe(line.experiment)
    check_options(line.run)
    return line.experiment, line.run


def take_old_schedule(argv: list[str]) -> tuple[list[str], str | None, str | None]:
    """Split off the values of --lr-shape and --lr-moves, which --lr-schedule replaces; to be removed after 0.3."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--lr-shape", "--lr_shape", choices=("cosine", "linear"))
    parser.add_argument("--lr-moves", "--lr_moves", choices=("per-step", "per-epoch"))
    try:
        old, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}; use --lr-schedule instead") from None
    return rest, old.lr_shape, old.lr_moves
