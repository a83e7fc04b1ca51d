"""What counts as an improvement, when a plateau is reported, and when a run stops early."""

from typing import Any

import pytest

from cifar10.config.recipe import Recipe
from cifar10.run import patience
from cifar10.run.state import RunState


class Watched:
    """A run of which only the watched loss is known, and the lines that were logged about it."""

    def __init__(self, which: str = "validation", **settings: Any) -> None:
        self.recipe = Recipe(epochs=50, warmup_epochs=5, val_images=1, **settings)
        self.state, self.which = RunState(), which
        self.logged: list[str] = []

    def watch(self, *losses: float) -> None:
        for loss in losses:
            self.logged += patience.watch(self.recipe, self.state, loss, self.which)

    @property
    def is_over(self) -> bool:
        return patience.is_over(self.recipe, self.state)


def test_an_improving_loss_is_not_logged():
    run = Watched()
    run.watch(*(2.0 - 0.01 * epoch for epoch in range(100)))
    assert run.logged == []
    assert run.state.best_loss == pytest.approx(1.01)
    assert not run.is_over


@pytest.mark.parametrize("which", ["validation", "training"])
def test_a_plateau_of_5_epochs_is_logged_and_keeps_the_learning_rate_by_default(which):
    run = Watched(which)
    run.watch(1.0, *[1.0] * 4)
    assert run.logged == []
    run.watch(1.0)
    assert run.logged == [f"plateau: {which} loss has not improved on 1.00000 for 5 epochs"]
    assert run.state.lr_factor == 1
    run.watch(*[1.0] * 4)
    assert len(run.logged) == 1
    run.watch(1.0)
    assert len(run.logged) == 2


def test_a_plateau_multiplies_the_learning_rate_by_the_recipes_factor():
    run = Watched(plateau_lr_factor=0.5, plateau_patience=3)
    run.watch(1.0, *[1.0] * 3)
    assert run.state.lr_factor == 0.5
    assert run.logged[0].endswith("; learning rate x 0.5")
    run.watch(0.5, *[1.0] * 3)
    assert run.state.lr_factor == 0.25


def test_a_run_stops_after_15_epochs_without_improvement():
    run = Watched()
    run.watch(1.0, *[1.0] * 14, 0.9, *[0.95] * 14)
    assert not run.is_over
    assert (run.state.best_loss, run.state.epochs_without_improvement) == (0.9, 14)
    run.watch(0.9)
    assert run.is_over
    assert [line.split(":")[0] for line in run.logged[-2:]] == ["plateau", "stopping early"]


def test_less_than_the_minimum_improvement_does_not_count():
    run = Watched()
    run.watch(1.0, 1.0 - 0.9e-5, 1.0 - 0.99e-5)
    assert run.state.epochs_without_improvement == 2
    assert run.state.best_loss == 1.0  # many small improvements add up to one
    run.watch(1.0 - 1.1e-5)
    assert run.state.epochs_without_improvement == 0


def test_a_loss_that_is_not_finite_is_no_improvement():
    run = Watched()
    run.watch(1.0, float("nan"), float("inf"))
    assert (run.state.best_loss, run.state.epochs_without_improvement) == (1.0, 2)


def test_patience_0_never_stops_a_run():
    run = Watched(patience=0)
    run.watch(1.0, *[1.0] * 40)
    assert not run.is_over
    assert not any("stopping early" in line for line in run.logged)
    assert not Watched(patience=1).is_over
