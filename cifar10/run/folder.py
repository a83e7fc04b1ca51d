"""A run's folder: which one it is, whether this command may use it, and its settings.

recipe.json  ds_config.json     the settings; `--recipe <run>/recipe.json` runs them again
environment.json                versions, commit, hardware and command of each start
metrics.csv  steps.csv          metrics; tensorboard/ and wandb/ hold the same for their viewers
wandb_run.json                  the run's id at Weights & Biases
budget.json                     what main.py --budget has chosen, and what it measured before that
summary.json                    status (running, stopped, failed or finished) and results
test_predictions.npz            best_model's logits; evaluate writes those of other splits beside it
chain.jsonl                     hashes of what was set and measured; see chain.py
test_ledger.jsonl               each opening of the test split for this run; see data/ledger.py
report.html  report/            the run as a page, and its plots
checkpoints/                    see checkpoint.py; export/ is made from one
"""

import itertools
import json
import os
import platform
import shlex
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from cifar10 import UsageError
from cifar10.config.recipe import PROJECT, refuse_other_format
from cifar10.config.settings import differences, is_deep
from cifar10.files import Busy, data_folder, take_lock, written_whole

LOCK = ".lock"
_held: dict[Path, BaseFileLock] = {}  # a lock is released when its object is deleted


def unnamed(recipe: str, when: str) -> Path:
    """The folder of a run that was given none; a recipe.json lends the name of the folder it is in."""
    name = Path(recipe).parent.name if recipe.endswith(".json") else recipe
    return Path("runs") / f"{name}-{when}"


def choose(output_dir: Path | None, recipe: str) -> Path:
    """The given folder, or a new runs/<recipe>-<time>, created at once so that no other run can choose it."""
    if output_dir is not None:
        return output_dir
    stem = unnamed(recipe, time.strftime("%Y%m%d-%H%M%S"))
    for number in itertools.count(1):
        folder = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"{folder} cannot be created ({error.strerror}); choose an --output-dir") from None


def title(folder: Path) -> str:
    """A run's display name: its folder's, after the campaign's for a seed_0."""
    folder = folder.absolute()
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("seed_") else folder.name


def refuse_unwritable(folder: Path) -> None:
    """Raise UsageError unless `folder`, or its nearest existing parent, is writable."""
    try:
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists() or place.is_symlink())
    except OSError as error:
        raise UsageError(f"--output-dir {folder}: {error.strerror}; choose another folder") from None
    if not existing.is_dir():
        what = "a file" if existing.exists() else "a link to nothing"
        raise UsageError(f"--output-dir {folder}: {existing} is {what}; choose a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--output-dir {folder}: {existing} is not writable; choose another folder")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file of a run; None if there is no such file. Raises UsageError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, type(error).__name__) from None
    if not isinstance(content, dict):
        raise damaged(path, "not an object")
    if is_deep(content):
        raise damaged(path, "nested too deeply")
    return content


def damaged(path: Path, how: str) -> UsageError:
    return UsageError(f"{path} is damaged ({how}); move it away, or choose another --output-dir")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write strict JSON; readers see the old file or the new one, never a part."""
    with written_whole(path) as file:
        file.write((json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """The content of a run's recipe.json, with "settings"; None if there is none. Raises UsageError for another format."""
    content = read_json(folder / "recipe.json")
    if content is not None:
        refuse_other_format(content, folder / "recipe.json")
        if not isinstance(content.get("settings"), dict):
            raise damaged(folder / "recipe.json", "no settings")
    return content


def holds_training(folder: Path) -> bool:
    """Whether anything is left of a training in `folder`: a checkpoint, or a summary of more than 0 steps. A start that failed
    before its first step leaves its settings, and no claim on the folder."""
    saved = folder / "checkpoints"
    return (saved.is_dir() and any(saved.iterdir())) or bool((read_json(folder / "summary.json") or {}).get("steps"))


def manifest_of(folder: Path) -> str | None:
    """What identifies the images of the run in `folder`, if they are a user's own."""
    dataset = (read_recipe(folder) or {}).get("dataset") if holds_training(folder) else None
    return dataset.get("manifest") if isinstance(dataset, dict) else None


def engine_level_of(folder: Path) -> str | None:
    """The engine level of the training in `folder`, if there is one."""
    if not os.path.isdir(folder):
        return None
    starts = (read_json(folder / "environment.json") or {}).get("starts") if holds_training(folder) else None
    last = starts[-1] if isinstance(starts, list) and starts else None
    return last.get("engine_level") if isinstance(last, dict) else None


