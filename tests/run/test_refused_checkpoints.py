"""Damaged checkpoints are named and passed over; those of another run are refused."""

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cifar10 import UsageError
from cifar10.config.recipe import FORMAT
from cifar10.engine.engine import Engine
from cifar10.models.registry import build_model
from cifar10.plan import make_plan
from cifar10.run import checkpoint
from cifar10.run.folder import open_run
from cifar10.run.state import RunState
from tests.helpers import batch, make_engine, one_rank, one_step, same_bits

SETTINGS = {"recipe": {"epochs": 2, "model": "smooth_cnn"}, "deepspeed": {"optimizer": {"params": {"lr": 0.1}}}}
TAGS = [f"step_{step:08d}" for step in (1, 2, 3)]


def engine_of(model: str = "smooth_cnn", **config: Any) -> Engine:
    return make_engine(one_rank(), build_model(model, 0, 10), global_images=8, **config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    """A folder with three checkpoints, and the weights of each."""
    folder, engine, weights = tmp_path_factory.mktemp("saved"), engine_of(), []
    for step in (1, 2, 3):
        one_step(engine, [batch(8, seed=step)])
        assert checkpoint.save(folder, engine, RunState(step=step), one_rank(), SETTINGS, keep=9) == ""
        weights.append(engine.portable_state())
    return folder, weights


@pytest.fixture
def folder(saved: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved[0], tmp_path / "checkpoints"))


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def resume(folder: Path, engine: Engine, settings: dict[str, Any] = SETTINGS) -> RunState:
    """Resume; nothing on the disk changes."""
    before = tree(folder)
    try:
        return checkpoint.resume(folder, None, engine, one_rank(), settings)
    finally:
        assert tree(folder) == before


def refusal(folder: Path, engine: Engine | None = None, settings: dict[str, Any] = SETTINGS) -> str:
    """The message with which the folder is refused; the engine is unchanged."""
    engine = engine or engine_of()
    before = engine.portable_state()
    with pytest.raises(UsageError) as caught:
        resume(folder, engine, settings)
    assert same_bits(engine.portable_state(), before)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    return message


# --- damage -----------------------------------------------------------------------------------------------------------------


def truncate(tag: Path) -> None:
    (tag / "state.pt").write_bytes((tag / "state.pt").read_bytes()[:-100])


def flip_a_bit(tag: Path) -> None:
    content = bytearray((tag / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tag / "state.pt").write_bytes(content)


def empty(tag: Path) -> None:
    shutil.rmtree(tag)
    tag.mkdir()


def writes(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda tag: (tag / name).write_bytes(content) and None


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "state.pt has": truncate,
    "manifest.json is missing": lambda tag: (tag / "manifest.json").unlink(),
    "state.pt is missing": lambda tag: (tag / "state.pt").unlink(),
    "has another sha256 than its manifest": flip_a_bit,
    "is missing": empty,
    "(JSONDecodeError)": writes("manifest.json", b'{"state.pt": {"by'),
    "(UnicodeDecodeError)": writes("manifest.json", b"\xff\xfe\xfa"),
    "(RecursionError)": writes("manifest.json", b"[" * 100_000),
    "(AttributeError)": writes("manifest.json", b"[]"),
    "(TypeError)": writes("manifest.json", b'{"state.pt": 5}'),
    "does not list state.pt": writes("manifest.json", b"{}"),
}
POINTERS = {
    "nowhere": b"step_99999999",
    "garbage": b"\x00\x1b[31m\nstep_00000001\nmore",
    "not UTF-8": b"\xff\xfe\xfa",
    "empty": b"",
    "elsewhere": b"../../elsewhere/step_00000001",
    "long": b"step_" + b"1" * 5000,
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(
    folder: Path, saved: Any, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[fault](folder / TAGS[2])
    engine = engine_of()
    assert resume(folder, engine).step == 2
    assert same_bits(engine.portable_state(), saved[1][1])
    named, resumed = capsys.readouterr().err.splitlines()
    assert named.startswith(f"checkpoint {folder / TAGS[2]} is damaged: ")
    assert fault in named
    assert resumed == f"resuming from {TAGS[1]}"


@pytest.mark.parametrize("content", POINTERS)
def test_a_damaged_pointer_is_named_and_the_newest_checkpoint_is_taken(
    folder: Path, saved: Any, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "latest").write_bytes(POINTERS[content])
    engine = engine_of()
    assert resume(folder, engine).step == 3
    assert same_bits(engine.portable_state(), saved[1][2])
    named, resumed = capsys.readouterr().err.splitlines()
    assert named.startswith(f"checkpoint {folder}/")
    assert " is damaged: " in named
    assert named.isprintable()
    assert len(named) < 300
    assert resumed == f"resuming from {TAGS[2]}"


def test_without_a_pointer_the_newest_checkpoint_is_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "latest").unlink()
    assert resume(folder, engine_of()).step == 3
    assert capsys.readouterr().err == ""


def test_if_all_are_damaged_the_newest_is_named(folder: Path) -> None:
    for tag in TAGS:
        truncate(folder / tag)
    message = refusal(folder)
    assert f"{folder / TAGS[2]} is damaged: state.pt has" in message
    assert "no intact one is left" in message


# --- another's --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: engine_of("bn_cnn"), "another model's: conv1.weight is (8, 3, 3, 3) there, (16, 3, 3, 3) here"),
        (lambda: engine_of(optimizer={"type": "AdamW", "params": {"lr": 0.1}}), "optimizer is SGD, but this run's is AdamW"),
    ],
)
def test_another_models_or_optimizers_checkpoint_is_refused(folder: Path, other: Callable[[], Engine], says: str) -> None:
    assert says in refusal(folder, other())


