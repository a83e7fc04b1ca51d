"""The metrics of each step, kept on the device until they are logged, so that a step never synchronizes."""

from typing import Any

import torch
from torch import Tensor

from cifar10 import RunFailed
from cifar10.distributed.world import World
from cifar10.run.state import RunState

Row = tuple[
    Any, ...
]  # mean loss of the global batch, correct images, gradient norm, skipped; with experts, Sums.routed's terms


class MetricBuffer:
    """Room for `length` steps; `write` launches device work only, `read` synchronizes."""

    def __init__(self, length: int, device: torch.device) -> None:
        self._rows = torch.zeros(length, 4, device=device)
        self._routed: list[Tensor] = []
        self._used = 0

    @property
    def is_full(self) -> bool:
        return self._used == len(self._rows)

    def write(self, loss: Tensor, correct: Tensor, grad_norm: Tensor, skipped: Tensor, routed: Tensor | None = None) -> None:
        """Record one step: 0-dim tensors. Loss and correct are this rank's; the gradient norm is already global. `routed`, of
        networks with experts, is what engine/experts.py counts on this rank."""
        torch.stack((loss, correct.to(loss.dtype), grad_norm, skipped), out=self._rows[self._used])
        self._used += 1
        self._routed += [] if routed is None else [routed]

    def read(self, world: World) -> list[Row]:
        """The steps since the last read, over all ranks; every rank must call it."""
        if not self._used:
            return []
        rows = self._rows[: self._used]
        rows[:, :2] = world.total(rows[:, :2].contiguous())
        routed = world.total(torch.stack(self._routed)).tolist() if self._routed else [[]] * self._used
        self._used, self._routed = 0, []
        return [
            (loss / world.size, round(correct) if skip == 0 else 0, norm, skip != 0, *more)
            for (loss, correct, norm, skip), more in zip(rows.tolist(), routed, strict=True)
        ]


class TooManySkippedSteps(RunFailed):
    """Training has diverged: too many steps in a row had non-finite values."""


def count_steps(rows: list[Row], state: RunState, *, global_images: int, max_skipped_in_a_row: int) -> None:
    """Add steps read from a metric buffer to the run's state. Raises TooManySkippedSteps if too many in a row were skipped."""
    for loss, correct, grad_norm, skipped, *routed in rows:
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
        state.skipped_steps += skipped
        state.trained_images += global_images
        for sums in (state.interval_sums, state.epoch_sums):
            sums.skipped += skipped
            if not skipped:
                sums.add(global_images, loss, correct, grad_norm, routed)
        if state.skipped_in_a_row >= max_skipped_in_a_row:
            raise TooManySkippedSteps(
                f"{state.skipped_in_a_row} steps in a row, by step {state.step}, were skipped because of a non-finite loss or"
                f" gradient; lower the learning rate (--lr)"
            )
