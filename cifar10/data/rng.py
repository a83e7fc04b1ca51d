"""Stateless randomness: every draw is a pure function of (seed, epoch, sample index), the same on every device and world size.

The hash is the finalizer of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"); int64
arithmetic wraps alike on CPU and GPU. Nothing has to be saved to resume in mid-epoch, because nothing is remembered.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed 64-bit number
# Each kind of draw has a stream of its own, so that an epoch's order is not correlated with its crops. These have kept the
# numbers that the records were made with; any other name's is its checksum.
_STREAMS = {"order": 1, "crop": 2, "cutout": 3, "brightness": 4, "contrast": 5}


def stream(name: str) -> int:
    """The stream of draws called `name`."""
    return _STREAMS.get(name) or zlib.crc32(name.encode()) + 1_000


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finalizer, elementwise on int64; shifts are made logical by masking off the copied sign bits."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def _hash(seed: int, epoch: int, name: str, indices: Tensor) -> Tensor:
    """int64 [B] -> well mixed int64 [B]."""
    key = torch.zeros((), dtype=torch.int64, device=indices.device)
    for word in (seed, epoch, stream(name)):
        key = _mix(key + word + _GOLDEN)
    return _mix(indices * _GOLDEN + key)


def below(limit: int, seed: int, epoch: int, indices: Tensor, name: str = "crop") -> Tensor:
    """One draw from 0 .. limit-1 for each sample: int64 [B] -> int64 [B]. The bias is below limit / 2^28."""
    bits = (_hash(seed, epoch, name, indices) >> 24) & 0xFFFFFFF  # 28 bits
    return (bits * limit) >> 28


def uniform(seed: int, epoch: int, indices: Tensor, name: str) -> Tensor:
    """One draw from -1 to below 1 for each sample, in steps of 2^-23: int64 [B] -> float32 [B]."""
    return below(2**24, seed, epoch, indices, name) / 2**23 - 1


def permutation(num_images: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits images 0 .. num_images-1: int64 [N], on the CPU."""
    return _hash(seed, epoch, "order", torch.arange(num_images)).argsort(stable=True)


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch's augmentation, and what an operation has to know of the images."""

    seed: int
    epoch: int
    indices: Tensor  # int64 [B], of the images in the training split
    black: Tensor  # a black pixel, normalized: [C]
    full_size: int  # pixels a side of images that are not made smaller by --first-sizes

    def below(self, limit: int, name: str, epoch: int | None = None) -> Tensor:
        """A whole number from 0 to limit - 1 for each image: int64 [B]. `name` tells one kind of draw from another."""
        return below(limit, self.seed, self.epoch if epoch is None else epoch, self.indices, name)

    def uniform(self, name: str) -> Tensor:
        """A number from -1 to below 1 for each image: float32 [B]."""
        return uniform(self.seed, self.epoch, self.indices, name)
