"""The program on GPUs that compute nothing (see stand_in.py): what it asks of a GPU, and that it runs to its end."""

import json
import os
from pathlib import Path

import pytest

from tests.stand_in import StandIn

# The most that a case may cost: launches, nodes of graphs and waits of the host in a step, launches of the loader for a step.
FAST = {"bn_cnn eager": (76, 0, 0, 2.1), "bn_cnn graph": (34, 46, 0, 2.1), "bn_cnn captured": (6, 74, 0, 2.1)}
SLOW = {  # under ZeRO with room for what DeepSpeed does after a step that it skips, as garbage makes it
    "bn_cnn_fast eager --precision bf16": (202, 0, 0, 13.7),
    "bn_cnn_fast graph --precision bf16": (144, 64, 0, 13.7),
    "bn_cnn_fast captured --precision bf16": (8, 200, 0, 13.7),
    "speedrun94 eager": (281, 0, 0, 22.3),
    "speedrun94 graph": (171, 114, 0, 22.3),
    "speedrun94 captured": (8, 279, 0, 22.3),
    "bn_cnn eager --set zero_optimization.stage=1": (177, 0, 5, 2.1),
    "bn_cnn eager --set zero_optimization.stage=2": (177, 0, 5, 2.1),
    "bn_cnn eager --set zero_optimization.stage=3": (177, 0, 5, 2.1),
    "bn_cnn graph --set zero_optimization.stage=1": (139, 48, 5, 2.1),
    "bn_cnn graph --set zero_optimization.stage=2": (139, 48, 5, 2.1),
    "bn_cnn_document captured": (6, 72, 0, 1.1),
    "lenet graph": (31, 37, 0, 0.1),
    "mnist_synthetic graph --dataset synthetic_mnist": (44, 46, 0, 1.1),
    "speedrun94_cpu captured": (8, 279, 0, 21.1),
    "speedrun96 captured": (8, 382, 0, 28.5),
    "speedrun81_cpu captured": (8, 324, 0, 13.7),
    "slurm_zero2 graph --micro-batch-size 128": (139, 67, 5, 4.3),
    "bn_cnn captured --augment 'RandomCrop(3) RandomHorizontalFlip MixUp(0.2)'": (6, 75, 0, 11.4),
}


def check(python: StandIn, most: dict[str, tuple[float, float, float, float]]) -> None:
    """Count all cases in one process; none is over its limits, breaks a rule of CUDA, or lets the loader wait."""
    ended = python("tests/workers/gpu_counts.py", *most, FAKE_QUIET="1")
    assert ended.returncode == 0, ended.stderr[-2000:]
    counts = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert [one["case"] for one in counts] == list(most)
    for one in counts:
        assert not one.get("failed")
        assert not one["broken"]
        assert one["loader"]["waits"] == 0
        nodes = max(0, one["nodes"] - (most is not FAST))  # after other cases one more, at times: why is not known
        counted = one["launches"], nodes, one["waits"], one["loader"]["launches"]
        assert all(number <= limit for number, limit in zip(counted, most[one["case"]], strict=True)), one


@pytest.mark.slow
def test_a_step_of_each_level_costs_no_more_and_never_waits() -> None:
    check(StandIn.or_skip(), FAST)


@pytest.mark.slow
def test_every_recipe_and_zero_stage_costs_no_more() -> None:
    check(StandIn.or_skip(), SLOW)


@pytest.mark.slow
def test_the_lowest_torch_costs_no_more() -> None:
    """With CIFAR10_TESTS_TORCH_211, the Python of an environment that has torch 2.11."""
    if "CIFAR10_TESTS_TORCH_211" not in os.environ:
        pytest.skip("CIFAR10_TESTS_TORCH_211 names no Python with torch 2.11")
    check(StandIn.or_skip(os.environ["CIFAR10_TESTS_TORCH_211"]), {**FAST, **SLOW})


@pytest.mark.slow
def test_gpu_check_goes_on_after_a_stage_that_fails(tmp_path: Path) -> None:
    """The stand-in computes nothing, so what compares its values with the CPU's fails."""
    ended = StandIn.or_skip()(
        "-m", "cifar10", "gpu-check", "--short", "--output-dir", str(tmp_path), "--only", "compare", "eager"
    )
    assert ended.returncode == 1, ended.stderr
    of = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("compare", "eager")}
    assert (of["compare"]["ended"], of["compare"]["found"]["bn_cnn logits agree"]) == ("failed (1)", False)
    assert (of["eager"]["ended"], of["eager"]["found"]["status"]) == ("ok", "finished")
    assert "compare: failed (1) after" in ended.stdout
