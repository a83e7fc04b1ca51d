"""Checkpoints of a run: numbered tags with pointers for resuming, and portable weights that any program can read.

checkpoints/step_00001406/    state.pt: everything that a resume needs; manifest.json: its size and sha256
checkpoints/latest            the name of the newest tag: what a resume reads first
checkpoints/best  epoch_005   names of other tags that are kept: that of best_model, and those of --save-frequency
checkpoints/best_model/       mp_rank_00_model_states.pt: fp32 weights under "module", format, normalization, classes, recipe
checkpoints/final/            the same, of the last state

A process may be killed at any moment: a tag is written with its manifest under a temporary name, synced and renamed, and only
then are pointers replaced. A tag lists its pointers, so that a resume can complete them. All files hold plain tensors and
values: reading one executes nothing. The manifest detects damage; it does not prove where a file comes from.
"""

import errno
import itertools
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar10 import UsageError, reason
from cifar10.config.recipe import FORMAT, refuse_other_format
from cifar10.config.settings import differences
from cifar10.distributed.world import World
from cifar10.engine.engine import Engine
from cifar10.files import file_digest, sync_folder, written_whole
from cifar10.models.weights import first_difference, read_weights
from cifar10.run.state import RunState

PORTABLE_FILE, STATE_FILE, MANIFEST_FILE = "mp_rank_00_model_states.pt", "state.pt", "manifest.json"
POINTERS = r"best|epoch_\d{3,9}"  # beside `latest`
REMEDY = "restore it, or choose another --output-dir"


# --- saving -----------------------------------------------------------------------------------------------------------


def _point(folder: Path, names: Sequence[str], tag: str) -> None:
    for name in names:
        with written_whole(folder / name) as pointer:
            pointer.write(tag.encode())


def _pointers(folder: Path) -> dict[str, str]:
    """Name -> tag of every pointer in `folder`; a damaged one may hold anything."""
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return {path.name: path.read_bytes()[:100].decode(errors="replace").strip() for path in files}


def _tags(folder: Path) -> list[str]:
    """All tags, newest first."""
    return sorted((path.name for path in folder.glob("step_*") if path.is_dir()), reverse=True)


def _prune(folder: Path, keep: int) -> None:
    """Remove all tags but the newest `keep` and those that a pointer names."""
    named = set(_pointers(folder).values())
    for tag in _tags(folder)[keep:]:
        if tag not in named:
            shutil.rmtree(folder / tag, ignore_errors=True)


def _why_not(error: OSError | RuntimeError) -> str:
    """Why a file could not be written: an OSError, or torch.save's RuntimeError about one, which hides it."""
    error = error.__context__ if isinstance(error.__context__, OSError) else error
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    return f"{said}{'; make room on the disk' if full else ''}"


def names_for(state: RunState, save_frequency: int) -> list[str]:
    """The pointers that a checkpoint of this state gets, beside `latest`."""
    epoch = [f"epoch_{state.epoch:03d}"] if state.ends_epoch_of(save_frequency) else []
    return [*(["best"] if state.step == state.best_step else []), *epoch]


def _commit(folder: Path, content: dict[str, Any], keep: int, pointers: Sequence[str]) -> str:
    """Write, rename, point, prune. Returns "" or why it could not be saved; earlier checkpoints are untouched."""
    step, draft = content["run_state"]["step"], folder / ".draft"
    names = (f"step_{step:08d}" + (f"_{number}" if number > 1 else "") for number in itertools.count(1))
    try:
        tag = next(name for name in names if not (folder / name).exists())  # the end of an epoch may be saved twice
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        with written_whole(draft / STATE_FILE) as file:
            torch.save(content, file)
        facts = {"bytes": (draft / STATE_FILE).stat().st_size, "sha256": file_digest(draft / STATE_FILE, "sha256")}
        with written_whole(draft / MANIFEST_FILE) as file:
            file.write(json.dumps({STATE_FILE: facts}).encode())
        os.rename(draft, folder / tag)
        sync_folder(folder)
        _point(folder, ("latest", *pointers), tag)
        _prune(folder, keep)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        return f"not saved at step {step}: {_why_not(error)}; earlier checkpoints are kept"
    return ""


def save(
    folder: Path,
    engine: Engine,
    state: RunState,
    world: World,
    settings: dict[str, Any],
    *,
    keep: int,
    pointers: Sequence[str] = (),
    full_state: dict[str, Any] | None = None,
) -> str:
    """Save all that a resume needs, and the experiment's settings; rank 0 writes. Returns "" or why it failed. Collective.

    `full_state` is the engine's, if the caller has gathered it.
    """
    content = {"format": FORMAT, "run_state": state.as_dict(), "settings": settings}
    content |= {"engine": full_state or engine.full_state(), "pointers": list(pointers)}
    return world.from_main(lambda: _commit(folder, content, keep, pointers))


# --- resuming ---------------------------------------------------------------------------------------------------------


def fault_of(tag: Path) -> str:
    """What is wrong with a tag's files according to its manifest; "" if nothing is."""
    try:
        manifest = json.loads((tag / MANIFEST_FILE).read_text(encoding="utf-8"))
        for name, facts in manifest.items():
            file = tag / Path(name).name
            if not file.is_file():  # reading a device or a pipe might never end
                return f"{name} is not a file" if file.exists() else f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} of {facts['bytes']} bytes"
            if file_digest(file, "sha256") != facts["sha256"]:
                return f"{name} has another sha256 than its manifest"
        return "" if STATE_FILE in manifest else f"{MANIFEST_FILE} does not list {STATE_FILE}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{MANIFEST_FILE} cannot be read ({type(error).__name__})"


