"""Whole runs that are stopped in mid-epoch and resumed: bit for bit in the same world, to their end in another.

On a small synthetic data set: 15 steps of 32 images an epoch.
"""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cifar10.config import values
from cifar10.data import augment
from cifar10.run import checkpoint
from tests.helpers import WORKERS, launch, same_bits

pytestmark = pytest.mark.slow

SMALL = "--dataset synthetic --val-images 100 --test-images 40 --global-batch-size 32 --log-every-steps 4 --threads 1".split()
SGD = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}
ADAMW = {"type": "AdamW", "params": {"lr": 0.003}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.05, "warmup_num_steps": 25}}
IMPATIENT = "--patience 3 --plateau-patience 1 --plateau-lr-factor 0.5 --min-improvement 9 --keep-checkpoints 9"
STOP_AT = 20  # 5 steps into the second epoch, and 1 behind a row of steps.csv


@dataclass(frozen=True)
class Kind:
    """How a run is started; `passes` are micro-batches a step."""

    ranks: int = 1
    passes: int = 1
    flags: str = "--epochs 2"
    steps: int = 30
    stop_at: int = STOP_AT

    stage: int = 0
    precision: str = "fp32"
    optimizer: Any = None
    scheduler: Any = None
    augment: str = ""
    zero: Any = None  # keys of zero_optimization beside the stage
    checkpointing: Any = None  # the section activation_checkpointing

    @property
    def json(self) -> dict[str, Any]:
        sizes = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 32 // self.ranks // self.passes}
        config = {**sizes, "optimizer": self.optimizer or SGD, "zero_optimization": {"stage": self.stage, **(self.zero or {})}}
        if self.checkpointing is not None:
            config["activation_checkpointing"] = self.checkpointing
        if self.scheduler:
            config["scheduler"] = self.scheduler
        return {**config, "bf16": {"enabled": self.precision == "bf16"}, "fp16": {"enabled": self.precision == "fp16"}}


FLIPS = ("RandomHorizontalFlip", "AlternatingFlip")
OTHERS = """BrightnessContrast(0.1) Cutout(8) RandomRotation(15) RandomAffine(10) ColorJitter(0.2) RandomGrayscale RandomErasing
    RandAugment TrivialAugmentWide AutoAugment MixUp CutMix"""
BLOCKS = {"flags": "--max-steps 7 --ema 0.9 --model torchvision:shufflenet_v2_x0_5", "steps": 7, "stop_at": 5}
CPU = {"device": "cpu"}
OFFLOADED = {"offload_optimizer": CPU, "offload_param": CPU, "stage3_param_persistence_threshold": 0}


def everything(ranks: int, stage: int) -> Kind:
    """Every augmentation, EMA, gradient checkpointing by DeepSpeed's key."""
    augmented, on_cpu = f"RandomCrop(4) {FLIPS[(ranks + stage // 2) % 2]} {OTHERS}", {"cpu_checkpointing": ranks == 2}
    return Kind(ranks=ranks, stage=stage, augment=augmented, checkpointing=on_cpu, **BLOCKS)


KINDS = {
    "ZeRO 1, 2 passes, WarmupLR, SWA": Kind(stage=1, passes=2, scheduler=WARMUP, flags="--epochs 2 --swa-epochs 2"),
    "2 ranks, bf16, ZeRO 3, 2 passes, AdamW, EMA": Kind(
        ranks=2, stage=3, passes=2, precision="bf16", optimizer=ADAMW, flags="--epochs 2 --ema 0.9 --model lenet"
    ),
    **{f"everything, ranks {ranks}, ZeRO {stage}": everything(ranks, stage) for ranks in (1, 2) for stage in (0, 2)},
    "2 ranks, ZeRO 3, offloaded": Kind(ranks=2, stage=3, optimizer=ADAMW, zero=OFFLOADED, checkpointing={}, **BLOCKS),
    "bf16, early stopping": Kind(precision="bf16", flags=f"--epochs 9 --model lenet {IMPATIENT}", steps=60, stop_at=40),
}
MOVED = [Kind(ranks=2, stage=2), Kind()]  # the one that is stopped, and the one that resumes in its folder


def start(base: Path, folder: str, kind: Kind, **more: Any) -> dict[str, Any]:
    """A start of the program for small_runs.py."""
    config = base / f"{folder}.{kind.ranks}.json"
    config.write_text(json.dumps(kind.json))
    words = [*SMALL, *kind.flags.split(), "--deepspeed_config", str(config), "--output-dir", str(base / folder)]
    words += ["--augment", kind.augment] if kind.augment else []
    return {"ranks": kind.ranks, "flags": words, "keep_summary": str(base / f"{folder}.last.json"), **more}


