"""`python -m cifar10 verify RUN`: whether a run's files are what it measured, and what its settings lead to.

First the files are held against the run's chain (run/chain.py) and against each other; then segments, from the end of one
epoch to the end of the next, are trained again: from a kept checkpoint, else from the seed. The test split stays closed
without --test. A run made before there were chains has only its logs to be held against each other.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from cifar10 import UsageError
from cifar10.commands.common import DataDir
from cifar10.commands.evaluate import answers, first_images, split_images
from cifar10.commands.verify_again import check_again
from cifar10.commands.verify_files import ROUNDING, chained, check_files
from cifar10.data.ledger import Look
from cifar10.run import chain, trained
from cifar10.run.evaluation import Augmented
from cifar10.run.record import Record, open_record

SHOWN = 20  # findings


def check_test(record: Record, data_dir: Path | None, same: bool) -> Iterator[str]:
    """Measure the test accuracy once more: a look at the test split, in the ledger."""
    found, count = trained.load(record.folder), record.summary.get("test_images")
    look = Look([record.folder], count)
    images = first_images(split_images(found, "test", data_dir, look), count, "--test")
    world = trained.alone(record.starts[-1].get("threads") if record.starts else None)
    result, _ = answers(found.model.to(world.device), images, found, world)
    measured = {"test_accuracy": result.accuracy}
    if record.summary.get("test_accuracy_tta") is not None:
        model = Augmented(found.model, found.recipe.tta, found.recipe.tta_below)
        measured["test_accuracy_tta"] = answers(model, images, found, world)[0].accuracy
    look.learned(accuracy=result.accuracy)
    for row in record.epochs.get("test", [])[-1:]:
        if abs(row["loss"] - result.loss) > (2 * ROUNDING if same else 0.002):
            yield f"metrics.csv row of the test: loss is {row['loss']}, measured again it is {result.loss:.6f}"
    for key, value in measured.items():
        if abs(value - record.summary.get(key, math.nan)) > (1e-9 if same else 0.002):
            yield f"summary.json: {key} is {record.summary.get(key)}, measured again it is {value}"


def verify(folder: Path, segments: str, test: bool, data_dir: Path | None) -> tuple[list[str], list[str], bool]:
    """Findings, what was checked, and whether there is a chain. Raises UsageError if it cannot be checked."""
    record, links = open_record(folder), chain.read(folder)
    if not (folder / chain.FILE).exists() and not any(chained(tag) for tag in (folder / "checkpoints").glob("step_*")):
        logs = ", ".join(name for name in ("metrics.csv", "test_predictions.npz") if (folder / name).exists())
        told = f"made without a chain: summary.json was held against {logs or 'no logs'} and its settings"
        return check_files(record, None, data_dir)[0], [told], False
    found, looked, intact = check_files(record, links, data_dir)
    told, same = [looked], True
    if found or segments == "0":
        told.append("nothing was trained again")
    else:
        found, more, same = check_again(record, links, intact, segments, data_dir)
        told += more
    if test:
        found += check_test(record, data_dir, same)
        told.append("the test accuracy was measured again")
    elif record.summary.get("test_accuracy") is not None:
        told.append("the test split was not opened; --test measures the test accuracy again")
    return [*{line.partition(" is ")[0]: line for line in reversed(found)}.values()][::-1], told, True  # each place once


def run(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")],
    segments: str = "1",
    test: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    data_dir: DataDir = None,
) -> int:
    """Whether a run's files are what it measured, and what its settings lead to when trained again.

    Exit code: 0 if all agrees, 1 if something does not, 2 if that cannot be checked.

    Args:
        runs: Folders of runs, or of records.
        segments: How many epochs to train again, chosen at random: a number, 0 for none, or all.
        test: Measure the test accuracy again, which the ledger counts as a look at the test split.
    """
    if segments != "all" and not segments.isdecimal():
        raise UsageError(f"invalid value for --segments: {segments}, expected a number or all, for example --segments 1")
    code = 0
    for folder in runs:
        found, told, has_chain = verify(folder, segments, test, data_dir)
        for line in found[:SHOWN]:
            print(f"{folder}: {line}")
        if len(found) > SHOWN:
            print(f"{folder}: and {len(found) - SHOWN:,} more findings")
        for line in told:
            print(f"{folder}: {line}")
        good = "passes" if has_chain else "its logs agree with each other; no more can be shown"
        bad = f"does not pass, {len(found):,} finding{'s' * (len(found) > 1)}"
        print(f"{folder}: {bad if found else good}", flush=True)
        code = 1 if found else code
    return code
