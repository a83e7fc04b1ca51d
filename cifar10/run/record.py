"""A run read back from its folder: settings, status and metrics. Files are checked, and never executed."""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cifar10 import UsageError, reason
from cifar10.config.schedule import modern
from cifar10.config.settings import FREE, flattened
from cifar10.data.dataset import Description, description_from
from cifar10.run.folder import damaged, read_json, read_recipe, title
from cifar10.run.predictions import TEST_FILE, Predictions, read

Row = dict[str, float]


@dataclass(frozen=True)
class Record:
    """The files of a run; what a run has not written yet is empty or None."""

    folder: Path
    recipe: str  # the name it was started with
    settings: dict[str, Any]  # the recipe's fields
    dataset: Description  # as it was when the run began
    ds_config: dict[str, Any]
    summary: dict[str, Any]
    starts: list[dict[str, Any]]  # of environment.json
    epochs: dict[str, list[Row]]  # metrics.csv: split -> rows of epoch, loss, accuracy, throughput
    steps: list[Row]  # steps.csv

    @cached_property
    def predictions(self) -> Predictions | None:
        """best_model's outputs on the test images. Raises UsageError for a damaged file."""
        found = read(self.folder / TEST_FILE)
        count = len(self.dataset.classes)
        if found is not None and (found.logits.shape[1] != count or found.labels.min() < 0 or found.labels.max() >= count):
            raise damaged(self.folder / TEST_FILE, f"not of {count} classes")
        return found

    @property
    def name(self) -> str:
        return title(self.folder)

    @property
    def status(self) -> str:
        return str(self.summary.get("status", "not started"))

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    def number(self, key: str) -> float | None:
        """A number of the summary; None if it has none. Raises UsageError for anything else."""
        value = self.summary.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise damaged(self.folder / "summary.json", f"{key} is not a number")
        return float(value)

    @property
    def steps_per_epoch(self) -> float | None:
        steps, epochs = self.number("steps"), self.number("epochs")
        return steps / epochs if steps and epochs else None

    @property
    def experiment(self) -> dict[str, Any]:
        """All that two runs have in common if they differ in their seed alone; --max-steps shortens a run, so it counts."""
        chosen = {key: value for key, value in self.settings.items() if key != "seed"}
        config = {key: value for key, value in flattened(self.ds_config).items() if not f"deepspeed.{key}".startswith(FREE)}
        found = {"recipe": self.recipe, "ranks": self.summary.get("world_size"), **chosen, **config}
        if self.summary.get("ended_by") == "max_steps":
            found["max_steps"] = self.summary.get("steps")
        if (tested := self.number("test_images")) and tested != self.dataset.test_images:
            found["test_images"] = tested
        return {key: int(value) if isinstance(value, float) and value.is_integer() else value for key, value in found.items()}


def _rows(path: Path, columns: Iterable[str], split_column: str | None = None) -> dict[str, list[Row]]:
    """The rows of a CSV file by split ("" without a column of splits). A last row that is still being written is left out."""
    splits: dict[str, list[Row]] = defaultdict(list)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), reader.fieldnames or []
    except FileNotFoundError:
        return splits
    except (OSError, ValueError, csv.Error) as error:
        raise damaged(path, type(error).__name__) from None
    wanted = {*columns, *([split_column] if split_column else [])}
    if header and not wanted <= set(header):
        raise damaged(path, f"expected columns {', '.join(sorted(wanted))}")
    if rows and (None in rows[-1] or None in rows[-1].values()):
        rows.pop()
    for number, row in enumerate(rows, 2):
        try:
            splits[row[split_column] if split_column else ""].append({column: float(row[column]) for column in columns})
        except (TypeError, ValueError):
            raise damaged(path, f"row {number} has values that are not numbers") from None
    return splits


def open_record(folder: Path) -> Record:
    """Raises UsageError, in one line, if this is not a run's folder or one of its files is damaged."""
    recipe, summary = read_recipe(folder), read_json(folder / "summary.json")
    if recipe is None:
        raise UsageError(f"{folder} is not a run's folder: it has no recipe.json; choose a run's --output-dir")
    starts = (read_json(folder / "environment.json") or {}).get("starts", [])
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise damaged(folder / "environment.json", "no list of starts")
    try:
        dataset = description_from(recipe["dataset"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(folder / "recipe.json", f"dataset: {reason(error)}") from None
    record = Record(
        folder,
        recipe=str(recipe.get("recipe", "?")),
        settings=modern(recipe["settings"]),
        dataset=dataset,
        ds_config=read_json(folder / "ds_config.json") or {},
        summary=summary or {},
        starts=starts,
        epochs=dict(_rows(folder / "metrics.csv", ("epoch", "loss", "accuracy", "throughput"), "phase")),
        steps=_rows(folder / "steps.csv", ("step", "grad_norm", "lr", "skipped"))[""],
    )
    accuracies = ("train_accuracy", "val_accuracy", "test_accuracy", "test_accuracy_tta")
    for key in (*accuracies, "steps", "epochs", "train_seconds", "seed", "test_images"):
        record.number(key)
    return record


def by_experiment(records: Iterable[Record]) -> list[list[Record]]:
    """Groups of runs that differ in nothing but their seed."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[repr(sorted(record.experiment.items(), key=lambda pair: pair[0]))].append(record)
    return list(groups.values())


def differing(groups: list[list[Record]]) -> list[str]:
    """The names of the settings that differ between groups; one that an older version lacks is as if it were off."""
    experiments = [group[0].experiment for group in groups]
    keys = dict.fromkeys(key for experiment in experiments for key in experiment)
    return [key for key in keys if len({repr(experiment.get(key) or None) for experiment in experiments}) > 1]
