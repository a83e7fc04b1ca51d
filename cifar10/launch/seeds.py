"""One recipe with several seeds, one run after another: `main.py --seeds 3` trains seeds s, s + 1, s + 2 in FOLDER/seed_s, ...

The same command goes on where it was stopped: finished seeds are not trained again. A seed that fails does not keep the others
from being trained; a stop does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cifar10 import UsageError
from cifar10.report.html import interval, make_comparison, mean_and_sd, percent
from cifar10.report.stats import spread
from cifar10.run.record import Record, open_record

PAGE = "compare.html"


def folder_of(output: Path, seed: int) -> Path:
    return output / f"seed_{seed}"


def flags_of(flags: Sequence[str], output: Path, seed: int) -> list[str]:
    """The command line of one seed's run: of a flag that is given twice the last counts."""
    return [*flags, f"--seed={seed}", f"--output-dir={folder_of(output, seed)}"]


def carry_out(seeds: Sequence[int], train: Callable[[int], int], stopped: Sequence[int]) -> int:
    """Train each seed in turn; returns the exit code: 0, or the first that was another. Codes in `stopped` end it there."""
    first = 0
    for seed in seeds:
        code = train(seed)
        if code in stopped:
            return code
        first = first or code
    return first


def results(output: Path, seeds: Sequence[int]) -> list[Record]:
    """What there is of the seeds' runs. Raises UsageError for a damaged file."""
    return [open_record(folder_of(output, seed)) for seed in seeds if (folder_of(output, seed) / "recipe.json").exists()]


def closing_lines(records: Sequence[Record]) -> list[str]:
    """A line for each seed, and one for each accuracy over the finished ones: mean, sample standard deviation, interval, n."""
    done, splits = [record for record in records if record.is_finished], ("train", "val", "test")
    lines = [f"{len(done)} of {len(records)} seeds have finished:"]
    for record in records:
        accuracies = (f"{split} accuracy {percent(record.number(f'{split}_accuracy'))}" for split in splits)
        lines.append(f"{record.folder.name}: {record.status}; {', '.join(accuracies)}")
    measured = {f"{split} accuracy": f"{split}_accuracy" for split in splits}
    for words, key in {**measured, "test accuracy with test-time augmentation": "test_accuracy_tta"}.items():
        values = [value for record in done if (value := record.number(key)) is not None]
        if values:
            found = spread(values)
            within = f", 95% interval of the mean {interval(found)}" if len(values) > 1 else ""
            lines.append(f"{words} over seeds: {mean_and_sd(values)} (n = {len(values)}{within})")
    return lines


def tell(output: Path, seeds: Sequence[int], with_page: bool) -> None:
    """Print what the seeds came to, and compare them on a page; neither can fail what has been trained."""
    try:
        records = results(output, seeds)
        for line in closing_lines(records):
            print(line)
        if records and with_page:
            print(f"report: {make_comparison([record.folder for record in records], output / PAGE)}", flush=True)
    except UsageError as error:
        print(f"no comparison: {error}", flush=True)
