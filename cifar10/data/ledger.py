"""The ledger of the test set: who has opened a test split, when, and what was learned, as lines of JSON.

An opening is a line in the folder of each run that it is about and in the user's ledger: beside the data, or in the user's
state folder where nothing can be written there. What was learned is a second line with the same id. A line is appended with
one write, so that runs at the same time do not mix theirs. A ledger that cannot be written is a warning, and ends no run.
"""

import json
import os
import shlex
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar10 import UsageError

FILE = "test_ledger.jsonl"
Entry = dict[str, Any]
_shown: set[tuple[Path, ...]] = set()  # runs for which this process has opened a test split


def places(data_dir: Path) -> list[Path]:
    """The user's ledgers: $CIFAR10_LEDGER, or the one beside the data and the one in the state folder."""
    if given := os.environ.get("CIFAR10_LEDGER"):
        return [Path(given).expanduser()]
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    return [data_dir / FILE, state / "cifar10-deepspeed" / FILE]


def read(files: Iterable[Path]) -> list[Entry]:
    """The openings in these files in order of time, each once, with what was learned. Lines that are no JSON are left out."""
    found: dict[str, Entry] = {}
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            try:
                entry = json.loads(line)
                found[entry["id"]] = {**found.get(entry["id"], {}), **entry}
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
    whole = [e for e in found.values() if isinstance(e.get("time"), str) and isinstance(e.get("recipes"), dict)]
    return sorted(whole, key=lambda entry: entry["time"])


def of_recipe(entries: Iterable[Entry], recipe: str, dataset: str, manifest: str | None) -> list[Entry]:
    """The openings of one data set's test split by runs of a recipe."""
    same = (dataset, manifest)
    return [entry for entry in entries if recipe in entry["recipes"] and (entry.get("dataset"), entry.get("manifest")) == same]


def recipe_of(run: Path) -> str:
    """The name of the recipe that a run began with, followed through the recipe.json files of earlier runs."""
    file = run / "recipe.json"
    for _ in range(10):
        try:
            name = str(json.loads(file.read_text(encoding="utf-8"))["recipe"])
        except (OSError, ValueError, TypeError, KeyError):
            break
        if not name.endswith(".json"):
            return name
        file = Path(name)
    return file.absolute().parent.name


def _append(file: Path, line: str, *, create_folder: bool) -> str | None:
    """Add a line with one write; returns why that was not possible."""
    try:
        if create_folder:
            file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"{file}: {error.strerror}"
    return None


def _this_command() -> str:
    program, *words = sys.argv
    start = ["-m", "cifar10"] if Path(program).name == "__main__.py" else [Path(program).name]
    return shlex.join(["python", *start, *(word for word in words if not word.startswith("--local_rank"))])


@dataclass(frozen=True)
class Look:
    """One opening of a test split, by a command, for some runs."""

    runs: Sequence[Path] = ()
    images: int | None = None  # that are used; None is all
    sealed: bool = False
    recorded: bool = True  # one rank of several writes
    shows_only: bool = False  # images of a run that this process may have opened before, which is no second look
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    _data_dirs: list[Path] = field(default_factory=list)  # of the opening that was recorded

    def refuse_if_sealed(self) -> None:
        """Raise UsageError under --sealed or $CIFAR10_SEALED."""
        if self.sealed or os.environ.get("CIFAR10_SEALED", "0") not in ("", "0"):
            raise UsageError("the test split is sealed (--sealed or CIFAR10_SEALED); use --split val, or lift the seal")

    def opens(self, data_dir: Path, dataset: str, manifest: str | None, images: int) -> None:
        """Record that `dataset`'s test split of so many images is opened. Raises UsageError if it is sealed."""
        self.refuse_if_sealed()
        about = tuple(run.resolve() for run in self.runs)
        if not self.recorded or (self.shows_only and about in _shown):
            return
        _shown.add(about)
        self._data_dirs.append(data_dir)
        before = read(places(data_dir))
        recipes = dict.fromkeys(map(recipe_of, self.runs))
        entry = {
            "id": self.id,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "dataset": dataset,
            "manifest": manifest,
            "images": min(self.images or images, images),
            "recipes": {name: len(of_recipe(before, name, dataset, manifest)) + 1 for name in recipes},  # its n-th look
            "runs": [str(run) for run in about],
            "command": _this_command(),
        }
        self._write(entry)

    def learned(self, **what: float | None) -> None:
        """Record what was learned from the images, as numbers by name; nothing if no opening was recorded."""
        if self._data_dirs:
            self._write({"id": self.id, "learned": {name: value for name, value in what.items() if value is not None}})

    def _write(self, entry: Entry) -> None:
        line = json.dumps(entry) + "\n"
        faults = [fault for run in self.runs if (fault := _append(run / FILE, line, create_folder=False))]
        data_dir, tried = self._data_dirs[0], []
        for place in places(data_dir):
            fault = _append(place, line, create_folder=place.parent != data_dir)
            if not fault:
                break
            tried.append(fault)
        else:
            faults += tried
        if faults:
            print(f"warning: the ledger of the test set cannot be written: {'; '.join(faults)}", file=sys.stderr)
