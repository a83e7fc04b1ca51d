"""Checkpoints of a run: numbered tags with pointers for resuming, and portable files that need nothing of this program.

checkpoints/step_00001406/    state.pt: all that training goes on from; manifest.json: its size and sha256
checkpoints/latest            names the newest tag: what a resume reads first
checkpoints/best  epoch_005   name other tags that are kept: that of best_model, and those of --save-frequency
checkpoints/best_model/       mp_rank_00_model_states.pt: fp32 weights under "module", format, normalization, classes, recipe
checkpoints/final/            the same, of the last state

A tag appears whole or not at all: written under another name, with its manifest, brought to the disk, renamed; only then do
pointers move, by a rename each; a tag knows which are to name it, so that a resume completes what was cut short between them.
So a process may be killed at any moment. All files hold plain tensors and values: reading one executes nothing. The manifest
detects damage; it does not prove where a file comes from.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar10 import UsageError, reason
from cifar10.config.recipe import FORMAT, refuse_other_format
from cifar10.config.settings import differences
from cifar10.distributed.world import World
from cifar10.engine.engine import Engine
from cifar10.files import sync_folder, written_whole
from cifar10.models.weights import first_difference, read_weights
from cifar10.run.state import RunState

PORTABLE_FILE, STATE_FILE, MANIFEST_FILE = "mp_rank_00_model_states.pt", "state.pt", "manifest.json"
LONGEST_TAG = 100  # bytes of a pointer that are read
NAMES = r"best|epoch_\d{3,9}"  # of pointers beside `latest`
PAUSES = ("before state", "after state", "after manifest", "after rename", "between pointers", "after pointers")  # of a save


def _pause(name: str) -> None:
    """Where a test asks for it, stop here and say so: a kill at random almost never meets a save of milliseconds."""
    if os.environ.get("CIFAR10_TEST_PAUSE") == name:
        Path(os.environ["CIFAR10_TEST_PAUSED"]).touch()
        time.sleep(3600)


# --- saving -----------------------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _free_tag(folder: Path, step: int) -> str:
    """The name of a tag for this step that is not taken: a run that was stopped at an epoch's end is saved there twice."""
    tag, number = f"step_{step:08d}", 1
    while (folder / tag).exists():
        number += 1
        tag = f"step_{step:08d}_{number}"
    return tag


def _write_tag(folder: Path, tag: str, content: dict[str, Any]) -> None:
    """Make the tag's folder with its state and manifest, all of it on the disk before it has its name."""
    draft = folder / ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    _pause("before state")
    with written_whole(draft / STATE_FILE) as file:
        torch.save(content, file)
    _pause("after state")
    facts = {"bytes": (draft / STATE_FILE).stat().st_size, "sha256": _sha256(draft / STATE_FILE)}
    with written_whole(draft / MANIFEST_FILE) as file:
        file.write(json.dumps({STATE_FILE: facts}).encode())
    _pause("after manifest")
    os.rename(draft, folder / tag)
    sync_folder(folder)
    _pause("after rename")


def _point(folder: Path, names: Sequence[str], tag: str) -> None:
    for name in names:
        with written_whole(folder / name) as pointer:
            pointer.write(tag.encode())
        _pause("between pointers")


def _pointers(folder: Path) -> dict[str, str]:
    """Name -> tag of every pointer in `folder`; one that holds anything else names nothing that there is."""
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return {path.name: _pointed_at(path) for path in files}


def _pointed_at(pointer: Path) -> str:
    with open(pointer, "rb") as file:
        text = file.read(LONGEST_TAG).decode(errors="replace").strip()
    return "".join(char if char.isprintable() else "?" for char in text)


def _tags(folder: Path) -> list[str]:
    """All tags, the newest first."""
    return sorted((path.name for path in folder.glob("step_*") if path.is_dir()), reverse=True)


def _prune(folder: Path, keep: int) -> None:
    """Remove all tags but the newest `keep`, and those that a pointer names."""
    named = set(_pointers(folder).values())
    for tag in _tags(folder)[keep:]:
        if tag not in named:
            shutil.rmtree(folder / tag, ignore_errors=True)


