"""A run's folder, read back: what it was told, how it stands, what it measured. Files are checked, and never executed."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cifar10 import UsageError, reason
from cifar10.config.recipe import RECIPE_DEFAULTS, refuse_other_format
from cifar10.config.settings import FREE, flattened
from cifar10.data.dataset import Description, description_from
from cifar10.run.folder import read_json, title
from cifar10.run.predictions import TEST_FILE, Predictions, read

Row = dict[str, float]


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it; whatever a run that is still young has not written yet is empty or None."""

    folder: Path
    recipe: str  # the name it was started by
    settings: dict[str, Any]  # the recipe's fields
    dataset: Description  # as it was when the run began
    ds_config: dict[str, Any]
    summary: dict[str, Any]
    starts: list[dict[str, Any]]  # of environment.json
    epochs: dict[str, list[Row]]  # metrics.csv: split -> rows of epoch, loss, accuracy, throughput
    steps: list[Row]  # steps.csv

    @cached_property
    def predictions(self) -> Predictions | None:
        """What best_model answered on the test images. Raises UsageError for a damaged file."""
        found = read(self.folder / TEST_FILE)
        count = len(self.dataset.classes)
        if found is not None and (found.logits.shape[1] != count or found.labels.min() < 0 or found.labels.max() >= count):
            raise UsageError(f"{self.folder / TEST_FILE} is damaged (not of {count} classes)")
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
        """A number of the summary; None if it has none. Raises UsageError for something else in its place."""
        value = self.summary.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UsageError(f"{self.folder / 'summary.json'} is damaged ({key} is no number)")
        return float(value)

    @property
    def steps_per_epoch(self) -> float | None:
        steps, epochs = self.number("steps"), self.number("epochs")
        return steps / epochs if steps and epochs else None

    @property
    def experiment(self) -> dict[str, Any]:
        """All that two runs must have in common to be the same but for the seed; --max-steps shortens one, so it counts."""
        defaults = json.loads(json.dumps(RECIPE_DEFAULTS))  # which an older run's recipe.json may not know
        chosen = {key: value for key, value in (defaults | self.settings).items() if key != "seed"}
        config = {key: value for key, value in flattened(self.ds_config).items() if not f"deepspeed.{key}".startswith(FREE)}
        told = {"recipe": self.recipe, "ranks": self.summary.get("world_size"), **chosen, **config}
        if self.summary.get("ended_by") == "max_steps":
            told["max_steps"] = self.summary.get("steps")
        if (tested := self.number("test_images")) and tested != self.dataset.test_images:
            told["test_images"] = tested
        return {key: int(value) if isinstance(value, float) and value.is_integer() else value for key, value in told.items()}


def _numbers(path: Path, wanted: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file of ours: none if there is no file. A last row that is being written is left out."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), reader.fieldnames or []
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__})") from None
    if rows and (None in rows[-1] or None in rows[-1].values()):
        rows.pop()
    if header and not set(wanted) <= set(header):
        raise UsageError(f"{path} is damaged (its columns are not {', '.join(wanted)})")
    return rows


def _row(path: Path, number: int, row: dict[str, str], columns: Iterable[str]) -> Row:
    try:
        return {column: float(row[column]) for column in columns}
    except (TypeError, ValueError):
        raise UsageError(f"{path} is damaged (row {number} has something else than numbers)") from None


def _epochs(path: Path) -> dict[str, list[Row]]:
    columns, splits = ("epoch", "loss", "accuracy", "throughput"), defaultdict(list)
    for number, row in enumerate(_numbers(path, (*columns, "phase")), 2):
        splits[row["phase"]].append(_row(path, number, row, columns))
    return dict(splits)


def _steps(path: Path) -> list[Row]:
    columns = ("step", "grad_norm", "lr", "skipped")
    return [_row(path, number, row, columns) for number, row in enumerate(_numbers(path, columns), 2)]


def open_record(folder: Path) -> Record:
    """Raises UsageError, in one line, if this is no run's folder or one of its files is damaged."""
    recipe, summary = read_json(folder / "recipe.json"), read_json(folder / "summary.json")
    if recipe is None:
        raise UsageError(f"{folder} is not a run's folder: it has no recipe.json; type the folder that a run was written to")
    refuse_other_format(recipe, folder / "recipe.json")
    settings, starts = recipe.get("settings"), (read_json(folder / "environment.json") or {}).get("starts", [])
    if not isinstance(settings, dict):
        raise UsageError(f"{folder / 'recipe.json'} is damaged (no settings)")
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise UsageError(f"{folder / 'environment.json'} is damaged (no list of starts)")
    config = read_json(folder / "ds_config.json") or {}
    epochs, steps = _epochs(folder / "metrics.csv"), _steps(folder / "steps.csv")
    try:
        dataset = description_from(recipe["dataset"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{folder / 'recipe.json'} is damaged (dataset: {reason(error)})") from None
    record = Record(folder, str(recipe.get("recipe", "?")), settings, dataset, config, summary or {}, starts, epochs, steps)
    accuracies = ("train_accuracy", "val_accuracy", "test_accuracy", "test_accuracy_tta")
    for key in (*accuracies, "steps", "epochs", "train_seconds", "seed", "test_images"):
        record.number(key)
    return record


def by_experiment(records: Iterable[Record]) -> list[list[Record]]:
    """The runs that differ in nothing but their seed, together."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[repr(sorted(record.experiment.items(), key=lambda pair: pair[0]))].append(record)
    return list(groups.values())


def differing(groups: list[list[Record]]) -> list[str]:
    """The settings that are not the same in all groups."""
    experiments = [group[0].experiment for group in groups]
    keys = dict.fromkeys(key for experiment in experiments for key in experiment)
    return [key for key in keys if len({repr(experiment.get(key)) for experiment in experiments}) > 1]
