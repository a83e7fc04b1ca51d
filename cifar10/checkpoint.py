"""Checkpoints of a run: numbered tags with a pointer for resuming, and portable files that need nothing of this program.

checkpoints/step_00001406/    DeepSpeed's files, each rank's buffers, the RunState
checkpoints/latest            the newest complete tag: what a resume reads
checkpoints/best_model/       mp_rank_00_model_states.pt: fp32 weights under "module", normalisation, classes, recipe
checkpoints/final/            the same, of the last state
"""

from __future__ import annotations

import shutil
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


def newest(folder: Path) -> str | None:
    """The tag of the newest complete checkpoint in `folder`, or None. Raises UsageError if it has gone."""
    try:
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if not (folder / tag).is_dir():
        raise UsageError(f"{folder / 'latest'} names {tag!r}, which is not there; write the name of a tag that is into it")
    return tag


def save(folder: Path, engine: Engine, state: RunState, world: World, *, keep: int) -> None:
    """Save everything that a resume needs: all ranks write, and only then the pointer moves and old tags go."""
    tag = f"step_{state.step:08d}"
    world.barrier()
    engine.save(folder, tag, {"run_state": state.as_dict()})
    world.barrier()
    if world.is_main:
        with written_whole(folder / "latest") as pointer:
            pointer.write(tag.encode())
        for old in sorted(folder.glob("step_*"))[:-keep]:
            if old.name != tag:
                shutil.rmtree(old, ignore_errors=True)
    world.barrier()


def resume(folder: Path, start_from: Path | None, engine: Engine, world: World) -> RunState:
    """The state of the newest checkpoint in `folder`, its weights and optimizer loaded into `engine`; a new state if none.

    A run that has no checkpoint yet starts from the newest one in `start_from`, another run's folder of checkpoints, and
    takes that run's best model with it.
    """
    tag = world.from_main(lambda: newest(folder))
    source = folder
    if tag is None and start_from is not None:
        source, tag = start_from, world.from_main(lambda: newest(start_from))
        if world.is_main and (source / "best_model").is_dir():
            shutil.copytree(source / "best_model", folder / "best_model", dirs_exist_ok=True)
    if tag is None:
        return RunState()
    state = RunState.from_dict(engine.load(source, tag)["run_state"])
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
