"""Stateless randomness: every draw is a pure function of (seed, epoch, sample index), the same on every device and world size.

The hash is the finaliser of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"); int64
arithmetic wraps alike on CPU and GPU. Nothing has to be saved to resume in mid-epoch, because nothing is remembered.
"""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed 64-bit number
# Streams: the order of an epoch must not be correlated with its crops.
_ORDER, AUGMENTATION, CUTOUT, BRIGHTNESS, CONTRAST = range(1, 6)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser, elementwise on int64; shifts are made logical by masking off the copied sign bits."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def _hash(seed: int, epoch: int, stream: int, indices: Tensor) -> Tensor:
    """int64 [B] -> well mixed int64 [B]."""
    key = torch.zeros((), dtype=torch.int64, device=indices.device)
    for word in (seed, epoch, stream):
        key = _mix(key + word + _GOLDEN)
    return _mix(indices * _GOLDEN + key)


def below(limit: int, seed: int, epoch: int, indices: Tensor, stream: int = AUGMENTATION) -> Tensor:
    """One draw from 0 .. limit-1 for each sample: int64 [B] -> int64 [B]. The bias is below limit / 2^28."""
    bits = (_hash(seed, epoch, stream, indices) >> 24) & 0xFFFFFFF  # 28 bits
    return (bits * limit) >> 28


def uniform(seed: int, epoch: int, indices: Tensor, stream: int) -> Tensor:
    """One draw from -1 to below 1 for each sample, in steps of 2^-23: int64 [B] -> float32 [B]."""
    return below(2**24, seed, epoch, indices, stream) / 2**23 - 1


def permutation(num_images: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits images 0 .. num_images-1: int64 [N], on the CPU."""
    return _hash(seed, epoch, _ORDER, torch.arange(num_images)).argsort(stable=True)
