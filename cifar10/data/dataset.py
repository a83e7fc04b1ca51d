"""What a data set is: a few facts, and two splits of images as uint8 arrays; and how validation images are held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cifar10 import UsageError

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Images:
    """One split, in its fixed order."""

    pixels: np.ndarray  # uint8 [N, S, S, C]: [N, 32, 32, 3] RGB for CIFAR-10, [N, 28, 28, 1] grey for MNIST
    labels: np.ndarray  # int64 [N], 0..9, indices into the data set's classes

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSet:
    """One data set; either `read` takes a split from the disk, or `draw` makes (split, num_images, seed) in memory."""

    train_images: int
    test_images: int
    size: int  # height and width of an image
    channels: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # what normalisation is to be told where a recipe was made for other images
    std: tuple[float, ...]
    tiers: tuple[float, float, float] | None  # test accuracies from which a network is Excellent, Good, Fair; None: of no use
    read: Callable[[Path, Split], Images] | None = None
    draw: Callable[[Split, int, int], Images] | None = None
    ensure: Callable[..., None] | None = None  # (data_dir, need_test=...): fetch and check what `read` reads
    note: str | None = None  # what everyone should know who reads an accuracy on it

    def num_images(self, split: Split) -> int:
        return self.train_images if split == "train" else self.test_images


def philox(key: int, stream: int) -> np.random.Philox:
    """A source of random 64-bit words, by counter: the same on every platform and in every version of NumPy."""
    return np.random.Philox(key=np.array([key, stream], np.uint64))


def stratified_split(labels: np.ndarray, val_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, val), both sorted int64: a choice fixed by `seed`, with the classes as equal as can be in val.

    Of two sizes with one seed, the larger val contains the smaller. Raises UsageError unless 0 <= val_images < N.
    """
    if not 0 <= val_images < len(labels):
        raise UsageError(
            f"--val-images {val_images} is impossible with {len(labels)} training images; "
            f"type a number from 0 to {len(labels) - 1}"
        )
    shuffled = np.argsort(philox(seed, 0).random_raw(len(labels)), kind="stable")
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]  # class after class, each in random order
    counts = np.bincount(labels)
    position = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)  # of each image within its class
    share = (position + 0.5) / np.repeat(counts, counts)
    chosen = by_class[np.argsort(share, kind="stable")]  # round after round, one of each class, in proportion to its size
    return np.sort(chosen[val_images:]), np.sort(chosen[:val_images])
