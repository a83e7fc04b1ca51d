"""Counter-based random numbers: pure functions of (seed, epoch, sample index), the same on every device and world size.

The hash is the finalizer of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"); int64
arithmetic wraps the same way on CPU and GPU. There is no state to save for resuming in mid-epoch.
"""

import random
import zlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed 64-bit number
# Each use has its own stream, so that an epoch's order is not correlated with its crops. These keep the numbers that the
# records were made with; other names use their checksum.
_STREAMS = {"order": 1, "crop": 2, "cutout": 3, "brightness": 4, "contrast": 5}


def stream(name: str) -> int:
    """The number of the stream called `name`."""
    return _STREAMS.get(name) or zlib.crc32(name.encode()) + 1_000


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finalizer, elementwise on int64; masking off the sign bits makes the shifts logical."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def _hash(seed: int, epoch: int, name: str, indices: Tensor) -> Tensor:
    """int64 [B] -> hash, int64 [B]."""
    key = torch.zeros((), dtype=torch.int64, device=indices.device)
    for word in (seed, epoch, stream(name)):
        key = _mix(key + word + _GOLDEN)
    return _mix(indices * _GOLDEN + key)


def of_step(seed: int, epoch: int, step: int) -> random.Random:
    """Random numbers for a whole global batch, drawn on the host: the same on every rank."""
    return random.Random(f"{seed} {epoch} {step}")


def permutation(num_images: int, seed: int, epoch: int) -> Tensor:
    """The random order of an epoch's images: int64 [N], on the CPU."""
    return _hash(seed, epoch, "order", torch.arange(num_images)).argsort(stable=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, without a wait: what is on the CPU reaches a GPU from pinned memory."""
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Draws:
    """Random numbers for the augmentation of a batch, with the facts about its images that operations need.

    What one batch asks for is drawn for all `indices`, such as an epoch's, on the CPU, and kept: batch by batch a GPU would run
    fifty tiny kernels for each draw.
    """

    seed: int
    epoch: int
    indices: Tensor  # int64 [N], in the training split, on the CPU
    black: Tensor  # a black pixel, normalized: [C], where the images are
    full_size: int  # height and width without --first-sizes
    part: slice = field(default_factory=lambda: slice(None))  # of `indices`: the batch's, B of N
    drawn: dict[Hashable, Tensor] = field(default_factory=dict)  # [..., N]

    def once(self, name: Hashable, draw: Callable[["Draws"], Tensor]) -> Tensor:
        """The batch's part [..., B] of what `draw` returns for all images: [..., N], on the CPU or where the images are."""
        if name not in self.drawn:
            self.drawn[name] = to_device(draw(replace(self, part=slice(None))), self.black.device)
        return self.drawn[name][..., self.part]

    def below(self, limit: int, name: str, epoch: int | None = None) -> Tensor:
        """Random integers in 0 .. limit-1, one per image, from a named stream: int64 [B]. The bias is below limit / 2^28."""
        at = self.epoch if epoch is None else epoch
        return self.once(
            (limit, name, at), lambda _: ((_hash(self.seed, at, name, self.indices) >> 24 & 0xFFFFFFF) * limit) >> 28
        )

    def uniform(self, name: str) -> Tensor:
        """Uniform random numbers in [-1, 1), one per image, in steps of 2^-23: float32 [B]."""
        return self.once(name, lambda draws: draws.below(2**24, name) / 2**23 - 1)

    def between(self, low: float, high: float, name: str) -> Tensor:
        """Uniform random numbers from low to high, one per image: float32 [B]."""
        return low + (high - low) * (self.uniform(name) + 1) / 2
