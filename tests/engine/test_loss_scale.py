"""fp16's loss scale: when it halves, when it doubles, and how the config sets it."""

import pytest
import torch

from cifar10.engine.loss_scale import LossScale


def scales(scale: LossScale, steps: str) -> list[float]:
    """The scale that each step's backward uses; `.` is a good step, `x` one that overflows."""
    used = []
    for step in steps:
        used.append(scale.scale_loss(torch.ones(())).item())
        scale.update_scale(step == "x")
    return used


@pytest.mark.parametrize(
    ("fp16", "scale", "window"),
    [
        ({}, 2**16, 1000),
        ({"initial_scale_power": 4, "loss_scale_window": 7}, 16, 7),
        ({"initial_scale_power": 0}, 1, 1000),
        ({"loss_scale": 0, "initial_scale_power": 4}, 16, 1000),  # 0 means dynamic
        ({"loss_scale": 128, "initial_scale_power": 4, "loss_scale_window": 1}, 128, float("inf")),
        ({"hysteresis": 5, "min_loss_scale": 1024, "initial_scale_power": 4}, 16, 1000),
    ],
)
def test_the_scale_of_an_fp16_section(fp16, scale, window):
    found = LossScale.from_json(fp16)
    assert (found.cur_scale, found.loss_scale, found.window, found.good_steps) == (scale, scale, window, 0)


@pytest.mark.parametrize(
    ("steps", "due"),
    [
        (".......", [8, 8, 8, 16, 16, 16, 32]),  # doubled after three good steps in a row
        ("x.x.", [8, 4, 4, 2]),
        ("xxxxx", [8, 4, 2, 1, 0.5]),  # there is no minimum
        ("..x....", [8, 8, 8, 4, 4, 4, 8]),  # a bad step resets the count
        ("...x...", [8, 8, 8, 16, 8, 8, 8]),
    ],
)
def test_a_bad_step_halves_the_scale_and_three_good_ones_double_it_unless_it_is_static(steps, due):
    assert scales(LossScale(8.0, window=3), steps) == due
    static = scales(LossScale.from_json({"loss_scale": 8}), steps)
    assert static == [8 / 2 ** steps[:number].count("x") for number in range(len(steps))]


def test_all_micro_batches_of_a_step_and_its_update_have_one_scale():
    """DeepSpeed unscales by `loss_scale` after update_scale: a scale that had doubled there would halve the update."""
    scale = LossScale(8.0, window=2)
    for step in range(20):
        due = 8 * 2 ** (step // 2)
        assert [scale.scale_loss(torch.tensor(3.0)).item() for _ in range(4)] == [3 * due] * 4
        scale.update_scale(False)
        assert scale.loss_scale == due
