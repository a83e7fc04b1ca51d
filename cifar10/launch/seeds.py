"""main.py --seeds N: one recipe with several seeds, one run after another, in seed_0, seed_1, ... of its output folder.

The same command continues a stopped sweep and skips finished seeds. A seed that fails does not end the sweep; a stop does.
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cifar10 import UsageError
from cifar10.launch.command import LaunchOptions, start_command
from cifar10.launch.supervise import FINISHED, RESUMABLE, SIGNALS, train
from cifar10.plan import Plan, make_plan
from cifar10.report.html import interval, labeled_groups, make_comparison, mean_and_sd, percent
from cifar10.report.stats import spread
from cifar10.run import folder as run_folder
from cifar10.run.record import Record, open_record


def train_seeds(options: LaunchOptions, ranks: int, flags: list[str], plan: Plan, output: Path) -> int:
    """Train all seeds and summarize them; returns 0, or the exit code of the first that failed or stopped."""
    first, number_of_seeds = plan.recipe.seed, options.seeds or 1
    folders = {seed: output / f"seed_{seed}" for seed in range(first, first + number_of_seeds)}
    flags_of = {seed: [*flags, f"--seed={seed}", f"--output-dir={folder}"] for seed, folder in folders.items()}
    for words in flags_of.values():  # raises UsageError before any run starts
        make_plan(words, ranks, "main.py")
    if number_of_seeds > 1:  # each is a W&B run of its own, but a W&B sweep's agent sets a single id
        os.environ.pop("WANDB_RUN_ID", None)
    for number in SIGNALS:  # between runs; a Launch has its own handlers
        signal.signal(number, lambda *_: sys.exit(RESUMABLE))
    code = FINISHED
    for seed, folder in folders.items():
        of_seed = train(replace(options, seeds=None), ranks, flags_of[seed], plan.options.max_steps, folder)
        if of_seed == RESUMABLE:
            code = of_seed
            break
        code = code or of_seed
    print_summary(output, list(folders.values()), with_page=plan.options.report)
    if code != FINISHED:
        print("to continue all seeds:", run_folder.command_to_continue(start_command(options), flags, output), flush=True)
    return code


def summary_lines(records: Sequence[Record]) -> list[str]:
    """A line per seed, and one per accuracy over the finished seeds: mean, sample standard deviation, interval, n."""
    done = [record for record in records if record.is_finished]
    lines = [f"{len(done)} of {len(records)} seeds finished:"]
    measured = {f"{split} accuracy": f"{split}_accuracy" for split in ("train", "val", "test")}
    for record in records:
        accuracies = (f"{name} {percent(record.number(key))}" for name, key in measured.items())
        lines.append(f"{record.folder.name}: {record.status}; {', '.join(accuracies)}")
    for name, key in {**measured, "test accuracy with test-time augmentation": "test_accuracy_tta"}.items():
        values = [value for record in done if (value := record.number(key)) is not None]
        if values:
            within = f", 95% interval of the mean {interval(spread(values))}" if len(values) > 1 else ""
            lines.append(f"{name} over seeds: {mean_and_sd(values)} (n = {len(values)}{within})")
    return lines


def print_summary(output: Path, folders: Sequence[Path], with_page: bool) -> None:
    """Print the seeds' results and render compare.html. A corrupt run is reported, and is no failure."""
    folders = [folder for folder in folders if (folder / "recipe.json").exists()]
    try:
        for line in summary_lines([open_record(folder) for folder in folders]):
            print(line)
        if folders and with_page:
            print(f"report: {make_comparison(labeled_groups(folders), output / 'compare.html')}", flush=True)
    except UsageError as error:
        print(f"no comparison: {error}", flush=True)
