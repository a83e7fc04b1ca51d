"""An average of the weights and BatchNorm statistics over training: exponential (EMA), or over the ends of epochs (SWA).

It is kept where the fp32 weights are: on the device, partitioned as they are under ZeRO, and inside a captured step.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
    """The average of `tensors`, which may lie on several devices; it starts with the first update, counted on `device`."""

    def __init__(self, tensors: list[Tensor], device: torch.device | None = None) -> None:
        self.tensors = [tensor.detach() for tensor in tensors]
        self.averages = [tensor.clone() for tensor in self.tensors]
        self.updates = torch.zeros((), device=device or self.tensors[0].device)  # so far

    @torch.no_grad()
    def _move(self, weight: Tensor) -> None:
        """averages += weight * (tensors - averages)"""
        differences = torch._foreach_sub(self.tensors, self.averages)
        for device in {tensor.device for tensor in differences}:  # two if the optimizer is offloaded from a GPU
            torch._foreach_mul_([one for one in differences if one.device == device], weight.to(device))
        torch._foreach_add_(self.averages, differences)

    def follow(self, decay: float, skipped: Tensor) -> None:
        """EMA: average = decay * average + (1 - decay) * weights, unless the step was `skipped` (0-dim, 1.0 or 0.0).

        The decay starts low, min(decay, (1 + n) / (10 + n)) at update n, as in TensorFlow's ExponentialMovingAverage, so that
        the initial weights are soon forgotten.
        """
        now = ((1 + self.updates) / (10 + self.updates)).clamp(max=decay)
        self._move((1 - now) * (1 - skipped))
        self.updates.add_(1 - skipped)

    def add(self) -> None:
        """SWA (Izmailov et al. 2018, arXiv 1803.05407): the mean of the weights at every call."""
        self.updates.add_(1)
        self._move(1 / self.updates)

    @torch.no_grad()
    def _swap(self) -> None:
        kept = [tensor.clone() for tensor in self.tensors]
        torch._foreach_copy_(self.tensors, self.averages)
        torch._foreach_copy_(self.averages, kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the weights are the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()
