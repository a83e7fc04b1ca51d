"""Checkpoints: a resumed run equals the uninterrupted one bit for bit.

Runs are whole ones, on a small synthetic data set: 500 training images, so 15 steps of 32 an epoch.
"""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar10.data import cifar
from cifar10.engine.engine import Engine
from cifar10.engine.full_state import weights_sha256
from cifar10.models.registry import build_model
from cifar10.run import checkpoint
from cifar10.run.state import RunState
from tests.helpers import WORKERS, batch, launch, make_engine, one_rank, one_step, same_bits, snapshot, two_ranks

SMALL = "--dataset synthetic --val-images 100 --test-images 200 --global-batch-size 32 --lr 0.05 --threads 1".split()
TWO_EPOCHS = [*SMALL, "--epochs", "2"]
SAYS_ITS_STEPS = {"train_batch_size": 32, "optimizer": {"type": "SGD", "params": {"lr": 0.05}}, "steps_per_print": 6}


@dataclass(frozen=True)
class Run:
    """A run's folder, and its summary after each start."""

    folder: Path
    summaries: list[dict[str, Any]]

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def last(self) -> dict[str, Any]:
        return self.summaries[-1]


# Name -> ranks, and the flags of each start in the run's folder; BASE is the folder of all runs. The interrupted ones end in
# the middle of an epoch or after its last step, and are saved more or less often.
RUNS: dict[str, tuple[int, list[str]]] = {
    "whole": (1, ["--save-every-epochs 0"]),
    "interrupted": (1, ["--max-steps 10", "--max-steps 22", ""]),
    "stopped": (1, ["--stop-after 15", ""]),
    "whole, 2 ranks": (2, ["--save-every-epochs 1"]),
    "interrupted, 2 ranks": (2, ["--max-steps 10 --save-every-epochs 0", "--save-every-epochs 0"]),
    "kept": (1, ["--save-frequency 1 --save-every-epochs 0 --keep-checkpoints 1 --deterministic --num-workers 4"]),
    "from epoch_001": (1, ["--resume BASE/kept/checkpoints/epoch_001.pth"]),
    "from best": (1, ["--resume BASE/kept/checkpoints/best"]),
    "lr by the batch": (1, ["--lr 0.1 --lr-reference-batch 64 --save-every-epochs 0"]),
    "says its steps": (1, ["--deepspeed_config BASE/says_its_steps.json"]),
}


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Run], str]:
    """All of RUNS, and what they printed."""
    base, starts = tmp_path_factory.mktemp("runs"), []
    for name, (num_ranks, flags_of_starts) in RUNS.items():
        for number, flags in enumerate(flags_of_starts):
            words = [*TWO_EPOCHS, *flags.replace("BASE", str(base)).split(), "--output-dir", str(base / name)]
            if "--deepspeed_config" not in words:
                words += ["--log-every-steps", "4"]
            start = {"ranks": num_ranks, "flags": words, "keep_summary": str(base / f"{name}.{number}.json")}
            if "--stop-after" in words:
                at = words.index("--stop-after")
                start["stop_after"] = int(words[at + 1])
                del words[at : at + 2]
            starts.append(start)
    (base / "starts.json").write_text(json.dumps(starts))
    (base / "says_its_steps.json").write_text(json.dumps(SAYS_ITS_STEPS))
    printed = launch(1, WORKERS / "small_runs.py", str(base / "starts.json"))
    return {
        name: Run(base / name, [json.loads((base / f"{name}.{number}.json").read_text()) for number in range(len(flags))])
        for name, (_, flags) in RUNS.items()
    }, printed


@pytest.fixture(scope="module")
def runs(carried_out: tuple[dict[str, Run], str]) -> dict[str, Run]:
    return carried_out[0]


# --- resuming -------------------------------------------------------------------------------------------------------------


def rows_without_throughput(folder: Path, phase: str) -> list[list[str]]:
    rows = csv.reader((folder / "metrics.csv").open(newline=""))
    return [row[:-1] for row in rows if row[1] == phase]


def assert_same_training(resumed: Run, uninterrupted: Run) -> None:
    assert resumed.last["status"] == uninterrupted.last["status"] == "finished"
    assert resumed.last["steps"] == uninterrupted.last["steps"] == 30
    assert uninterrupted.last["resumed_at_steps"] == []
    assert resumed.last["weights_sha256"] == uninterrupted.last["weights_sha256"]
    assert resumed.last["train_accuracy"] == uninterrupted.last["train_accuracy"]
    assert (resumed.folder / "steps.csv").read_text() == (uninterrupted.folder / "steps.csv").read_text()
    final = [checkpoint.load_portable(run.checkpoints / "final")["module"] for run in (resumed, uninterrupted)]
    assert same_bits(*final)


