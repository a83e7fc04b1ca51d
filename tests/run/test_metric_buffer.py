"""Metrics of steps, summed over ranks; skipped steps are counted and kept out of the means."""

import json
import math
from typing import Any

import pytest
import torch

from cifar10.distributed.world import World
from cifar10.run.metric_buffer import MetricBuffer, Row, TooManySkippedSteps, count_steps
from cifar10.run.state import RunState, Sums
from tests.helpers import two_ranks

CPU = torch.device("cpu")
ALONE = World(rank=0, local_rank=0, size=1, local_size=1, device=CPU, launcher="none")


def write(buffer: MetricBuffer, loss: float, correct: int, grad_norm: float, skipped: float = 0.0) -> None:
    buffer.write(torch.tensor(loss), torch.tensor(correct), torch.tensor(grad_norm), torch.tensor(skipped))


def count(rows: list[Row], state: RunState, images: int = 8, limit: int = 25) -> None:
    count_steps(rows, state, global_images=images, max_skipped_in_a_row=limit)


def test_rows_come_back_once_in_order() -> None:
    buffer = MetricBuffer(3, CPU)
    assert buffer.read(ALONE) == []
    for round_of_use in range(2):
        for step in range(3):
            assert not buffer.is_full
            write(buffer, 0.5 + step, round_of_use + step, 2.0 * step)
        assert buffer.is_full
        assert buffer.read(ALONE) == [(0.5 + step, round_of_use + step, 2.0 * step, False) for step in range(3)]
        assert buffer.read(ALONE) == []
    write(buffer, 1.0, 1, 1.0)
    assert buffer.read(ALONE) == [(1.0, 1, 1.0, False)], "nothing from the rounds before"


def test_written_values_are_copied() -> None:
    buffer, norm = MetricBuffer(2, CPU), torch.tensor(3.0)
    buffer.write(torch.tensor(1.0), torch.tensor(4), norm, torch.tensor(0.0))
    norm.fill_(7.0)
    assert buffer.read(ALONE)[0][2] == 3.0


def test_correct_images_are_counted_exactly() -> None:
    """Even where a float32 sum over an epoch of large batches would lose the last digit."""
    state, batches = RunState(), [65_521, 65_519, 3] * 200
    buffer = MetricBuffer(len(batches), CPU)
    for correct in batches:
        write(buffer, 1.0, correct, 1.0)
    count(buffer.read(ALONE), state, images=65_536)
    assert sum(batches) > 2**24
    assert state.epoch_sums.correct == state.interval_sums.correct == sum(batches)
    assert state.epoch_sums.images == state.trained_images == 65_536 * len(batches)


def test_skipped_steps_are_counted_and_kept_out_of_the_means() -> None:
    buffer, state = MetricBuffer(8, CPU), RunState()
    write(buffer, 1.0, 2, 3.0)
    write(buffer, math.nan, 0, math.nan, skipped=1.0)
    write(buffer, math.inf, 5, math.inf, skipped=1.0)
    write(buffer, 2.0, 4, 5.0)
    write(buffer, 9.0, 8, math.inf, skipped=1.0)
    rows = buffer.read(ALONE)
    assert [(correct, skipped) for _, correct, _, skipped in rows] == [(2, False), (0, True), (0, True), (4, False), (0, True)]
    count(rows, state)
    for sums in (state.interval_sums, state.epoch_sums):
        assert (sums.steps, sums.images, sums.skipped) == (2, 16, 3)
        assert (sums.mean_loss, sums.mean_grad_norm, sums.accuracy) == (1.5, 4.0, 6 / 16)
    assert (state.skipped_steps, state.skipped_in_a_row) == (3, 1)


BAD, GOOD = (math.nan, 0, math.nan, True), (1.0, 1, 1.0, False)


def test_too_many_skipped_steps_in_a_row_end_the_run() -> None:
    """Counted across reads; an applied step resets the count."""
    state = RunState(step=75)
    count([BAD] * 24 + [GOOD] + [BAD] * 24, state)
    assert (state.skipped_steps, state.skipped_in_a_row) == (48, 24)
    with pytest.raises(TooManySkippedSteps, match=r"25 steps in a row, by step 75, .*--lr"):
        count([BAD, GOOD], state)
    count([GOOD], state)
    assert state.skipped_in_a_row == 0
    with pytest.raises(TooManySkippedSteps):
        count([GOOD, BAD, BAD, BAD, GOOD], RunState(), limit=3)


def test_ranks_are_summed() -> None:
    """Losses are averaged, correct images added; the norm is global already; all ranks get the same state."""
    ranks: list[dict[str, Any]] = two_ranks()
    for rank in ranks:
        assert len(rank["rows"]) == 4
        applied = [rank["rows"][step] for step in (0, 2, 3)]
        assert applied == [(1.5, 30, 0.25, False), (3.5, 34, 0.75, False), (4.5, 36, 1.0, False)]
        assert rank["rows"][1][1:] == (0, 0.5, True)
        assert rank["rows read again"] == []
    assert ranks[0]["state"] == ranks[1]["state"]
    state = RunState.from_dict(ranks[0]["state"])
    assert (state.epoch_sums.correct, state.epoch_sums.images, state.skipped_steps) == (100, 192, 1)
    assert state.epoch_sums.mean_loss == pytest.approx(9.5 / 3)


def test_a_state_comes_back_from_json_as_it_was() -> None:
    state = RunState(step=7, epoch=1, resumed_at_steps=[3], lr_factor=0.1)
    count([BAD, GOOD, GOOD], state)
    state.last_epoch_sums = Sums(steps=3, images=24, loss=1.25, correct=7, grad_norm=2.5, skipped=1)
    assert RunState.from_dict(json.loads(json.dumps(state.as_dict()))) == state
