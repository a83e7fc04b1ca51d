"""when the scale halves, when it doubles, and what an fp16 section asks for."""

from __future__ import annotations

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
        ({"enabled": True}, 2**16, 1000),
        ({"initial_scale_power": 4, "loss_scale_window": 7}, 16, 7),
        ({"initial_scale_power": 0}, 1, 1000),
        ({"loss_scale": 0, "initial_scale_power": 4}, 16, 1000),  # DeepSpeed's 0 means: a dynamic one
        ({"loss_scale": 128}, 128, float("inf")),
        ({"loss_scale": 128, "initial_scale_power": 4, "loss_scale_window": 1}, 128, float("inf")),
        ({"hysteresis": 5, "min_loss_scale": 1024, "initial_scale_power": 4}, 16, 1000),
    ],
)
def test_what_an_fp16_section_asks_for(fp16, scale, window):
    found = LossScale.from_json(fp16)
    assert (found.cur_scale, found.loss_scale, found.window, found.good_steps) == (scale, scale, window, 0)


@pytest.mark.parametrize(
    ("steps", "due"),
    [
        (".......", [8, 8, 8, 16, 16, 16, 32]),  # doubled after three good steps in a row
        ("x.x.", [8, 4, 4, 2]),
        ("xxxxx", [8, 4, 2, 1, 0.5]),  # there is no smallest one
        ("..x....", [8, 8, 8, 4, 4, 4, 8]),  # a bad step starts the count anew
        ("...x...", [8, 8, 8, 16, 8, 8, 8]),
    ],
)
def test_a_bad_step_halves_the_scale_and_three_good_ones_double_it(steps, due):
    assert scales(LossScale(8.0, window=3), steps) == due


def test_a_static_scale_halves_and_never_doubles():
    assert scales(LossScale.from_json({"loss_scale": 8}), "." * 50 + "x." + "." * 50) == [8] * 51 + [4] * 51


def test_the_scale_does_not_move_between_a_steps_backward_and_its_update():
    """DeepSpeed unscales by `loss_scale` after update_scale: a scale that had grown in it would halve the update."""
    scale = LossScale(8.0, window=2)
    for step in range(20):
        used = scale.scale_loss(torch.ones(())).item()
        scale.update_scale(False)
        assert scale.loss_scale == used == 8 * 2 ** (step // 2)


def test_of_the_micro_batches_of_a_step_all_have_one_scale():
    scale = LossScale(8.0, window=1)
    for due in (8, 16, 32):
        assert [scale.scale_loss(torch.tensor(3.0)).item() for _ in range(4)] == [3 * due] * 4
        scale.update_scale(False)


def test_the_scaled_loss_has_the_scaled_gradient():
    weight = torch.tensor(3.0, requires_grad=True)
    LossScale(8.0, window=2).scale_loss(weight * 2).backward()
    assert weight.grad == 16
