"""Generated images, the same on every platform: learnable classes in CIFAR-10's or MNIST's shape, and noise."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cifar10.data import cifar, mnist
from cifar10.data.dataset import DataSet, Description, Images, Split, philox

SYNTHETIC_STREAMS = {"train": 0, "test": 1, "patterns": 2}
NOISE_STREAMS = {"train": 3, "test": 4}
PATTERNS_PER_CLASS = 3
MAX_SHIFT = 16  # pixels


def _patterns() -> np.ndarray:
    """Smooth color fields, the same for every seed: int16 [10, PATTERNS, 48, 48, 3], -128..127, without float rounding."""
    cells = philox(0, SYNTHETIC_STREAMS["patterns"]).random_raw(10 * PATTERNS_PER_CLASS * 4 * 4 * 3) & np.uint64(255)
    field = cells.astype(np.int64).reshape(10, PATTERNS_PER_CLASS, 4, 4, 3) - 128
    for axis in (2, 3):  # bilinear, 4 cells -> 32 pixels, periodic
        steps = [(8 - k) * field + k * np.roll(field, -1, axis) for k in range(8)]
        field = np.stack(steps, axis + 1).reshape(*field.shape[:axis], 32, *field.shape[axis + 1 :])
    field = (field >> 6).astype(np.int16)
    return np.pad(field, [(0, 0), (0, 0), (0, MAX_SHIFT), (0, MAX_SHIFT), (0, 0)], mode="wrap")


def synthetic(split: Split, num_images: int, seed: int) -> Images:
    """Ten learnable classes: image i is a pattern of class i % 10, shifted, dimmed, brightened, with noise.

    Image i is a function of (seed, split, i) alone. All seeds share the classes, so what is learned from one holds for others.
    """
    labels = np.arange(num_images, dtype=np.int64) % 10
    pixels = np.empty((num_images, 32, 32, 3), np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(_patterns(), (32, 32), axis=(2, 3))
    windows = windows.transpose(0, 1, 2, 3, 5, 6, 4)  # [class, pattern, dy, dx, 32, 32, 3]
    words = philox(seed, SYNTHETIC_STREAMS[split])
    for start in range(0, num_images, 1000):  # small pieces stay in the cache
        out = pixels[start : start + 1000]
        draws = words.random_raw((len(out), 32 * 32 * 3 // 8 + 1)).astype("<u8").view(np.uint8)  # [n, 3072 + 8]
        noise = draws[:, :3072].reshape(out.shape).astype(np.int16) - 128
        pattern, dy, dx, contrast, light = draws[:, 3072:3077].T.astype(np.int16)
        image = windows[labels[start : start + 1000], pattern % PATTERNS_PER_CLASS, dy % (MAX_SHIFT + 1), dx % (MAX_SHIFT + 1)]
        image = image * (64 + contrast // 4)[:, None, None, None] >> 8  # -64..63
        out[:] = 128 + image + (light // 8 - 16)[:, None, None, None] + (noise >> 2)
    return Images(pixels, labels)


def synthetic_grey(split: Split, num_images: int, seed: int) -> Images:
    """Synthetic images in MNIST's shape: the middle of the green channel, uint8 [N, 28, 28, 1]."""
    images = synthetic(split, num_images, seed)
    return Images(np.ascontiguousarray(images.pixels[:, 2:30, 2:30, 1:2]), images.labels)


def noise(split: Split, num_images: int, seed: int) -> Images:
    """Uniform noise in MNIST's shape with random labels, functions of (seed, split, i) alone: it can only be memorized."""
    pixels = 28 * 28  # 98 words of 8 bytes; one more for the label
    words = philox(seed, NOISE_STREAMS[split]).random_raw((num_images, pixels // 8 + 1)).astype("<u8")
    labels = (words[:, -1] % np.uint64(10)).astype(np.int64)
    return Images(words.view(np.uint8)[:, :pixels].reshape(num_images, 28, 28, 1).copy(), labels)


# --- the data sets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generated(DataSet):
    """A data set without files."""

    description: Description
    generate: Callable[[Split, int, int], Images]  # split, number of images, seed

    def describe(self, data_dir: Path) -> Description:
        return self.description

    def load(self, split: Split, data_dir: Path, seed: int) -> Images:
        return self.generate(split, self.description.num_images(split), seed)


_GRAY = replace(mnist.MNIST.description, train_images=10_000, test_images=2_000)
_NOTE = "the labels of random_mnist are random: train accuracy measures memorizing, test accuracy should be chance, 10%"

SYNTHETIC = Generated(cifar.CIFAR10.description, synthetic)
SYNTHETIC_MNIST = Generated(_GRAY, synthetic_grey)
RANDOM_MNIST = Generated(replace(_GRAY, tiers=None, note=_NOTE), noise)