@pytest.mark.parametrize(("name", "ranks", "steps"), [("", 1, [10, 22, 30]), (", 2 ranks", 2, [10, 30])])
def test_a_run_resumed_in_mid_epoch_equals_the_uninterrupted_one(
    runs: dict[str, Run], name: str, ranks: int, steps: list[int]
) -> None:
    """However often it was saved and evaluated."""
    interrupted = runs[f"interrupted{name}"]
    assert [s["steps"] for s in interrupted.summaries] == steps
    assert interrupted.last["resumed_at_steps"] == steps[:-1]
    assert {s["world_size"] for s in interrupted.summaries} == {ranks}
    assert len({s["weights_sha256"] for s in interrupted.summaries}) == len(steps), "it went on learning"
    assert_same_training(interrupted, runs[f"whole{name}"])


def test_a_run_stopped_at_an_epochs_last_step_equals_the_uninterrupted_one(runs: dict[str, Run]) -> None:
    stopped, whole = runs["stopped"], runs["whole"]
    assert (stopped.summaries[0]["status"], stopped.summaries[0]["steps"]) == ("stopped", 15)
    assert stopped.last["resumed_at_steps"] == [15]
    assert_same_training(stopped, whole)
    for phase in ("train", "val", "test"):
        assert rows_without_throughput(stopped.folder, phase) == rows_without_throughput(whole.folder, phase)


@pytest.mark.parametrize("name", ["from epoch_001", "from best"])
def test_a_run_that_starts_from_a_checkpoint_by_name_equals_the_uninterrupted_one(runs: dict[str, Run], name: str) -> None:
    """With the best model so far in its own folder."""
    run, kept = runs[name], runs["kept"]
    start = 15 if name == "from epoch_001" else kept.last["best_step"]
    assert run.last["resumed_at_steps"] == [start]
    assert (run.last["steps"], run.last["status"]) == (30, "finished")
    assert run.last["weights_sha256"] == kept.last["weights_sha256"] == runs["whole"].last["weights_sha256"]
    best = checkpoint.load_portable(run.checkpoints / "best_model")
    assert (best["step"], best["val_accuracy"]) == (run.last["best_step"], run.last["val_accuracy"])


def test_the_learning_rate_scales_with_the_batch_if_the_recipe_says_so(runs: dict[str, Run]) -> None:
    """0.1 for 64 images is 0.05 for 32."""
    scaled, whole = runs["lr by the batch"], runs["whole"]
    assert (scaled.folder / "steps.csv").read_text() == (whole.folder / "steps.csv").read_text()
    assert scaled.last["weights_sha256"] == whole.last["weights_sha256"]


@pytest.mark.parametrize("run", ["zero 0", "zero 1", "zero 2", "zero 3", "bf16", "bf16, zero 2", "fp16"])
def test_two_ranks_resume_with_every_zero_stage_and_precision(run: str) -> None:
    for rank in two_ranks():
        assert rank[run]["resumed at"] == 5
        assert same_bits(rank[run]["resumed"], rank[run]["went on"])
        assert not same_bits(rank[run]["went on"], rank[run]["weights"])


# --- what is kept -----------------------------------------------------------------------------------------------------------


def tags(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.glob("step_*"))


def test_steps_per_print_prints_each_interval_and_each_epochs_end(carried_out: tuple[dict[str, Run], str]) -> None:
    """Counted within the epoch of 15 steps; no other run prints its steps."""
    runs, printed = carried_out
    said = re.findall(r"^\[(\d+), ([ \d]{5})\] loss: (\d\.\d{3})$", printed, re.MULTILINE)
    assert [(int(epoch), int(step)) for epoch, step, _ in said] == [(e, s) for e in (1, 2) for s in (6, 12, 15)]
    rows = list(csv.DictReader((runs["says its steps"].folder / "steps.csv").open(newline="")))
    assert [int(row["step"]) for row in rows] == [6, 12, 15, 21, 27, 30]
    assert [loss for _, _, loss in said] == [f"{float(row['loss']):.3f}" for row in rows]