def find(folder: Path, pointer: str = "latest") -> tuple[str | None, list[str]]:
    """The tag to resume from, or None if there are no tags; and a line for each damaged one that was passed over.

    `latest` falls back to the other tags, newest first. Raises UsageError if all are damaged.
    """
    pointers, passed_over = _pointers(folder) if folder.is_dir() else {}, []
    tags = [pointers[pointer]] if pointer in pointers else []
    for tag in [*tags, *(tag for tag in _tags(folder) if pointer == "latest" and tag not in tags)]:
        is_tag = re.fullmatch(r"step_[0-9_]{1,40}", tag)  # a corrupt pointer may hold newlines and control characters
        fault = fault_of(folder / tag) if is_tag else "it does not name a tag"
        if not fault:
            return tag, [*passed_over, *([f"resuming from {tag}"] if passed_over else [])]
        passed_over.append(f"checkpoint {folder / (tag if is_tag else pointer)} is damaged: {fault}")
    if passed_over:
        raise UsageError(f"{passed_over[0]}; no intact one is left; {REMEDY}")
    return None, []


def load(tag: Path) -> dict[str, Any]:
    """The content of a tag. Nothing in it is executed. Raises UsageError if it is not a checkpoint of this program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused below
            content = torch.load(tag / STATE_FILE, map_location="cpu", weights_only=True)
        refuse_other_format(content, tag / STATE_FILE)
        state = RunState.from_dict(content["run_state"])
        if not isinstance(content["settings"], dict) or not isinstance(content["engine"], dict):
            raise TypeError("settings and engine must be dicts")
        pointers = [name for name in content.get("pointers", ()) if re.fullmatch(POINTERS, name)]
    except UsageError:
        raise
    except Exception as error:  # a corrupt or foreign file
        raise _not_a_checkpoint(tag, error) from None
    return {**content, "run_state": state, "pointers": pointers}


def _not_a_checkpoint(tag: Path, error: Exception) -> UsageError:
    return UsageError(f"{tag / STATE_FILE} is not a checkpoint of this program ({reason(error)}); {REMEDY}")


def _copy_best_model(source: Path, folder: Path, state: RunState, world: World) -> None:
    """Copy another run's best model if it is the one in `state`; if that run has found a better one since, forget it."""
    file = source / "best_model" / PORTABLE_FILE
    if world.from_main(lambda: file.exists() and load_portable(file.parent)["step"] == state.best_step):
        if world.is_main:
            shutil.copytree(file.parent, folder / "best_model", dirs_exist_ok=True)
    else:
        state.best_accuracy, state.best_step = -1.0, -1


def resume(
    folder: Path, start_from: tuple[Path, str] | None, engine: Engine, world: World, settings: dict[str, Any]
) -> RunState:
    """The state of the newest intact checkpoint in `folder`, loaded into `engine` as well; a new state if there is none.

    A run without a checkpoint starts from `start_from`, the checkpoints folder of another run and a pointer in it, and copies
    its best model. Damaged checkpoints are reported on stderr and passed over.
    """
    tag, lines = world.from_main(lambda: find(folder))
    source, is_other_run = folder, tag is None and start_from is not None
    if is_other_run:
        source, pointer = start_from
        tag, lines = world.from_main(lambda: find(source, pointer))
    if world.is_main:
        for line in lines:
            print(line, file=sys.stderr)
    if tag is None:
        return RunState()
    content = load(source / tag)
    try:  # another run may have another learning rate; the engine checks that its state fits
        if not is_other_run and (shown := differences(content["settings"], settings)):
            raise UsageError(f"{source / tag} is a checkpoint of another experiment ({shown}); choose another --output-dir")
        engine.restore(content["engine"])
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:  # something missing or wrong
        raise _not_a_checkpoint(source / tag, error) from None
    state, names = content["run_state"], content["pointers"]
    state.resumed_at_steps.append(state.step)
    if is_other_run:
        _copy_best_model(source, folder, state, world)
    else:  # the save may have been killed before it set all pointers
        world.from_main(lambda: _point(folder, [name for name in names if _pointers(folder).get(name) != tag], tag))
    return state


# --- the weights alone ------------------------------------------------------------------------------------------------


def save_portable(folder: Path, module: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """Write weights and plain `facts` to PORTABLE_FILE, for torch.load's safe default; returns "" or why that failed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / PORTABLE_FILE) as file:
            torch.save({"format": FORMAT, "module": module, **facts}, file)
    except (OSError, RuntimeError) as error:
        return f"{folder} is not written: {_why_not(error)}"
    return ""


def load_portable(folder: Path) -> dict[str, Any]:
    """What `save_portable` wrote. Raises UsageError if it is something else."""
    file = folder / PORTABLE_FILE
    module, about = read_weights(file, str(file), REMEDY)
    refuse_other_format(about, file)
    try:
        return {**about, "module": module, "step": int(about["step"])}
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file} is not a model of this program ({reason(error)}); {REMEDY}") from None


def portable_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights that `save_portable` wrote. Raises UsageError if they do not fit `model`."""
    weights = load_portable(folder)["module"]
    if difference := first_difference(model.state_dict(), weights, finite=False):
        raise UsageError(f"{folder / PORTABLE_FILE} does not fit the model: {difference}; {REMEDY}")
    return weights
