"""`python -m cifar10 compare A B [C ...]`: paired runs, one after another, until one is better or the runs are used up.

Only validation images are used. After each round of one run per candidate, report/paired.py tests every two of them; a
candidate that another one has beaten gets no more runs. Runs that are there are taken up, so that the same command goes on.
"""

import itertools
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from cifar10 import UsageError
from cifar10.config.cli import Options, join_lines_of_help, split_options
from cifar10.config.recipe import check_values
from cifar10.config.values import is_positive
from cifar10.distributed import device
from cifar10.launch.command import LaunchOptions, count_ranks, split_launch_options
from cifar10.launch.supervise import FINISHED, RESUMABLE, SIGNALS, train
from cifar10.plan import Plan, make_plan
from cifar10.report.html import make_comparison, mean_and_sd
from cifar10.report.paired import ERROR_RATE, Pairing
from cifar10.run import folder as run_folder
from cifar10.run.record import Record, open_record

Runs = dict[str, list[Record]]  # of each candidate, by its name


@dataclass(frozen=True)
class CompareOptions:
    """Train recipes or settings with paired seeds until one is better, on validation images only.

    python -m cifar10 compare A B [C ...] [flags for all]: each is a recipe's name, a recipe.json, or quoted flags, such as
    "--lr 0.2" or "bn_cnn --lr 0.2". All other flags are those of a run, and are for all candidates.
    """

    max_runs: int = 64
    """At most this many runs in all, those that are there included."""
    max_minutes: Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")] = None
    """Begin no round of runs that would not end within this many minutes, judged by the longest round so far."""
    grid: Annotated[tuple[str, ...], tyro.conf.arg(metavar='"--FLAG A,B,..." ...', help_behavior_hint="")] = ()
    """Search all combinations of these values, for one candidate or the default recipe, by successive halving: the better half
    goes on to twice as many seeds. It claims no error rate, and ends with the command that tests its result on other seeds."""
    output_dir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where the runs and compare.html go (default: runs/compare-<time>). Repeat the command with the same folder to go on."""
    error_rate: float = ERROR_RATE
    """The chance that a worse or equal candidate is called better, over all candidates together."""


@dataclass(frozen=True)
class Candidate:
    """One of the settings that are compared."""

    name: str
    flags: list[str]
    plan: Plan
    folder: Path

    def flags_of(self, number: int) -> list[str]:
        """The flags of its run with this number, from 0."""
        seed, folder = self.plan.recipe.seed + number, self.run_folder(number)
        return [*self.flags, f"--seed={seed}", f"--output-dir={folder}"]

    def run_folder(self, number: int) -> Path:
        return self.folder / f"seed_{self.plan.recipe.seed + number}"


def split_candidates(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The candidates at the beginning of a command line, names or flags quoted into one word, and the other words."""
    names = list(itertools.takewhile(lambda word: not word.startswith("-") or " " in word, argv))
    return names, list(argv[len(names) :])