def test_only_the_newest_tags_are_kept_and_the_best(runs: dict[str, Run]) -> None:
    assert tags(runs["whole"].checkpoints) == ["step_00000030"]
    assert tags(runs["interrupted"].checkpoints) == ["step_00000022", "step_00000030"]
    assert tags(runs["whole, 2 ranks"].checkpoints) == ["step_00000015", "step_00000030"]


def test_checkpoints_with_a_name_are_kept(runs: dict[str, Run]) -> None:
    """Without a name, only the newest would be left."""
    for name in ("interrupted", "whole, 2 ranks", "kept", "from epoch_001"):
        assert checkpoint.find(runs[name].checkpoints, "best")[0] == f"step_{runs[name].last['best_step']:08d}"
    kept = runs["kept"].checkpoints
    assert {path.name for path in kept.iterdir() if path.is_file()} == {"latest", "best", "epoch_001", "epoch_002"}
    assert [checkpoint.find(kept, f"epoch_00{epoch}")[0] for epoch in (1, 2)] == ["step_00000015", "step_00000030"]
    assert tags(kept) == ["step_00000015", "step_00000030"]


@pytest.mark.parametrize("name", RUNS)
def test_the_pointer_names_a_complete_tag(runs: dict[str, Run], name: str) -> None:
    checkpoints, (num_ranks, _) = runs[name].checkpoints, RUNS[name]
    nothing_left = runs[name].last["resumed_at_steps"] == [30]  # if the best was the last: nothing to train or save
    assert checkpoint.find(checkpoints)[0] == (None if nothing_left else "step_00000030")
    for tag in tags(checkpoints):
        assert {path.name for path in (checkpoints / tag).iterdir()} == {"state.pt", "manifest.json"}
        content = checkpoint.load(checkpoints / tag)
        assert content["run_state"].step == int(tag.split("_")[1])
        assert len(content["engine"]["buffers"]) == num_ranks
    assert not list(checkpoints.rglob("*.tmp*")), "nothing half-written"
    final = checkpoint.load_portable(checkpoints / "final")
    assert weights_sha256(final["module"]) == runs[name].last["weights_sha256"]


def test_portable_files_do_not_need_deepspeed(runs: dict[str, Run]) -> None:
    """With torch.load's defaults, in a process that never imports it."""
    whole = runs["whole"]
    seen = json.loads(launch(1, WORKERS / "plain_load.py", str(whole.folder)).splitlines()[-1])
    assert not seen["deepspeed was imported"]
    recipe = json.loads((whole.folder / "recipe.json").read_text())["settings"]
    for name, step in (("best_model", whole.last["best_step"]), ("final", 30)):
        facts = seen[name]["facts"]
        assert seen[name]["dtypes"] == ["torch.float32"]
        assert facts["step"] == step
        assert facts["recipe"] == recipe
        assert facts["classes"] == list(cifar.CIFAR10.description.classes)
        assert facts["normalization"] == {"mean": recipe["mean"], "std": recipe["std"]}
    assert seen["best_model"]["correct"] / 200 == whole.last["test_accuracy"]


def test_one_rank_resumes_from_two_with_the_mean_of_their_buffers(runs: dict[str, Run]) -> None:
    engine, two = bn_engine(), runs["whole, 2 ranks"]
    saved = checkpoint.load(two.checkpoints / "step_00000030")
    state = checkpoint.resume(two.checkpoints, None, engine, one_rank(), saved["settings"])
    assert (state.step, state.resumed_at_steps) == (30, [30])
    final = checkpoint.load_portable(two.checkpoints / "final")["module"]
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, final[name])
    own = checkpoint.load(two.checkpoints / "step_00000030")["engine"]["buffers"]
    assert not same_bits(*own)
    for name, buffer in engine.module.named_buffers():
        mean = (own[0][name] + own[1][name]) / 2 if buffer.is_floating_point() else own[0][name]
        assert torch.equal(buffer, mean)


# --- the parts, in this process ----------------------------------------------------------------------------------------------


def bn_engine(**config: Any) -> Engine:
    return make_engine(one_rank(), build_model("bn_cnn", 0, 10), global_images=8, **config)


