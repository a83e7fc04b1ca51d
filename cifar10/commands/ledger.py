"""`python -m cifar10 ledger`: every opening of a test split that is known, by data set and recipe, as the n-th look."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from cifar10 import UsageError
from cifar10.commands.common import DataDir
from cifar10.data import ledger
from cifar10.data.ledger import Entry
from cifar10.files import data_folder
from cifar10.run.folder import read_json, read_recipe


def from_summary(run: Path) -> Entry | None:
    """The final test of a run without a ledger, made before there was one, as its summary.json tells it."""
    summary, settings = read_json(run / "summary.json") or {}, read_recipe(run) or {}
    if not summary.get("test_images") or (run / ledger.FILE).exists():
        return None
    starts = (read_json(run / "environment.json") or {}).get("starts") or [{}]
    dataset = settings.get("dataset")
    return {
        "id": f"summary of {run.resolve()}",
        "time": str(starts[-1].get("time", "?")),
        "dataset": settings.get("settings", {}).get("dataset"),
        "manifest": dataset.get("manifest") if isinstance(dataset, dict) else None,
        "images": summary["test_images"],
        "recipes": {ledger.recipe_of(run): None},
        "runs": [str(run.resolve())],
        "command": "its final test, from summary.json",
        "learned": {"accuracy": summary.get("test_accuracy"), "accuracy_with_tta": summary.get("test_accuracy_tta")},
    }


def openings(folders: Sequence[Path], data_dir: Path) -> list[Entry]:
    """What the user's ledgers know, and the runs at or below `folders`, in order of time."""
    known = ledger.read([*ledger.places(data_dir), *(file for folder in folders for file in folder.rglob(ledger.FILE))])
    runs = (path.parent for folder in folders for path in sorted(folder.rglob("recipe.json")))
    return sorted([*known, *filter(None, map(from_summary, runs))], key=lambda entry: entry["time"])


def _learned(entry: Entry) -> str:
    found: Any = entry.get("learned")
    if not isinstance(found, dict):
        return "–"
    names = (name.replace("_", " ") for name in found)
    return ", ".join(f"{name} {v:.2%}" for name, v in zip(names, found.values(), strict=True) if isinstance(v, (int, float)))


def show(entries: Sequence[Entry], console: Console) -> None:
    groups = dict.fromkeys((e.get("dataset"), e.get("manifest"), recipe) for e in entries for recipe in e["recipes"])
    for dataset, manifest, recipe in groups:
        looks = ledger.of_recipe(entries, recipe, dataset, manifest)
        runs = {run for entry in looks for run in entry.get("runs", ())}
        many = [f"{len(them):,} {name}{'s' * (len(them) != 1)}" for them, name in ((looks, "look"), (runs, "run"))]
        console.print(f"{dataset}, test split, recipe {recipe}: {many[0]}, of {many[1]}")
        for number, entry in enumerate(looks, 1):
            names = ", ".join("/".join(Path(run).parts[-2:]) for run in entry.get("runs", ()))
            words = (
                entry["time"],
                f"{entry.get('images', '?'):>6} images",
                f"{_learned(entry):15}",
                names,
                entry.get("command", "?"),
            )
            console.print(f"{number:4}  {'  '.join(map(str, words))}")
    if lone := [entry for entry in entries if not entry["recipes"]]:
        console.print(f"{len(lone):,} looks by no run of a recipe: {', '.join(str(entry.get('command')) for entry in lone)}")
    if not entries:
        console.print("no opening of a test split is recorded")


def run(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[FOLDER ...]", help_behavior_hint="")] = (),
    data_dir: DataDir = None,
    json_: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Every opening of a test split: when, by which run and command, how many images, and what was learned.

    The ledger is beside the data, or in ~/.local/state/cifar10-deepspeed where nothing can be written there; $CIFAR10_LEDGER
    names another file.

    Args:
        runs: Also read the ledgers in these folders of runs, at any depth; the final tests of runs without one count too.
        json_: Print JSON, and nothing else.
    """
    for folder in runs:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder, expected one that holds runs, for example runs")
    found = openings(runs, data_dir or data_folder())
    if json_:
        print(json.dumps(found, indent=2))
    else:
        show(found, Console(highlight=False, soft_wrap=True, markup=False))
