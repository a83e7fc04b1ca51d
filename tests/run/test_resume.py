"""An engine resumes from a checkpoint as if it was never interrupted: bit for bit in the same world, else closely.

The engines are those of tests/workers/resumes.py.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import WORKERS, launch
from tests.workers.resumes import CASES, MEMORY, MORE_STEPS, OPTIMIZERS, WORLDS, sources

pytestmark = pytest.mark.slow


@functools.cache
def _launched() -> dict[str, list[dict[Any, Any]]] | AssertionError:
    with tempfile.TemporaryDirectory() as folder:
        try:
            launch(1, WORKERS / "resumes.py", folder)
        except AssertionError as error:
            return error
        names = [f"{what}_{num_ranks}" for what in ("saves", "resumes") for num_ranks in WORLDS]
        return {name: [torch.load(path) for path in sorted(Path(folder).glob(f"{name}.rank_*.pt"))] for name in names}


def ranks_of(what: str, num_ranks: int) -> list[dict[Any, Any]]:
    """What each rank of one of the worlds has measured: launched once for all tests."""
    worlds = _launched()
    if isinstance(worlds, AssertionError):
        raise worlds
    assert len(worlds[f"{what}_{num_ranks}"]) == num_ranks
    return worlds[f"{what}_{num_ranks}"]


CELLS = [(name, stage, num_ranks) for name, case in CASES.items() for stage in case.stages for num_ranks in case.worlds]
PAIRS = [
    (name, stage, num_ranks, source)
    for name, stage, num_ranks in CELLS
    for source in sources(CASES[name], num_ranks, stage)
    if source != (num_ranks, stage)
]
SMOOTH_PAIRS = [pair for pair in PAIRS if CASES[pair[0]].smooth]
BUFFER_PAIRS = [pair for pair in PAIRS if pair[0] == "buffers"]
LARGEST_ERROR = {"fp32": 1e-6, "bf16": 5e-3, "fp16": 1e-3}  # of a loss near 2; of fp32, absolute


@pytest.mark.parametrize(("name", "stage", "num_ranks"), CELLS)
def test_an_engine_resumes_bit_for_bit(name: str, stage: int, num_ranks: int) -> None:
    """All of it: weights, optimizer, buffers, loss scale, scheduler, counters."""
    has_scheduler = "scheduler" in CASES[name].config
    for save, resumed in zip(ranks_of("saves", num_ranks), ranks_of("resumes", num_ranks), strict=True):
        whole, again = save[name, stage], resumed[name, stage, (num_ranks, stage)]
        for part, fingerprint in whole["saved"]["state"].items():
            if part != "groups" or has_scheduler:  # without one, the learning rate is set anew at each step
                assert again["loaded"]["state"][part] == fingerprint, part
        assert again["loaded"]["buffers"].keys() == whole["saved"]["buffers"].keys()
        for buffer, own in whole["saved"]["buffers"].items():
            assert torch.equal(again["loaded"]["buffers"][buffer], own)
        for what in ("losses", "lrs", "norms", "scales", "skipped"):
            assert len(whole[what]) == MORE_STEPS
            assert again[what] == whole[what], what
        assert again["end"]["state"] == whole["end"]["state"]
        assert again["end"]["weights"] == whole["end"]["weights"] != whole["saved"]["weights"], "it went on learning"


@pytest.mark.parametrize(("name", "stage", "num_ranks", "source"), SMOOTH_PAIRS)
def test_an_engine_resumes_in_another_world(name: str, stage: int, num_ranks: int, source: tuple[int, int]) -> None:
    """Another number of ranks, another ZeRO stage: the same weights and optimizer state, and nearly the same losses."""
    their_ranks, their_stage = source
    theirs = ranks_of("saves", their_ranks)[0][name, their_stage]
    for rank in ranks_of("resumes", num_ranks):
        ours = rank[name, stage, source]
        assert ours["loaded"]["weights"] == theirs["saved"]["weights"]
        for part in ("parameters", "optimizer", "loss_scale", "counters"):
            assert ours["loaded"]["state"][part] == theirs["saved"]["state"][part], part
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=LARGEST_ERROR[CASES[name].precision])
        for what in ("lrs", "scales", "skipped"):
            assert ours[what] == theirs[what], what


@pytest.mark.parametrize(("name", "stage", "num_ranks", "source"), BUFFER_PAIRS)
def test_buffers_are_each_ranks_own_or_the_mean(name: str, stage: int, num_ranks: int, source: tuple[int, int]) -> None:
    their_ranks, their_stage = source
    theirs = [rank[name, their_stage]["saved"]["buffers"] for rank in ranks_of("saves", their_ranks)]
    if their_ranks > 1:
        assert not torch.equal(theirs[0]["bn.running_mean"], theirs[1]["bn.running_mean"]), "each has its own"
    for number, rank in enumerate(ranks_of("resumes", num_ranks)):
        for buffer, value in rank[name, stage, source]["loaded"]["buffers"].items():
            values = [one[buffer] for one in theirs]
            mean = torch.stack(values).mean(dim=0) if values[0].is_floating_point() else values[0]
            assert torch.equal(value, values[number] if num_ranks == their_ranks else mean), buffer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_learning_rate_reaches_every_optimizer_under_zero(name: str) -> None:
    """It moves at every step, and the losses of ZeRO 2 are those of ZeRO 0."""
    plain, zero = (ranks_of("saves", 1)[0][name, stage] for stage in (0, 2))
    assert zero["losses"] == pytest.approx(plain["losses"], abs=1e-5)


@pytest.mark.parametrize("num_ranks", WORLDS)
@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name, case in MEMORY.items() for stage in case.stages if stage])
def test_offloading_and_thresholds_change_no_result(num_ranks: int, name: str, stage: int) -> None:
    """The losses and the true gradient norms are those of ZeRO 0, to an ulp or two: norms are summed in another order, and
    clipping multiplies by them. A step that is not finite on one rank is skipped on all."""
    plain = ranks_of("saves", num_ranks)[0]["clipped", 0]
    assert min(plain["norms"]) > 2 * 0.2, "clipping had something to do"
    for rank in ranks_of("saves", num_ranks):
        ours = rank[name, stage]
        assert ours["before"]["skipped"] == [0, 1, 0]
        assert ours["losses"] == pytest.approx(plain["losses"], abs=5e-7)  # measured: at most 2.4e-7
        assert ours["norms"] == pytest.approx(plain["norms"], rel=5e-7)


def test_the_loss_scales_have_moved() -> None:
    """The comparisons above need it: a scale that has grown, one that is about to, and one that has overflowed."""
    for num_ranks in WORLDS:
        for stage in (0, 2):
            saves = ranks_of("saves", num_ranks)[0]
            assert [saves[f"fp16, growing, {at}", stage]["saved"]["scale"] for at in (3, 4)] == [
                {"scale": 2.0**9, "_growth_tracker": 1},
                {"scale": 2.0**10, "_growth_tracker": 0},
            ]
            overflown = saves["fp16, overflown", stage]
            assert 1 in overflown["before"]["skipped"]
            assert 0 in overflown["skipped"]
            assert overflown["saved"]["scale"]["scale"] < 2.0**24