def take_grid(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of --grid, which are quoted flags, and the other words."""
    if "--grid" not in words:
        return [], list(words)
    at = words.index("--grid") + 1
    grid = list(itertools.takewhile(lambda word: " " in word, words[at:]))
    return grid, [*words[: at - 1], *words[at + len(grid) :]]


def combinations(base: str, grid: Sequence[str]) -> list[str]:
    """`bn_cnn` and `--lr 0.1,0.2` -> `bn_cnn --lr 0.1` and `bn_cnn --lr 0.2`. Raises UsageError for another form."""
    axes = []
    for words in grid:
        flag, _, values = words.strip().rpartition(" ")
        key, equals, listed = values.rpartition("=")
        if not flag.startswith("--") or not all(listed.split(",")):
            raise UsageError(f'--grid {words!r} is no flag with values, expected for example "--lr 0.05,0.1,0.2"')
        axes.append([f"{flag} {key}{equals}{value}" for value in listed.split(",")])
    return [" ".join([base, *one]).strip() for one in itertools.product(*axes)]


def as_flags(name: str) -> list[str]:
    """`bn_cnn --lr 0.2` -> [--recipe, bn_cnn, --lr, 0.2]"""
    try:
        words = shlex.split(name)
    except ValueError as error:
        raise UsageError(f"{name} cannot be read as flags ({error}); check its quotes") from None
    return words if not words or words[0].startswith("-") else ["--recipe", *words]


def candidates_of(names: Sequence[str], flags: list[str], launch: LaunchOptions, output: Path) -> list[Candidate]:
    """The checked candidates. Raises UsageError unless they can be compared: on the same validation images."""

    def ranks(images: int | None) -> int:
        return count_ranks(launch.num_gpus, device.count_gpus(), images)

    found: list[Candidate] = []
    for name in names:
        own = [*as_flags(name), *flags, "--sealed", "--no-report"]
        plan = make_plan(own, ranks, "compare")
        folder = output / (re.sub(r"[^\w.=-]+", "_", name.replace("--", "")).strip("_")[:80] or "candidate")
        if any(folder == other.folder for other in found):
            raise UsageError(f"{name} is given twice, or differs too little from another candidate; leave out one of them")
        found.append(Candidate(name, own, plan, folder))
        make_plan(found[-1].flags_of(0), ranks, "compare")  # its folder may hold a run with other settings
    first = found[0].plan
    for candidate in found:
        recipe = candidate.plan.recipe
        if not recipe.val_images:
            raise UsageError(f"{candidate.name} holds no validation images out; for example, add --val-images 5000 for all")
        for key in ("dataset", "val_images", "split_seed"):
            if getattr(recipe, key) != getattr(first.recipe, key):
                flag = "--" + key.replace("_", "-")
                raise UsageError(f"{candidate.name} has another {flag} than {found[0].name}; add {flag} for all")
    return found


def pairings(runs: Runs, error_rate: float) -> list[Pairing]:
    """Every two candidates with the runs that both have; the error rate is shared among them (Bonferroni)."""
    two = list(itertools.combinations(runs, 2))
    return [Pairing(a, b, tuple(zip(runs[a], runs[b], strict=False)), error_rate / len(two)) for a, b in two]


def still_in(runs: Runs, error_rate: float) -> list[str]:
    """The candidates that none has beaten."""
    decided = [(pair, pair.at_the_end) for pair in pairings(runs, error_rate)]
    beaten = {pair.a if found.b_is_better else pair.b for pair, found in decided if found.decided_after}
    return [name for name in runs if name not in beaten] or list(runs)[:1]


def summary_lines(runs: Runs, pairs: Sequence[Pairing]) -> list[str]:
    """The verdicts, the differences at equal epochs and minutes, and what all of it cost."""
    lines = []
    for pair in pairs:
        (epochs, after), (minutes, within) = pair.at_equal_epochs, pair.at_equal_minutes
        lines += [pair.verdict, f"  after {after:g} epochs each: {epochs.in_points}"]
        lines += [f"  within {within:.2g} minutes of training each: {minutes.in_points}"]
    seconds = {name: sum(run.number("train_seconds") or 0 for run in of) for name, of in runs.items()}
    each = ", ".join(f"{name} {len(runs[name])} runs, {seconds[name] / 60:.1f} minutes" for name in runs)
    return [*lines, f"cost: {sum(seconds.values()) / 60:.1f} minutes of training ({each}); no test image was used"]


class Ended(Exception):
    """No more runs: the exit code, and why."""


@dataclass
class Rounds:
    """Rounds of one run per candidate, and the runs so far."""

    options: CompareOptions
    launch: LaunchOptions
    runs: Runs
    longest: float = 0.0  # round, in seconds
    began: float = field(default_factory=time.monotonic)

    def train(self, rivals: list[Candidate], number: int) -> None:
        """The run with this number of each rival. Raises Ended at a limit, or if a run fails or is stopped."""
        runs, minutes, began = self.options.max_runs, self.options.max_minutes, time.monotonic()
        if sum(map(len, self.runs.values())) + len(rivals) > runs:
            raise Ended(FINISHED, f"--max-runs {runs} is reached")
        if minutes and began - self.began + self.longest > 60 * minutes:
            raise Ended(FINISHED, f"--max-minutes {minutes:g} would be exceeded")
        turn = number % len(rivals)  # each is first in turn, so that a machine that slows down favors none
        for candidate in [*rivals[turn:], *rivals[:turn]]:
            folder, plan = candidate.run_folder(number), candidate.plan
            code = train(self.launch, plan.batch.world_size, candidate.flags_of(number), plan.options.max_steps, folder)
            if code != FINISHED:
                raise Ended(code, f"{folder} {'was stopped' if code == RESUMABLE else 'failed'}")
        for candidate in rivals:
            self.runs[candidate.name].append(open_record(candidate.run_folder(number)))
        self.longest = max(self.longest, time.monotonic() - began)

    def race(self, rivals: list[Candidate]) -> str:
        """Round after round, until one candidate has beaten all others. Raises Ended."""
        numbers = itertools.count()
        while len(rivals) > 1:
            self.train(rivals, next(numbers))
            names = still_in(self.runs, self.options.error_rate)
            rivals = [candidate for candidate in rivals if candidate.name in names]
        return rivals[0].name

    def halve(self, rivals: list[Candidate]) -> str:
        """The better half of the candidates goes on to twice as many seeds, until one is left. Raises Ended."""
        done, due = 0, 1
        while len(rivals) > 1:
            for number in range(done, due):
                self.train(rivals, number)
            done, due = due, 2 * due
            rivals = sorted(rivals, key=lambda one: -mean_accuracy(self.runs[one.name]))[: (len(rivals) + 1) // 2]
        return rivals[0].name


def mean_accuracy(runs: Sequence[Record]) -> float:
    return sum(run.number("val_accuracy") or 0 for run in runs) / max(1, len(runs))


def ranking(runs: Runs) -> list[str]:
    """A line per candidate of a search: those with the most seeds first, of these the best."""
    order = sorted(runs, key=lambda name: (-len(runs[name]), -mean_accuracy(runs[name])))
    return [
        f"{mean_and_sd([run.number('val_accuracy') for run in runs[name]])}  n = {len(runs[name])}  {name}" for name in order
    ]


def run(argv: list[str]) -> int:
    """Compare as the command line says; returns the exit code: that of a run that failed or stopped, else 0."""
    names, rest = split_candidates(argv)
    if {"--help", "-h"} & {*argv}:
        join_lines_of_help(CompareOptions)
        tyro.cli(CompareOptions, args=["--help"], prog="python -m cifar10 compare A B [C ...]")
    options: Any
    grid, rest = take_grid(rest)
    options, rest = split_options(rest, CompareOptions)
    launch, flags = split_launch_options(rest)
    check_values(
        options,
        ("max_runs", lambda n: n >= 2, "an integer >= 2"),
        ("max_minutes", is_positive, "a number above 0"),
        ("error_rate", lambda p: 0 < p < 1, "a probability between 0 and 1"),
    )
    if grid:
        if len(names) > 1:
            raise UsageError(f"--grid takes one candidate, and there are {len(names)}; leave out all but one")
        base = names[0] if names else Options.recipe
        names = combinations(base, grid)
    if len(names) < 2:
        raise UsageError('compare needs two candidates or more, for example compare bn_cnn "bn_cnn --lr 0.2"')
    if launch.seeds or launch.num_nodes > 1:
        raise UsageError("--seeds and --num-nodes are not supported by compare; leave them out")
    output = options.output_dir or Path("runs") / f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
    run_folder.refuse_unwritable(output)
    found = candidates_of(names, flags, launch, output)
    os.environ.pop("WANDB_RUN_ID", None)  # each is a W&B run of its own
    for signal_number in SIGNALS:  # between runs; a Launch has its own handlers
        signal.signal(signal_number, lambda *_: sys.exit(RESUMABLE))
    runs: Runs = {candidate.name: [] for candidate in found}
    rounds, winner = Rounds(options, launch, runs), None
    try:
        winner = rounds.halve(found) if grid else rounds.race(found)
        code, why = FINISHED, f"{winner} is the best{' of the search' if grid else ''}"
    except Ended as ended:
        code, why = ended.args
    print(f"compared on validation images: {why}")
    pairs = [] if grid else pairings(runs, options.error_rate)
    print("\n".join([*(ranking(runs) if grid else []), *summary_lines(runs, pairs)]))
    if all(runs.values()):
        print(f"report: {make_comparison(list(runs.items()), output / 'compare.html', pairs)}", flush=True)
    if grid and winner:
        unused = found[0].plan.recipe.seed + max(map(len, runs.values()))
        words = [base, winner, *flags, "--seed", str(unused)]
        print("to test it on other seeds:", shlex.join(["python", "-m", "cifar10", "compare", *words]), flush=True)
    elif not winner:
        more = "to continue:" if code != FINISHED else "to go on, with a larger limit:"
        at = ["--output-dir", str(output)] if options.output_dir is None else []
        print(more, shlex.join(["python", "-m", "cifar10", "compare", *argv, *at]), flush=True)
    return code
