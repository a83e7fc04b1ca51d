"""Every precision x ZeRO stage x accumulation x ranks trains; fp16's loss scale follows one rule at every stage.

tests/workers/matrix.py is launched once for each number of ranks: about 100 seconds of CPU together.
"""

from statistics import fmean
from typing import Any

import pytest

from tests.helpers import largest_difference, measured
from tests.workers.matrix import DTYPES, NORMS_AT, STAGES, STEPS

pytestmark = pytest.mark.slow

NUM_RANKS = (1, 2)
CELLS = [(precision, stage, accumulation) for precision in DTYPES for stage in STAGES for accumulation in (1, 2)]
# Of the gradient norm, relative. bf16 rounds each number by up to 3.9e-3, and CPUs add in different orders: 7.2e-5 to 1.2e-4.
LARGEST_ERROR = {"fp32": 1e-5, "bf16": 2e-4, "fp16": 1e-4}


def matrix(num_ranks: int) -> list[dict[str, Any]]:
    return measured("matrix.py", num_ranks)


# --- training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize(("precision", "stage", "accumulation"), CELLS)
def test_a_cell_memorizes_its_two_batches(num_ranks: int, precision: str, stage: int, accumulation: int) -> None:
    """As fp32 without ZeRO: the loss falls from 2.35 to 0.55 in 12 steps, none of which is skipped."""
    ranks = matrix(num_ranks)
    cell, plain = (ranks[0]["cells"][key, at, accumulation] for key, at in ((precision, stage), ("fp32", 0)))
    assert len(cell["losses"]) == STEPS
    assert cell["skipped"] == 0
    assert fmean(cell["losses"][:2]) - fmean(cell["losses"][-2:]) > 1.5
    assert cell["losses"][:2] == pytest.approx(plain["losses"][:2], rel=0.01)
    assert fmean(cell["losses"][-2:]) == pytest.approx(fmean(plain["losses"][-2:]), rel=0.1)
    assert len({rank["cells"][precision, stage, accumulation]["weights"] for rank in ranks}) == 1, "the same on every rank"


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize(("precision", "stage", "accumulation"), CELLS)
def test_a_cells_gradient_norm_is_autograds_own(num_ranks: int, precision: str, stage: int, accumulation: int) -> None:
    """Of the global batch, before clipping, whatever the loss scale."""
    for rank in matrix(num_ranks):
        cell = rank["cells"][precision, stage, accumulation]
        assert len(cell["norms"]) == len(NORMS_AT)
        assert min(cell["true norms"]) > 2, "clipping at 1 had something to do"
        assert cell["norms"] == pytest.approx(cell["true norms"], rel=LARGEST_ERROR[precision])


def test_a_cell_has_weights_of_its_own() -> None:
    """Precision, accumulation and the number of ranks each make a difference."""
    keys = [(precision, 0, accumulation) for precision in DTYPES for accumulation in (1, 2)]
    prints = {num_ranks: [matrix(num_ranks)[0]["cells"][key]["weights"] for key in keys] for num_ranks in NUM_RANKS}
    assert [len(set(prints[num_ranks])) for num_ranks in NUM_RANKS] == [6, 6]
    assert prints[1][0] != prints[2][0]


# --- the loss scale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_overflows_is_skipped_and_halves_the_scale(num_ranks: int, stage: int) -> None:
    """Also one that overflows on one rank alone; the weights stay, and training continues."""
    ranks = matrix(num_ranks)
    steps = ranks[0]["overflows"][stage]
    skipped = [bool(step["skipped"]) for step in steps]
    halved = 2.0**24
    for step in steps:
        assert step["scale"] == halved
        assert (step["moved"] == 0) == bool(step["skipped"])
        halved /= 2 if step["skipped"] else 1
    fits = skipped.index(False)
    assert fits >= 2, "the scale was too large by itself"
    assert skipped[fits + 1], "the infinite loss"
    assert not skipped[-1]
    for rank in ranks:
        assert [step["weights"] for step in rank["overflows"][stage]] == [step["weights"] for step in steps]


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_scale_that_grows_leaves_the_update_as_it_is(num_ranks: int, stage: int) -> None:
    """It doubles between steps, never between a step's backward and its update."""
    for rank in matrix(num_ranks):
        growing, fixed = rank["growing scale"][stage], rank["fixed scale"][stage]
        assert growing["scale"] == [256, 256, 512, 512, 1024, 1024, 2048]
        assert fixed["scale"] == [256] * 7
        assert growing["skipped"] == fixed["skipped"] == [0] * 7
        assert min(fixed["moved"]) > 1e-3
        assert growing["moved"] == pytest.approx(fixed["moved"], rel=1e-2)
        assert largest_difference(growing["weights"], fixed["weights"]) < 1e-2 * min(fixed["moved"])
