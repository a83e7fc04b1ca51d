"""The JSONs of DeepSpeedExamples' CIFAR example, and those with its offloading, train as they are."""

import csv
import json
from typing import Any

import pytest
import torch

from cifar10.config import ds_check, ds_config
from cifar10_deepspeed import CIFAR10CNNEnhanced
from tests.helpers import WORKERS, batch, launch, make_engine, one_rank, one_step


def example(dtype: str, stage: int, **zero: Any) -> dict[str, Any]:
    """What get_ds_config in training/cifar/cifar10_deepspeed.py returns."""
    betas = {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}
    fp16 = {"enabled": dtype == "fp16", "fp16_master_weights_and_grads": False, "loss_scale": 0, "loss_scale_window": 500}
    fp16 |= {"hysteresis": 2, "min_loss_scale": 1, "initial_scale_power": 15}
    partitions = {"stage": stage, "allgather_partitions": True, "reduce_scatter": True, "allgather_bucket_size": 50_000_000}
    partitions |= {"reduce_bucket_size": 50_000_000, "overlap_comm": True, "contiguous_gradients": True, "cpu_offload": False}
    return {
        "train_batch_size": 16,
        "steps_per_print": 2000,
        "optimizer": {"type": "Adam", "params": betas},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000},
        },
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": fp16,
        "wall_clock_breakdown": False,
        "zero_optimization": {**partitions, **zero},
    }


def train(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two steps as this JSON says -> the notes on it."""
    monkeypatch.setattr("deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED", False)  # and put back afterwards
    ds_check.check(given)
    notes = ds_config.resolve(given, 1)[2]
    sizes = {"global_images": given.pop("train_batch_size")}
    engine = make_engine(one_rank(), CIFAR10CNNEnhanced(), **sizes, **given)
    for _ in range(2):
        assert torch.isfinite(one_step(engine, [batch(16)]))
    assert engine.grad_norm > 0
    assert engine.deepspeed.global_steps == 2
    return notes


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_example_trains(dtype: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = train(example(dtype, stage), monkeypatch)
    assert not any("prescale" in note or "offload" in note for note in notes)


def test_the_example_in_fp16_is_resolved_to_autocast() -> None:
    given = example("fp16", 2)
    ds_check.check(given)
    config, _, _ = ds_config.resolve(given, 1)
    assert config["torch_autocast"] == {"enabled": True, "dtype": "float16"}
    assert config["fp16"]["initial_scale_power"] == 15


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("old", [True, False])
def test_the_optimizer_is_offloaded(stage: int, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the old spelling and in the new one."""
    zero = {"cpu_offload": True} if old else {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    notes = train(example("fp32", stage, **zero), monkeypatch)
    assert any("cpu_offload is deprecated" in note for note in notes) == old


# --- the program, with --deepspeed_config FILE -------------------------------------------------------------------------

FEW = "--recipe lenet --dataset synthetic --max-steps 3 --log-every-steps 1 --val-images 0 --test-images 0 --threads 1".split()
CELLS = [(dtype, 0, 1) for dtype in ("fp32", "bf16", "fp16")]
CELLS += [(dtype, stage, 2) for dtype in ("fp32", "bf16") for stage in range(4)] + [("fp16", stage, 2) for stage in (0, 2)]
LARGEST_ERROR = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-3}  # of a loss near 2.3, relative to that of ZeRO 0 on one rank


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], list[dict[str, str]]]:
    """steps.csv of three steps of every JSON on every number of ranks."""
    base, starts, folders = tmp_path_factory.mktemp("examples"), [], {}
    for dtype, stage, ranks in CELLS:
        config = base / f"{dtype}_{stage}.json"
        config.write_text(json.dumps(example(dtype, stage)))
        folders[dtype, stage, ranks] = folder = base / f"{dtype}_{stage}_{ranks}"
        flags = [*FEW, "--deepspeed_config", str(config), "--output-dir", str(folder)]
        starts.append({"ranks": ranks, "flags": flags, "keep_summary": str(base / "nobody reads it.json")})
    (base / "starts.json").write_text(json.dumps(starts))
    launch(1, WORKERS / "small_runs.py", str(base / "starts.json"))
    return {cell: list(csv.DictReader((folder / "steps.csv").open(newline=""))) for cell, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_examples_json_trains_in_the_program_as_it_is(rows: Any, cell: tuple[str, int, int]) -> None:
    """At every stage and on two ranks the same losses and gradient norms; its WarmupLR sets the learning rate."""
    dtype, _, _ = cell
    ours, plain = rows[cell], rows[dtype, 0, 1]
    assert [row["step"] for row in ours] == ["1", "2", "3"]
    assert [float(row["lr"]) for row in ours] == [float(row["lr"]) for row in plain]
    assert 0 <= float(ours[0]["lr"]) < float(ours[2]["lr"]) < 0.001
    for column, bound in (("loss", LARGEST_ERROR[dtype]), ("grad_norm", 10 * LARGEST_ERROR[dtype])):
        assert [float(row[column]) for row in ours] == pytest.approx([float(row[column]) for row in plain], rel=bound)
    assert sum(int(row["skipped"]) for row in ours) == 0
