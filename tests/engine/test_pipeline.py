"""Pipelines train as the network without stages does, bit for bit, and resume from each other's checkpoints.

Whole runs of 1 to 4 real ranks, on images of 16x16.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from cifar10 import UsageError
from cifar10.engine.pipeline import check_layers
from cifar10.models.bn_cnn import bn_cnn
from cifar10.models.vgg import vgg11
from cifar10.plan import Plan, make_plan
from cifar10.run import checkpoint
from tests.helpers import WORKERS, launch, same_bits
from tests.launching import run, summary

SMALL = "--recipe vgg_pipeline --dataset synthetic --resize 16 --threads 1 --device cpu --no-report --no-tensorboard"
STEPS, STOP_AT = 6, 4  # of 30 in an epoch
WHOLE = f"--val-images 120 --global-batch-size 16 --set gradient_accumulation_steps=2 --log-every-steps 1 --max-steps {STEPS}"
VARIED = f"{WHOLE} --max-steps 3 --val-images 568 --first-sizes 24 --first-epochs 1 --label-smoothing 0.1"
VARIED += " --dropout 0.2 --ema 0.9 --gradient-checkpointing --precision bf16"
STARTS = [  # folder, ranks, stages, flags, and more for small_runs.py
    ("one rank", 1, 1, WHOLE, {}),
    ("2 stages", 2, 2, WHOLE, {"stop_after": STOP_AT}),
    ("one rank from 2 stages", 1, 1, f"{WHOLE} --resume {{base}}/2_stages", {}),
    ("2 stages", 2, 2, WHOLE, {}),
    ("two ranks", 2, 1, WHOLE, {}),
    ("2 stages of 2", 4, 2, WHOLE, {}),
    ("2 stages, ZeRO 1", 2, 2, f"{WHOLE} --set zero_optimization.stage=1 --max-steps 2", {}),
    ("2 stages of 2, ZeRO 1", 4, 2, f"{WHOLE} --set zero_optimization.stage=1 --max-steps 6", {}),
    ("one rank, varied", 1, 1, VARIED, {}),
    ("3 stages, varied", 3, 3, VARIED, {}),
    ("one rank, overflowing", 1, 1, f"{WHOLE} --lr 1e30 --max-steps 4", {}),
    ("2 stages, overflowing", 2, 2, f"{WHOLE} --lr 1e30 --max-steps 4", {}),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all runs."""
    base, starts = tmp_path_factory.mktemp("runs"), []
    for number, (name, ranks, stages, flags, more) in enumerate(STARTS):
        folder = str(base / name.replace(" ", "_"))
        words = [*SMALL.split(), *flags.format(base=base).split(), "--pipeline-stages", str(stages), "--output-dir", folder]
        starts.append({"ranks": ranks, "flags": words, "keep_summary": str(base / f"{number}.json"), **more})
    (base / "starts.json").write_text(json.dumps(starts))
    launch(1, WORKERS / "small_runs.py", str(base / "starts.json"))
    return base


def steps(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "steps.csv").open(newline="")))


def assert_equal(ours: Path, theirs: Path) -> None:
    """Bit for bit: every step's loss, accuracy and gradient norm, and the weights; and so the accuracies. More ranks add up
    the losses of evaluation in another order."""
    assert (ours / "steps.csv").read_bytes() == (theirs / "steps.csv").read_bytes()
    mine, other = (list(csv.DictReader((folder / "metrics.csv").open(newline=""))) for folder in (ours, theirs))
    assert [(row["phase"], row["accuracy"]) for row in mine] == [(row["phase"], row["accuracy"]) for row in other]
    assert [float(row["loss"]) for row in mine] == pytest.approx([float(row["loss"]) for row in other], abs=2e-6)
    for key in ("weights_sha256", "test_accuracy", "best_step", "steps", "skipped_steps"):
        assert summary(ours)[key] == summary(theirs)[key], key
    for which in ("best_model", "final"):
        mine, other = (checkpoint.load_portable(folder / "checkpoints" / which)["module"] for folder in (ours, theirs))
        assert list(mine) == list(other)
        assert same_bits(mine, other)


@pytest.mark.slow
def test_two_stages_equal_one_rank_also_when_they_are_stopped_and_resumed_in_mid_epoch(base: Path) -> None:
    """Clipped at 1 by the norm over both stages, which is far above it."""
    assert_equal(base / "2_stages", base / "one_rank")
    assert summary(base / "2_stages")["resumed_at_steps"] == [STOP_AT]
    rows = steps(base / "2_stages")
    assert [int(row["step"]) for row in rows] == [*range(1, STEPS + 1)]
    assert min(float(row["grad_norm"]) for row in rows) > 2


@pytest.mark.slow
def test_a_run_without_stages_continues_from_a_pipelines_checkpoint(base: Path) -> None:
    ours, theirs = base / "one_rank_from_2_stages", base / "one_rank"
    assert summary(ours)["resumed_at_steps"] == [STOP_AT]
    assert summary(ours)["weights_sha256"] == summary(theirs)["weights_sha256"]
    assert steps(ours) == steps(theirs)[STOP_AT:]


@pytest.mark.slow
def test_two_pipelines_of_two_stages_equal_two_ranks(base: Path) -> None:
    assert_equal(base / "2_stages_of_2", base / "two_ranks")
    assert summary(base / "two_ranks")["weights_sha256"] != summary(base / "one_rank")["weights_sha256"]