def carry_out(base: Path, starts: list[dict[str, Any]]) -> None:
    (base / "starts.json").write_text(json.dumps(starts))
    launch(1, WORKERS / "small_runs.py", str(base / "starts.json"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of run, whole and resumed, and one that was stopped."""
    base, starts = tmp_path_factory.mktemp("runs"), []
    for name, kind in KINDS.items():
        kept = str(base / f"{name}, stopped.first.json")
        starts.append(start(base, f"{name}, whole", kind))
        starts.append(start(base, f"{name}, stopped", kind, stop_after=kind.stop_at, keep_summary=kept))
        starts.append(start(base, f"{name}, stopped", kind))
    starts.append(start(base, "moved", MOVED[0], stop_after=STOP_AT, keep_summary=str(base / "moved.first.json")))
    starts.append(start(base, "moved", MOVED[1]))
    starts.append(start(base, "unfinished", Kind(), stop_after=STOP_AT))
    for part in (starts[:9], starts[9:18], starts[18:]):  # each within a launch's deadline
        carry_out(base, part)
    return base


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def rows_without_throughput(folder: Path) -> list[list[str]]:
    return [row[:-1] for row in csv.reader((folder / "metrics.csv").open(newline=""))]


MAY_DIFFER = ("second", "throughput", "images_per", "resumed_at_steps", "time", "peak_memory")  # words of the keys


@pytest.mark.parametrize("name", KINDS)
def test_a_run_stopped_in_mid_epoch_equals_the_uninterrupted_one(base: Path, name: str) -> None:
    stopped, whole, kind = base / f"{name}, stopped", base / f"{name}, whole", KINDS[name]
    first = read(base / f"{name}, stopped.first.json")
    assert (first["status"], first["steps"]) == ("stopped", kind.stop_at)
    ours, theirs = read(stopped / "summary.json"), read(whole / "summary.json")
    assert (ours["resumed_at_steps"], theirs["resumed_at_steps"]) == ([kind.stop_at], [])
    assert ours["steps"] == kind.steps
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if not any(word in key for word in MAY_DIFFER):
            assert ours[key] == value, key
    assert (stopped / "steps.csv").read_bytes() == (whole / "steps.csv").read_bytes()
    assert rows_without_throughput(stopped) == rows_without_throughput(whole)
    for which in ("best_model", "final"):
        mine, other = (checkpoint.load_portable(run / "checkpoints" / which) for run in (stopped, whole))
        assert same_bits(mine.pop("module"), other.pop("module"))
        assert mine == other


def test_everything_is_each_augmentation() -> None:
    named = {type(one).name() for kind in KINDS.values() for one in augment.parse(kind.augment)}
    assert named == values.classes(augment.Operation).keys()


def test_plateaus_and_early_stopping_continue_to_count(base: Path) -> None:
    """The comparison above needs it: the learning rate was halved before the stop and after it."""
    folder = base / "bf16, early stopping, stopped"
    assert read(folder / "summary.json")["ended_by"] == "early_stopping"
    at_stop = checkpoint.load(folder / "checkpoints" / "step_00000040")["run_state"]
    assert (at_stop.lr_factor, at_stop.epochs_without_improvement) == (0.5, 1)
    at_end = checkpoint.load(folder / "checkpoints" / "step_00000060")["run_state"]
    assert (at_end.lr_factor, at_end.epochs_without_improvement) == (0.125, 3)


def test_a_run_stopped_on_two_ranks_with_zero_2_resumes_on_one_without(base: Path) -> None:
    first, last = read(base / "moved.first.json"), read(base / "moved" / "summary.json")
    assert (first["status"], first["steps"], first["world_size"]) == ("stopped", STOP_AT, 2)
    assert (last["status"], last["steps"], last["world_size"]) == ("finished", 30, 1)
    assert last["resumed_at_steps"] == [STOP_AT]
    rows = list(csv.DictReader((base / "moved" / "steps.csv").open(newline="")))
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 15, 19, 23, 27, 30]
    assert float(rows[-1]["accuracy"]) > 2 * float(rows[0]["accuracy"])
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.1


# --- what cannot be resumed ------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    """All but environment.json, which has every start, and the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("environment.json", ".lock")
    }


def test_damage_is_named_and_the_program_resumes_or_refuses_in_one_line(base: Path) -> None:
    tags = [f"step_{step:08d}" for step in (15, STOP_AT)]
    damaged = {"newest damaged": tags[1:], "all damaged": tags}
    for name, lost in damaged.items():
        shutil.copytree(base / "unfinished", base / name)
        for tag in lost:
            state = base / name / "checkpoints" / tag / "state.pt"
            state.write_bytes(state.read_bytes()[:-1])
    shutil.copytree(base / "unfinished", base / "foreign")
    others = base / "bf16, early stopping, stopped" / "checkpoints" / "step_00000040"
    shutil.copytree(others, base / "foreign" / "checkpoints" / others.name)
    (base / "foreign" / "checkpoints" / "latest").write_text(others.name)
    before = {name: files_of(base / name) for name in ("all damaged", "foreign")}

    names = ("newest damaged", "all damaged", "foreign")
    codes = {"newest damaged": 0, "all damaged": 2, "foreign": 2}
    shared = {"keep_summary": str(base / "nobody reads it.json")}
    starts = [start(base, name, Kind(), code=codes[name], stderr=str(base / f"{name}.err"), **shared) for name in names]
    carry_out(base, starts)

    said = {name: (base / f"{name}.err").read_text().splitlines() for name in names}
    checkpoints = {name: base / name / "checkpoints" for name in names}
    resumed, refused, foreign = (said[name] for name in names)
    assert resumed[0].startswith(f"checkpoint {checkpoints['newest damaged'] / tags[1]} is damaged: state.pt has ")
    assert resumed[1] == f"resuming from {tags[0]}"
    last = read(base / "newest damaged" / "summary.json")
    assert (last["status"], last["resumed_at_steps"]) == ("finished", [15])
    assert len(refused) == len(foreign) == 1
    assert refused[0].startswith(f"error: checkpoint {checkpoints['all damaged'] / tags[1]} is damaged: state.pt has ")
    assert f"{others.name} is a checkpoint of another experiment (" in foreign[0]
    assert {name: files_of(base / name) for name in before} == before