def _why_not(error: OSError | RuntimeError) -> str:
    """What a disk says that will not take a file: an OSError, or torch.save's RuntimeError about one."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    return f"{said}{'; make room on the disk' if full else ''}"


def _commit(folder: Path, content: dict[str, Any], keep: int, pointers: Sequence[str]) -> str:
    """Write, rename, point, prune. Returns "" or, if the disk will not take it, why; what was saved before is untouched."""
    try:
        tag = _free_tag(folder, content["run_state"]["step"])
        _write_tag(folder, tag, content)
        _point(folder, ("latest", *pointers), tag)
        _pause("after pointers")
        _prune(folder, keep)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(folder / ".draft", ignore_errors=True)
        return f"not saved at step {content['run_state']['step']}: {_why_not(error)}; earlier checkpoints stay"
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
) -> str:
    """Save everything that a resume needs; all ranks call it, and rank 0 writes. `settings` say which experiment it is.

    Returns "" if it is saved, else why not, in a line.
    """
    content = {"format": FORMAT, "run_state": state.as_dict(), "settings": settings}
    content |= {"engine": engine.full_state(), "pointers": list(pointers)}
    return world.from_main(lambda: _commit(folder, content, keep, pointers))


# --- resuming ---------------------------------------------------------------------------------------------------------


def fault_of(tag: Path) -> str:
    """What is wrong with a tag's files, by its manifest; "" if nothing is."""
    try:
        manifest = json.loads((tag / MANIFEST_FILE).read_text(encoding="utf-8"))
        for name, facts in manifest.items():
            file = tag / Path(name).name
            if not file.is_file():  # a device or a pipe might never end
                return f"{name} is no file" if file.exists() else f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} of {facts['bytes']} bytes"
            if _sha256(file) != facts["sha256"]:
                return f"{name} has another sha256 than its manifest"
        return "" if STATE_FILE in manifest else f"{MANIFEST_FILE} does not list {STATE_FILE}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{MANIFEST_FILE} cannot be read ({type(error).__name__})"


def _candidates(folder: Path, pointer: str) -> Iterator[str]:
    """The tag that the pointer names; in place of `latest`, all others too, the newest first."""
    named = _pointers(folder).get(pointer) if folder.is_dir() else None
    if named is not None:
        yield named
    if pointer == "latest":
        yield from (tag for tag in _tags(folder) if tag != named)


def find(folder: Path, pointer: str = "latest") -> tuple[str | None, list[str]]:
    """The tag to go on from, or None if there are none at all; and a line for each damaged one that was passed over.

    Raises UsageError if there are only damaged ones.
    """
    passed_over = []
    for tag in _candidates(folder, pointer):
        is_tag = re.fullmatch(r"step_[0-9_]{1,40}", tag)  # a pointer may hold anything, lines and control characters too
        fault = fault_of(folder / tag) if is_tag else "it names no tag"
        if not fault:
            return tag, [*passed_over, *([f"going on from {tag}"] if passed_over else [])]
        passed_over.append(f"checkpoint {folder / (tag if is_tag else pointer)} is damaged: {fault}")
    if passed_over:
        raise UsageError(f"{passed_over[0]}; no sound one is left there; restore one, or name another --output-dir")
    return None, []