def refuse_other_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise UsageError with the differences if `folder` holds a run with other settings, {"recipe": ..., "deepspeed": ...}."""
    recipe, config = read_recipe(folder), read_json(folder / "ds_config.json")
    if recipe is None or config is None or not holds_training(folder):
        return
    if shown := differences({"recipe": recipe["settings"], "deepspeed": config}, {**settings, "data": {}}):
        raise UsageError(f"--output-dir {folder} holds a run with other settings ({shown}); choose another --output-dir")


def find_checkpoint(where: str) -> tuple[Path, str]:
    """--resume PATH -> (a run's checkpoints folder, the name of a pointer in it). Raises UsageError if there is none.

    PATH is the run's folder, or a pointer in its checkpoints/: latest, best, epoch_005, with or without .pth.
    """
    path = Path(where)
    path = path.with_suffix("") if path.suffix in (".pth", ".pt") else path
    folder, name = (path.parent.parent, path.name) if path.parent.name == "checkpoints" else (path, "latest")
    try:
        pointers = sorted(p.name for p in (folder / "checkpoints").glob("*") if p.is_file())
    except OSError as error:  # a name that is too long
        raise UsageError(f"--resume {where}: {error.strerror}; use auto, never, or a run's folder") from None
    if name in pointers:
        return folder / "checkpoints", name
    there = f"there are {', '.join(pointers)}" if pointers else "it has none"
    raise UsageError(
        f"--resume {where}: no checkpoint named {name}; {there}; use auto, never, a run's folder, or a checkpoint in it"
    )


def refuse_other_position(source: Path, settings: dict[str, Any]) -> None:
    """--resume PATH: a position counts global batches through one order of one split, so these settings must be equal."""
    saved, config = read_recipe(source) or {"settings": {}}, read_json(source / "ds_config.json") or {}
    ours = {**settings["recipe"], "train_batch_size": settings["deepspeed"]["train_batch_size"]}
    theirs = {**saved["settings"], "train_batch_size": config.get("train_batch_size")}
    for key in ("model", "dataset", "val_images", "seed", "split_seed", "train_batch_size"):
        if theirs.get(key) != ours[key]:
            raise UsageError(f"--resume {source}: {key} is {theirs.get(key)} there, {ours[key]} here; set it to the same value")


def refuse_if_never(folder: Path, resume: str) -> None:
    """--resume never: raise UsageError if the folder has anything in it but a lock, or what a start without a step leaves."""
    if resume != "never" or not folder.is_dir():
        return
    allowed = (
        () if holds_training(folder) else ("recipe.json", "ds_config.json", "environment.json", "checkpoints", "budget.json")
    )
    if any(path.name not in allowed and not path.name.startswith(LOCK) for path in folder.iterdir()):
        raise UsageError(f"--resume never, but --output-dir {folder} is not empty; choose another folder, or use --resume auto")


def _commit() -> str | None:
    """This program's commit, with -dirty if files were changed; None outside a git checkout."""
    git = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    here["GIT_CEILING_DIRECTORIES"] = str(PROJECT.parent)  # a copy within another repository is not of its commit
    try:
        return subprocess.run(git, env=here, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def data_dir_of(folder: Path | None, given: Path | None) -> Path:
    """--data-dir; else where the run in `folder` had its data, if that is still there; else $CIFAR10_DIR or data/."""
    starts = (read_json(folder / "environment.json") or {}).get("starts") if folder and not given else None
    dirs = [start.get("data_dir") for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    had = next((Path(place) for place in reversed(dirs) if isinstance(place, str) and os.path.exists(place)), None)
    return given or had or data_folder()


def environment(argv: list[str], facts: dict[str, Any]) -> dict[str, Any]:
    """The entry of environment.json for one start: time, command, versions, hardware."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(argv),
        "commit": _commit(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "torchvision", "deepspeed", "numpy")},
        "processor": _processor(),
        **facts,
    }


def _hold(folder: Path) -> None:
    """Lock `folder` against other processes for as long as this one lives."""
    if folder.resolve() in _held:
        return
    try:
        _held[folder.resolve()] = take_lock(folder / LOCK)
    except Busy as busy:
        wait = "wait for it, or choose another --output-dir"
        raise UsageError(f"another process is training in {folder}; {wait} ({busy})") from None


def let_go() -> None:
    """Unlock the folders that this process has trained in."""
    for lock in _held.values():
        lock.release(force=True)
    _held.clear()


def open_run(folder: Path, recipe_json: str, ds_config: dict[str, Any], resume: str, argv: list[str], **facts: Any) -> None:
    """Create the folder, write its settings unless a training there has some, and add this start to environment.json."""
    refuse_if_never(folder, resume)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        _hold(folder)
        if not (folder / "recipe.json").exists() or not holds_training(folder):
            write_json(folder / "ds_config.json", ds_config)
            write_json(folder / "recipe.json", json.loads(recipe_json))
        starts = (read_json(folder / "environment.json") or {}).get("starts", [])
        if not isinstance(starts, list):
            raise damaged(folder / "environment.json", "no list of starts")
        write_json(folder / "environment.json", {"starts": [*starts, environment(argv, facts)]})
    except OSError as error:
        raise UsageError(f"--output-dir {folder} is not writable ({error.strerror}); choose another folder") from None


def command_to_continue(start: str, argv: list[str], folder: Path) -> str:
    """The command line that resumes the run in `folder`; `start` is the start command without flags."""
    start = os.environ.get("CIFAR10_STARTED_BY", start)  # set by main.py
    if "UV_RUN_RECURSION_DEPTH" in os.environ and not start.startswith(("uv run", "sbatch")):  # a job finds its Python itself
        start = f"uv run {start}"
    words, rest = [], iter(argv)
    for word in rest:
        flag, equals, _ = word.replace("_", "-").partition("=")
        pair = [word] if equals or flag not in ("--output-dir", "--resume", "--stop-at") else [word, *itertools.islice(rest, 1)]
        never = flag == "--resume" and pair[-1].removeprefix("--resume=") == "never"  # the folder is no longer empty
        if flag not in ("--output-dir", "--stop-at") and not never:
            words += pair
    return f"{start} {shlex.join([*words, '--output-dir', str(folder)])}"
