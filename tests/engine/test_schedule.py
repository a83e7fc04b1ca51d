"""A scheduler of DeepSpeed's JSON is tried out before training: its course in a line, or the step at which it would fail."""

from typing import Any

import pytest

from cifar10 import UsageError
from cifar10.engine import schedule
from tests.engine.test_engine import CIFAR10CNNEnhanced
from tests.helpers import batch, make_engine, one_rank, one_step

KINDS: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_max_lr": 0.05, "warmup_num_steps": 4},
    "WarmupDecayLR": {"warmup_max_lr": 0.05, "warmup_num_steps": 2, "total_num_steps": 5},
    "WarmupCosineLR": {"warmup_num_steps": 2, "total_num_steps": 8},
    "OneCycle": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 4},
    "LRRangeTest": {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 9},
    "CosineAnnealingLR": {"T_max": 8},
    "StepLR": {"step_size": 2, "gamma": 0.1},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
}


@pytest.mark.parametrize("name", KINDS)
def test_the_rates_are_those_of_the_steps(name):
    engine = make_engine(one_rank(), CIFAR10CNNEnhanced(), global_images=4, scheduler={"type": name, "params": KINDS[name]})
    told, taken = schedule.learning_rates(engine.deepspeed, 8), []
    for _ in range(8):
        taken.append(engine.lr)
        one_step(engine, [batch(4)])
    assert told == pytest.approx(taken)


def test_a_scheduler_that_fails_on_the_way_is_refused():
    params = {"max_lr": 0.1, "total_steps": 5}
    engine = make_engine(one_rank(), CIFAR10CNNEnhanced(), global_images=4, scheduler={"type": "OneCycleLR", "params": params})
    with pytest.raises(UsageError, match="OneCycleLR fails at step 6 of 8"):
        schedule.learning_rates(engine.deepspeed, 8)


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ([0.1, 0.2, 0.1], "0.1 at step 1, 0.2 at step 2, the highest, 0.1 at the last of 3 steps"),
        ([0.1, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], "below a thousandth of the highest from step 3 on"),
        ([*[0.1] * 95, *[0.0] * 5], "0 at the last of 100 steps"),
    ],
)
def test_the_course_of_a_learning_rate_in_a_line(rates, told):
    assert schedule.describe("X", rates).endswith(told)