def test_another_schedulers_checkpoint_is_refused(tmp_path: Path) -> None:
    def engine(name: str, **params: float) -> Engine:
        return engine_of(scheduler={"type": name, "params": params})

    checkpoint.save(tmp_path, engine("StepLR", step_size=2), RunState(), one_rank(), SETTINGS, keep=1)
    assert "scheduler is StepLR, but this run's is WarmupLR" in refusal(tmp_path, engine("WarmupLR"))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({**SETTINGS, "recipe": {**SETTINGS["recipe"], "epochs": 3}}, "epochs 2 there, 3 here"),
        ({**SETTINGS, "deepspeed": {"optimizer": {"params": {"lr": 0.2}}}}, "optimizer.params.lr 0.1 there, 0.2 here"),
    ],
)
def test_a_checkpoint_of_another_experiment_is_refused_with_the_difference(folder: Path, other: Any, says: str) -> None:
    message = refusal(folder, settings=other)
    assert "checkpoint of another experiment" in message
    assert says in message


def test_another_runs_checkpoint_on_other_images_is_refused_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    flags = ["--dataset", "synthetic", "--output-dir"]
    theirs = make_plan([*flags, str(tmp_path)], 1, "a test")
    recipe = json.dumps({"format": FORMAT, "settings": theirs.settings["recipe"]})
    open_run(tmp_path, recipe, theirs.ds_config, "auto", ["a test"])
    before = tree(tmp_path)
    make_plan([*flags, str(tmp_path / "new"), "--resume", str(tmp_path)], 1, "a test")
    gray = [*"--dataset synthetic_mnist --mean 0.5 --std 0.5 --resume".split(), str(tmp_path)]
    with pytest.raises(UsageError, match="dataset is synthetic there, synthetic_mnist here") as caught:
        make_plan(gray, 1, "a test")
    assert str(caught.value).isprintable()
    assert tree(tmp_path) == before


# --- an intact manifest of a foreign state ----------------------------------------------------------------------------


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def replace_state(tag: Path, write: Callable[[Path], Any]) -> None:
    """Another state.pt, and the manifest that fits it."""
    write(tag / "state.pt")
    content = (tag / "state.pt").read_bytes()
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tag / "manifest.json").write_text(json.dumps({"state.pt": facts}))


@pytest.mark.parametrize("how", ["torch.save", "pickle", "in the engine's state"])
def test_a_state_that_would_run_code_is_refused_and_runs_none(folder: Path, tmp_path: Path, how: str) -> None:
    marker = tmp_path / "executed"
    content = checkpoint.load(folder / TAGS[2])
    content["run_state"] = content["run_state"].as_dict()
    if how == "in the engine's state":
        content["engine"]["counters"]["global_steps"] = Hostile(marker)
        replace_state(folder / TAGS[2], lambda path: torch.save(content, path))
    else:
        save = torch.save if how == "torch.save" else lambda value, path: path.write_bytes(pickle.dumps(value))
        replace_state(folder / TAGS[2], lambda path: save(Hostile(marker), path))
    with warnings.catch_warnings(record=True) as warned:
        assert f"{TAGS[2]}/state.pt is not a checkpoint of this program (UnpicklingError: " in refusal(folder)
    assert not warned, "they would be lines too"
    assert not marker.exists()
    if how == "pickle":
        pickle.loads((folder / TAGS[2] / "state.pt").read_bytes())
    else:
        torch.load(folder / TAGS[2] / "state.pt", weights_only=False)
    assert marker.exists(), "it would have"


@pytest.mark.parametrize("content", [None, [], {}, {"run_state": {}}, {"run_state": {"step": 1, "planet": 3}}, b"garbage"])
def test_a_state_of_another_layout_is_refused(folder: Path, content: Any) -> None:
    content = content | {"format": FORMAT} if isinstance(content, dict) else content
    write = (lambda path: path.write_bytes(content)) if isinstance(content, bytes) else (lambda path: torch.save(content, path))
    replace_state(folder / TAGS[2], write)
    assert "is not a checkpoint of this program" in refusal(folder)


def test_a_state_of_another_format_is_refused(folder: Path) -> None:
    content = torch.load(folder / TAGS[2] / "state.pt")
    replace_state(folder / TAGS[2], lambda path: torch.save({**content, "format": "cifar10-deepspeed/1"}, path))
    assert f"state.pt has format 'cifar10-deepspeed/1', expected '{FORMAT}'" in refusal(folder)


ENGINE_PARTS = ("parameters", "optimizer", "buffers", "scheduler", "counters")


@pytest.mark.parametrize("lacking", ["run_state", "settings", "engine", *ENGINE_PARTS])
def test_a_state_that_lacks_a_part_is_refused(folder: Path, lacking: str) -> None:
    content = checkpoint.load(folder / TAGS[2])
    content["run_state"] = content["run_state"].as_dict()
    del (content["engine"] if lacking in ENGINE_PARTS else content)[lacking]
    replace_state(folder / TAGS[2], lambda path: torch.save(content, path))
    assert ("another program" if lacking in ENGINE_PARTS else "is not a checkpoint of this program") in refusal(folder)