@pytest.mark.parametrize(("optimizer", "params"), [("SGD", {"momentum": 0.9}), ("AdamW", {}), ("RMSprop", {"momentum": 0.9})])
def test_an_engine_resumes_from_what_another_saved(tmp_path: Path, optimizer: str, params: dict[str, float]) -> None:
    config = {"optimizer": {"type": optimizer, "params": {"lr": 0.01, **params}}}
    engine, other = bn_engine(**config), bn_engine(**config)
    for step in range(3):
        one_step(engine, [batch(8, seed=step)])
    saved = snapshot(engine)
    checkpoint.save(tmp_path, engine, RunState(step=3, lr_factor=0.5), one_rank(), {}, keep=1)
    one_step(other, [batch(8, seed=9)])
    state = checkpoint.resume(tmp_path, None, other, one_rank(), {})
    assert state == RunState(step=3, lr_factor=0.5, resumed_at_steps=[3])
    assert same_bits(snapshot(other), saved)
    for each in (engine, other):
        one_step(each, [batch(8, seed=3)], 0.3)
    assert same_bits(snapshot(other), snapshot(engine))


def test_a_folder_without_a_checkpoint_starts_from_nothing(tmp_path: Path) -> None:
    engine = bn_engine()
    before = snapshot(engine)
    assert checkpoint.find(tmp_path)[0] is None
    assert checkpoint.resume(tmp_path, None, engine, one_rank(), {}) == RunState()
    assert checkpoint.resume(tmp_path, (tmp_path / "nowhere", "latest"), engine, one_rank(), {}) == RunState()
    assert same_bits(snapshot(engine), before)


def test_a_save_that_was_cut_short_is_not_resumed(tmp_path: Path) -> None:
    """A draft without a name, or a tag without a manifest."""
    engine = bn_engine()
    one_step(engine, [batch(8)])
    checkpoint.save(tmp_path, engine, RunState(step=1), one_rank(), {}, keep=2)
    for leftover in (".draft", "step_00000003"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "state.pt").write_bytes((tmp_path / "step_00000001" / "state.pt").read_bytes())
    assert checkpoint.resume(tmp_path, None, bn_engine(), one_rank(), {}).step == 1
    (tmp_path / "latest").unlink()
    assert checkpoint.find(tmp_path)[0] == "step_00000001"
    assert checkpoint.save(tmp_path, engine, RunState(step=4), one_rank(), {}, keep=9) == ""
    assert not (tmp_path / ".draft").exists()


def test_a_run_can_start_from_another_runs_checkpoint(tmp_path: Path) -> None:
    """With a copy of its best model; its own checkpoint comes first once it has one."""
    engine, other = bn_engine(), bn_engine()
    one_step(engine, [batch(8)])
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    checkpoint.save(theirs, engine, RunState(step=1, best_step=1), one_rank(), {}, keep=2)
    checkpoint.save_portable(theirs / "best_model", engine.portable_state(), {"step": 1})
    assert checkpoint.resume(ours, (theirs, "latest"), other, one_rank(), {}).step == 1
    assert same_bits(snapshot(other), snapshot(engine))
    assert checkpoint.load_portable(ours / "best_model")["step"] == 1
    checkpoint.save(ours, other, RunState(step=2), one_rank(), {}, keep=2)
    assert checkpoint.resume(ours, (theirs, "latest"), other, one_rank(), {}).step == 2
    assert checkpoint.find(theirs)[0] == "step_00000001", "the other run is unchanged"


def test_a_best_model_later_than_the_start_is_not_copied(tmp_path: Path) -> None:
    engine = bn_engine()
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    state = RunState(step=1, best_step=1, best_accuracy=0.25)
    checkpoint.save(theirs, engine, state, one_rank(), {}, keep=1, pointers=["epoch_001"])
    checkpoint.save_portable(theirs / "best_model", engine.portable_state(), {"step": 2})
    resumed = checkpoint.resume(ours, (theirs, "epoch_001"), bn_engine(), one_rank(), {})
    assert (resumed.step, resumed.best_step, resumed.best_accuracy) == (1, -1, -1)
    assert not (ours / "best_model").exists()


def test_a_tag_that_a_pointer_names_is_never_pruned(tmp_path: Path) -> None:
    engine = bn_engine()
    for step in range(1, 6):
        names = {1: ["best"], 2: ["epoch_001"], 4: ["best"]}.get(step, [])
        checkpoint.save(tmp_path, engine, RunState(step=step), one_rank(), {}, keep=1, pointers=names)
    assert tags(tmp_path) == ["step_00000002", "step_00000004", "step_00000005"], "the former best is pruned"
    found = {name: checkpoint.find(tmp_path, name)[0] for name in ("latest", "best", "epoch_001", "epoch_002")}
    assert found == {"latest": tags(tmp_path)[2], "best": tags(tmp_path)[1], "epoch_001": tags(tmp_path)[0], "epoch_002": None}
