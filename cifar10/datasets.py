"""The data sets by name: how large each is, what it shows, how well a network can do on it, and where its images come from."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cifar10 import data, mnist
from cifar10.data import Images

Split = Literal["train", "test"]


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


_COLOUR = {"size": 32, "channels": 3, "classes": data.CLASSES, "tiers": (0.80, 0.70, 0.60)}
_COLOUR |= {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
_GREY = {"size": 28, "channels": 1, "classes": tuple("0123456789"), "mean": (0.1307,), "std": (0.3081,)}
_TIERS = {"tiers": (0.90, 0.70, 0.50)}

DATASETS: dict[str, DataSet] = {
    "cifar10": DataSet(50_000, 10_000, **_COLOUR, read=data.load_cifar10, ensure=data.ensure_cifar10),
    "synthetic": DataSet(50_000, 10_000, **_COLOUR, draw=data.synthetic),
    "mnist": DataSet(60_000, 10_000, **_GREY, **_TIERS, read=mnist.load_mnist, ensure=mnist.ensure_mnist),
    "synthetic_mnist": DataSet(10_000, 2_000, **_GREY, **_TIERS, draw=data.synthetic_grey),
    "random_mnist": DataSet(
        10_000,
        2_000,
        **_GREY,
        tiers=None,
        draw=data.noise,
        note="the labels of random_mnist are random: train accuracy measures memorising, and test accuracy is expected at 10%,"
        " chance",
    ),
}


def folder(data_dir: Path | None) -> Path:
    """Where data sets lie: --data-dir, else $CIFAR10_DIR, else data/."""
    return data_dir or Path(os.environ.get("CIFAR10_DIR") or "data")


def load(name: str, split: Split, data_dir: Path, seed: int) -> Images:
    """A whole split in its fixed order; `ensure` has seen to what lies on disk, and `seed` draws what is made in memory."""
    dataset = DATASETS[name]
    if dataset.read:
        return dataset.read(data_dir, split)
    assert dataset.draw
    return dataset.draw(split, dataset.num_images(split), seed)
