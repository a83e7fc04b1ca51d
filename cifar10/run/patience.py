"""Early stopping and learning rate reduction on a plateau of the monitored loss."""

from cifar10.config.recipe import Recipe
from cifar10.run.state import RunState


def is_over(recipe: Recipe, state: RunState) -> bool:
    """Whether the monitored loss has not improved for --patience epochs."""
    return 0 < recipe.patience <= state.epochs_without_improvement


def watch(recipe: Recipe, state: RunState, loss: float, which: str) -> list[str]:
    """Update `state` with an epoch's `which` loss; returns the lines to log."""
    if loss < state.best_loss - recipe.min_improvement:
        state.best_loss, state.epochs_without_improvement = loss, 0
        return []
    state.epochs_without_improvement += 1
    waited, lines = state.epochs_without_improvement, []
    since = f"{which} loss has not improved on {state.best_loss:.5f} for {waited} epochs"
    if waited % recipe.plateau_patience == 0:
        state.lr_factor *= recipe.plateau_lr_factor
        change = f"; learning rate x {recipe.plateau_lr_factor:g}" if recipe.plateau_lr_factor != 1 else ""
        lines.append(f"plateau: {since}{change}")
    if is_over(recipe, state):
        lines.append(f"stopping early: {since}")
    return lines
