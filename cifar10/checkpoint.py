"""Checkpoints of a run: numbered tags with a pointer for resuming, and portable files that need nothing of this program.

checkpoints/step_00001406/    DeepSpeed's files, each rank's buffers, the RunState
checkpoints/latest            the newest complete tag: what a resume reads
checkpoints/best  epoch_005   other tags that are kept: that of best_model, and those of --save-frequency
checkpoints/best_model/       mp_rank_00_model_states.pt: fp32 weights under "module", normalisation, classes, recipe
checkpoints/final/            the same, of the last state
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar10 import UsageError
from cifar10.engine import Engine
from cifar10.files import written_whole
from cifar10.state import RunState
from cifar10.world import World

PORTABLE_FILE = "mp_rank_00_model_states.pt"


def read_pointer(folder: Path, name: str) -> str | None:
    """The tag that a pointer in `folder` names, or None if there is no such pointer. Raises UsageError if the tag has gone."""
    try:
        tag = (folder / name).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if not (folder / tag).is_dir():
        raise UsageError(f"{folder / name} names {tag!r}, which is not there; write the name of a tag that is into it")
    return tag


def _prune(folder: Path, keep: int) -> None:
    """Remove all tags but the newest `keep`, and those that a pointer names."""
    named = {path.read_text(encoding="utf-8").strip() for path in folder.iterdir() if path.is_file()}
    for old in sorted(folder.glob("step_*"))[:-keep]:
        if old.name not in named:
            shutil.rmtree(old, ignore_errors=True)


def save(folder: Path, engine: Engine, state: RunState, world: World, *, keep: int, pointers: Sequence[str] = ()) -> None:
    """Save everything that a resume needs: all ranks write, and only then `latest` and `pointers` move and old tags go."""
    tag = f"step_{state.step:08d}"
    world.barrier()
    engine.save(folder, tag, {"run_state": state.as_dict()})
    world.barrier()
    if world.is_main:
        for name in ("latest", *pointers):
            with written_whole(folder / name) as pointer:
                pointer.write(tag.encode())
        _prune(folder, keep)
    world.barrier()


def _take_best_model(source: Path, folder: Path, state: RunState, world: World) -> None:
    """Copy another run's best model if it is the one that `state` speaks of: the other run may have found a better one since,
    and then the best so far is unknown here."""
    file = source / "best_model" / PORTABLE_FILE
    if world.from_main(lambda: file.exists() and load_portable(file.parent)["step"] == state.best_step):
        if world.is_main:
            shutil.copytree(file.parent, folder / "best_model", dirs_exist_ok=True)
    else:
        state.best_accuracy, state.best_step = -1.0, -1


def resume(folder: Path, start_from: tuple[Path, str] | None, engine: Engine, world: World) -> RunState:
    """The state of the newest checkpoint in `folder`, its weights and optimizer loaded into `engine`; a new state if none.

    A run that has no checkpoint yet starts from `start_from`, another run's folder of checkpoints and the pointer of one of
    them, and takes with it the best model that there was by then.
    """
    tag = world.from_main(lambda: read_pointer(folder, "latest"))
    source = folder
    if tag is None and start_from is not None:
        source, pointer = start_from
        tag = world.from_main(lambda: read_pointer(source, pointer))
    if tag is None:
        return RunState()
    state = RunState.from_dict(engine.load(source, tag)["run_state"])
    if source != folder:
        _take_best_model(source, folder, state, world)
    state.resumed_at_steps.append(state.step)
    return state


def save_portable(folder: Path, module: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write folder/mp_rank_00_model_states.pt. `facts` are plain values, so torch.load's safe default reads the file."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / PORTABLE_FILE) as file:
        torch.save({"module": module, **facts}, file)


def load_portable(folder: Path) -> dict[str, Any]:
    """What `save_portable` wrote; nothing in the file is executed."""
    return torch.load(folder / PORTABLE_FILE, map_location="cpu", weights_only=True)
