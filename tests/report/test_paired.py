"""Paired differences: how often the test is wrong, what it finds within how many pairs, and what it says of real files."""

import math

import numpy as np
import pytest

from cifar10.report.paired import ERROR_RATE, Differences, half_width, log_evidence

SD = 0.003  # of the records' test accuracies over seeds: 0.14 to 0.94 points, of most 0.3


def planted(difference: float, comparisons: int, pairs: int, seed: int = 0) -> np.ndarray:
    """Differences of independent runs that count right answers among 5,000 images: [comparisons, pairs]."""
    a, b = np.random.default_rng(seed).normal([[[0.82]], [[0.82 + difference]]], SD, (2, comparisons, pairs))
    return (np.round(b * 5000) - np.round(a * 5000)) / 5000


def decided(values: np.ndarray, error_rate: float = ERROR_RATE) -> np.ndarray:
    return log_evidence(values) >= -math.log(error_rate)


def test_at_most_5_percent_of_comparisons_of_equals_find_a_winner_however_often_one_looks():
    assert decided(planted(0.0, 1_000, 200)).any(-1).mean() <= ERROR_RATE


def test_0_3_points_are_found_within_32_pairs_in_80_percent_and_the_better_one_wins():
    values = planted(0.003, 1_000, 32)
    assert decided(values).any(-1).mean() >= 0.78  # of 1,000; 80% to two standard errors
    winners = [Differences(tuple(row), ERROR_RATE) for row in values]
    wrong = [found for found in winners if found.decided_after and not found.b_is_better]
    assert len(wrong) <= 0.01 * len(winners)


def test_the_interval_excludes_what_the_test_rejects_and_nothing_else():
    rng = np.random.default_rng(1)
    for n in (5, 8, 20, 60):
        values = rng.normal(0.002, 0.003, n)
        low, high = Differences(tuple(values), ERROR_RATE).interval()
        for mean, outside in ((low, True), (high, True), ((low + high) / 2, False)):
            for nudge in (-1e-6, 1e-6):
                is_out = outside and (nudge < 0) == (mean == low)
                assert decided(values - mean - nudge)[-1] == is_out


def test_the_interval_holds_the_mean_at_every_pair_at_once_in_95_percent():
    values, missed = planted(0.003, 1_000, 100), 0
    for row in values:
        missed += any(abs(row[:n].mean() - 0.003) > half_width(n, row[:n].std(ddof=1), 0.05) for n in range(2, 101))
    assert missed <= 50


@pytest.mark.parametrize("values", [(0.1, 0.1, 0.1, 0.1), (0.0,) * 50, (), (0.2,)])
def test_few_pairs_or_equal_ones_decide_nothing(values):
    found = Differences(values, ERROR_RATE)
    assert found.decided_after is None
    assert f"n = {len(values)} pair" in found.in_points or not values


def test_a_difference_that_never_varies_is_decided_by_the_fifth_pair():
    assert Differences((0.02,) * 6, ERROR_RATE).decided_after == 5
