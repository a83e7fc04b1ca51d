"""BatchNorm, 2x2 max pooling and ReLU as one operation for training on a CPU (its times are in records/LOG.md)."""

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cifar10.ops import build


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build.library()))


def fuse(network: nn.Module) -> None:
    """Let `network` take this operation in the place of its method `norm_pool_relu`, from now on.

    It agrees with PyTorch's three to rounding, and does not depend on the number of threads. What it does not take goes through
    the method: evaluation, sides that are odd, other layouts and types. Raises UsageError if it cannot be compiled here, and
    OSError if it cannot be loaded.
    """
    _library()
    network.norm_pool_relu = partial(_norm_pool_relu, network.norm_pool_relu)


def _norm_pool_relu(otherwise: Callable[[nn.Module, Tensor], Tensor], norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    if not _takes(norm, x):
        return otherwise(norm, x)
    norm.num_batches_tracked.add_(1)
    return _NormPool.apply(x, norm.weight, norm.bias, norm)


def _takes(norm: nn.Module, x: Tensor) -> bool:
    """Whether the one operation can replace the three for these images."""
    _, channels, height, width = x.shape
    return (
        norm.training
        and type(norm) is nn.BatchNorm2d
        and norm.momentum is not None
        and norm.affine
        and norm.track_running_stats
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.is_contiguous(memory_format=torch.channels_last)
        and height % 2 == width % 2 == channels % _library().channels_at_a_time() == 0
    )


class _NormPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        images, channels, height, width = x.shape
        kind = int(x.dtype == torch.bfloat16), (ctypes.c_int64 * 4)(images, height, width, channels)
        mean, variance = torch.empty(2, channels)
        _call("norm_pool_statistics", *kind, x, mean, variance)
        pixels = images * height * width
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (pixels / max(1, pixels - 1)), norm.momentum)
        invstd = torch.rsqrt(variance + norm.eps)
        scale = weight * invstd
        shift = bias - mean * scale
        size = images, channels, height // 2, width // 2
        y = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
        _call("norm_pool_forward", *kind, x, y, scale, shift)
        ctx.save_for_backward(x, scale, shift, mean, invstd)
        ctx.kind = kind
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, mean, invstd = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dz, dx, dweight, dbias = map(torch.empty_like, (dy, x, mean, mean))
        _call("norm_pool_backward", *ctx.kind, x, dy, dz, dx, scale, shift, mean, invstd, dweight, dbias)
        return dx, dweight, dbias, None


def _call(name: str, is_bf16: int, shape: Any, *tensors: Tensor) -> None:
    getattr(_library(), name)(is_bf16, shape, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors))