def load(tag: Path) -> dict[str, Any]:
    """What a tag holds. Nothing in it is executed. Raises UsageError if it is no checkpoint of this program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it is about to refuse
            content = torch.load(tag / STATE_FILE, map_location="cpu", weights_only=True)
        refuse_other_format(content, tag / STATE_FILE)
        state = RunState.from_dict(content["run_state"])
        if not isinstance(content["settings"], dict) or not isinstance(content["engine"], dict):
            raise TypeError("no settings, or no state of an engine")
        pointers = [name for name in content.get("pointers", ()) if re.fullmatch(NAMES, name)]
    except UsageError:
        raise
    except Exception as error:  # a corrupt or foreign file
        raise _no_checkpoint(tag, error) from None
    return {**content, "run_state": state, "pointers": pointers}


def _no_checkpoint(tag: Path, error: Exception) -> UsageError:
    return UsageError(
        f"{tag / STATE_FILE} is not a checkpoint of this program ({reason(error)}); restore it, or name another --output-dir"
    )


def _take_up(tag: Path, content: dict[str, Any], engine: Engine, settings: dict[str, Any] | None) -> RunState:
    try:
        if settings is not None and (shown := differences(content["settings"], settings)):
            raise UsageError(f"{tag} is a checkpoint of another experiment ({shown}); name another --output-dir")
        engine.restore(content["engine"])
    except (
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        IndexError,
        RuntimeError,
    ) as error:  # it lacks or mistakes something
        raise _no_checkpoint(tag, error) from None
    state = content["run_state"]
    state.resumed_at_steps.append(state.step)
    return state


def _complete_pointers(folder: Path, tag: str, names: Sequence[str]) -> None:
    """Let the pointers that were to name `tag` name it, if the process that saved it was killed before they did."""
    there = _pointers(folder)
    _point(folder, [name for name in names if there.get(name) != tag], tag)


def _take_best_model(source: Path, folder: Path, state: RunState, world: World) -> None:
    """Copy another run's best model if it is the one that `state` speaks of: the other run may have found a better one since,
    and then the best so far is unknown here."""
    file = source / "best_model" / PORTABLE_FILE
    if world.from_main(lambda: file.exists() and load_portable(file.parent)["step"] == state.best_step):
        if world.is_main:
            shutil.copytree(file.parent, folder / "best_model", dirs_exist_ok=True)
    else:
        state.best_accuracy, state.best_step = -1.0, -1


def resume(
    folder: Path, start_from: tuple[Path, str] | None, engine: Engine, world: World, settings: dict[str, Any]
) -> RunState:
    """The state of the newest sound checkpoint in `folder`, loaded into `engine` as well; a new state if there is none.

    A run that has no checkpoint yet starts from `start_from`, another run's folder of checkpoints and the pointer of one of
    them, and takes with it the best model that there was by then. What is damaged is named on stderr and passed over.
    """
    tag, lines = world.from_main(lambda: find(folder))
    source, expected = folder, settings
    if tag is None and start_from is not None:
        source, pointer = start_from
        expected = None  # another run may have another learning rate; the engine checks that the state fits
        tag, lines = world.from_main(lambda: find(source, pointer))
    if world.is_main:
        for line in lines:
            print(line, file=sys.stderr)
    if tag is None:
        return RunState()
    content = load(source / tag)
    state = _take_up(source / tag, content, engine, expected)
    if source != folder:
        _take_best_model(source, folder, state, world)
    else:
        world.from_main(lambda: _complete_pointers(folder, tag, content["pointers"]))
    return state


# --- the weights alone ------------------------------------------------------------------------------------------------


def save_portable(folder: Path, module: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """Write folder/mp_rank_00_model_states.pt; returns "" or, if the disk will not take it, why.

    `facts` are plain values, so torch.load's safe default reads the file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / PORTABLE_FILE) as file:
            torch.save({"format": FORMAT, "module": module, **facts}, file)
    except (OSError, RuntimeError) as error:
        return f"{folder} is not written: {_why_not(error)}"
    return ""


def load_portable(folder: Path) -> dict[str, Any]:
    """What `save_portable` wrote. Raises UsageError if it is something else."""
    file, remedy = folder / PORTABLE_FILE, "restore it, or choose another --output-dir"
    module, about = read_weights(file, str(file), remedy)
    refuse_other_format(about, file)
    try:
        return {**about, "module": module, "step": int(about["step"])}
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file} is not a model of this program ({reason(error)}); {remedy}") from None


def portable_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights that `save_portable` wrote. Raises UsageError if they are not those of such a model."""
    weights = load_portable(folder)["module"]
    if difference := first_difference(model.state_dict(), weights, finite=False):
        raise UsageError(
            f"{folder / PORTABLE_FILE} holds another model's weights: {difference}; restore it, or choose another --output-dir"
        )
    return weights
