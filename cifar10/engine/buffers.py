"""A model's buffers, such as BatchNorm's statistics, in one block of memory: kept with one copy, put back with one choice."""

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes, a cache line
WORD = torch.int64.itemsize


class KeptBuffers:
    """The buffers of `module`, which stay the same tensors, and a copy from before a step.

    `tensors` are the buffers; the block is int64 whatever their types, for it is only moved. The widest types come first:
    torch.compile takes offsets that are counted in elements of different sizes as if they were of one.
    """

    @torch.no_grad()
    def __init__(self, module: nn.Module) -> None:
        self.tensors, starts, end = sorted(module.buffers(), key=lambda buffer: -buffer.element_size()), [], 0
        for tensor in self.tensors:
            starts.append(end)
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            end += -(-(last + 1) * tensor.element_size() // ALIGNMENT) * ALIGNMENT if tensor.numel() else 0
        device = self.tensors[0].device if self.tensors else None
        self._now = torch.zeros(end // WORD, dtype=torch.int64, device=device)
        self._before = torch.zeros_like(self._now)
        for tensor, start in zip(self.tensors, starts, strict=True):
            values = tensor.clone()
            tensor.set_(self._now.untyped_storage(), start // tensor.element_size(), tensor.shape, tensor.stride())
            tensor.copy_(values)

    def keep(self) -> None:
        """Remember the values as they are."""
        if self.tensors:
            self._before.copy_(self._now)

    def put_back(self, skipped: Tensor) -> None:
        """Return to the values kept if `skipped` (0-dim) is not zero, without synchronizing."""
        if self.tensors:
            torch.where(skipped.bool(), self._before, self._now, out=self._now)