@pytest.mark.slow
def test_stages_with_zero_1_train_alike(base: Path) -> None:
    """ZeRO adds up the millions of squares of the norm in another order, also without stages: by 2.3e-5, relative."""
    for folder, plain in (("2_stages_of_2,_ZeRO_1", "two_ranks"), ("2_stages,_ZeRO_1", "one_rank")):
        ours, theirs = steps(base / folder), steps(base / plain)
        pairs = list(zip(ours, theirs[: len(ours)], strict=True))
        for key, within in (("loss", {"abs": 1e-5}), ("grad_norm", {"rel": 1e-4})):
            assert all(float(mine[key]) == pytest.approx(float(other[key]), **within) for mine, other in pairs), key


@pytest.mark.slow
def test_three_stages_in_bf16_with_dropout_averaged_weights_checkpointing_and_two_image_sizes(base: Path) -> None:
    assert_equal(base / "3_stages,_varied", base / "one_rank,_varied")


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_on_all_stages(base: Path) -> None:
    ours, theirs = base / "2_stages,_overflowing", base / "one_rank,_overflowing"
    assert summary(ours)["skipped_steps"] == 3
    assert (ours / "steps.csv").read_bytes() == (theirs / "steps.csv").read_bytes()
    assert summary(ours)["weights_sha256"] == summary(theirs)["weights_sha256"]


@pytest.mark.slow
def test_the_documented_command_trains_a_pipeline_on_two_cpu_ranks(tmp_path: Path) -> None:
    command = [sys.executable, *"main.py --num-gpus 2 --recipe vgg_pipeline --pipeline-stages 2".split()]
    more = "--dataset synthetic --resize 16 --max-steps 2 --val-images 0 --test-images 100 --threads 1 --device cpu"
    result = run([*command, *more.split(), "--output-dir", str(tmp_path / "run")])
    assert result.returncode == 0, result.stderr
    assert "2 stages" in result.stdout
    assert summary(tmp_path / "run")["status"] == "finished"


# --- what is refused ------------------------------------------------------------------------------------------------------


def plan(flags: str, ranks: int = 2) -> Plan:
    return make_plan(f"--recipe vgg_pipeline --dataset synthetic --device cpu {flags}".split(), ranks, "main.py")


REFUSED: list[tuple[str, int, str]] = [
    ("--pipeline-stages 2", 3, "--num-gpus 2"),
    ("--pipeline-stages 4", 2, "--pipeline-stages 1"),
    ("--pipeline-stages 0", 2, "--pipeline-stages"),
    ("--pipeline-stages 2 --set zero_optimization.stage=2", 2, "ZeRO stage 2"),
    ("--pipeline-stages 2 --model bn_cnn", 2, "--model vgg11"),
    ("--pipeline-stages 2 --model torchvision:resnet18", 2, "--model vgg11"),
    ("--pipeline-stages 2 --precision fp16", 2, "--precision bf16"),
    ("--pipeline-stages 2 --sync-bn", 2, "--sync-bn"),
    ("--pipeline-stages 2 --engine-level captured", 2, "--engine-level eager"),
    ("--pipeline-stages 2 --set wall_clock_breakdown=true", 2, "wall_clock_breakdown"),
    ("--pipeline-stages 2 --set optimizer.type=MuonWithSGD optimizer.params.weight_decay=auto", 2, "MuonWithSGD"),
    ("--pipeline-stages 2 --set pipeline.stages=2", 2, "--set pipeline.stages"),
    ("--set pipeline.partition=type:Conv", 2, "uniform"),
]


@pytest.mark.parametrize(("flags", "ranks", "named"), REFUSED)
def test_what_stages_cannot_do_is_refused(flags: str, ranks: int, named: str) -> None:
    with pytest.raises(UsageError, match=named) as error:
        plan(flags, ranks)
    assert "\n" not in str(error.value)


def test_ranks_are_divided_among_stages() -> None:
    batch = plan("--pipeline-stages 2 --set gradient_accumulation_steps=4", 4).batch
    assert (batch.data_ranks, batch.micro_images, batch.accumulation) == (2, 16, 4)
    assert plan("--set pipeline.stages=2").batch == plan("--pipeline-stages 2").batch


def test_keys_of_the_json_without_a_meaning_are_left_out_with_a_note() -> None:
    keys = ("grad_partitioned", "pipe_partitioned", "seed_layers", "use_reentrant")
    words = ["pipeline.activation_checkpoint_interval=1", *(f"pipeline.{key}=true" for key in keys)]
    planned = plan(f"--pipeline-stages 2 --set {' '.join(words)}")
    assert planned.ds_config["pipeline"] == {"partition": "uniform", "stages": 2}
    for key in ("activation_checkpoint_interval", *keys):
        assert any(note.startswith(f"pipeline.{key}: left out (") for note in planned.notes), key
    assert any(note.startswith("pipeline: left out (one stage") for note in plan("").notes)
    assert any("mostly wait" in note for note in plan("--pipeline-stages 2 --micro-batch-size 128").notes)


def test_only_a_sequence_of_layers_that_can_all_be_trained_is_divided() -> None:
    def refusal(model: nn.Module, stages: int = 2, **more: Any) -> str:
        with pytest.raises(UsageError) as error:
            check_layers(model, "mine", {"pipeline": {"stages": stages, **more}})
        return str(error.value)

    layer = nn.Linear(4, 4)
    assert "vgg11" in refusal(bn_cnn(10))
    assert "vgg11" in refusal(nn.Sequential(layer, nn.ReLU(), layer))
    assert "fewer stages" in refusal(nn.Sequential(layer, nn.ReLU(), nn.ReLU()), partition="uniform")
    assert "fewer stages" in refusal(nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 4)), stages=3)
    frozen = vgg11()
    frozen[:-1].requires_grad_(False)
    assert "1 of them trained" in refusal(frozen)
    for partition in ("best", "parameters", "uniform"):
        check_layers(vgg11(), "vgg11", {"pipeline": {"stages": 3, "partition": partition}})
    check_layers(bn_cnn(10), "bn_cnn", {})
