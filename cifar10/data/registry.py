"""The data sets by name: how large each is, what it shows, how well a network can do on it, and where its images come from."""

from __future__ import annotations

import os
from pathlib import Path

from cifar10.config.recipe import Recipe
from cifar10.data import cifar, mnist, synthetic
from cifar10.data.dataset import DataSet, Images, Split

_COLOUR = {"size": 32, "channels": 3, "classes": cifar.CLASSES, "tiers": (0.80, 0.70, 0.60)}
_COLOUR |= {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
_GREY = {"size": 28, "channels": 1, "classes": tuple("0123456789"), "mean": (0.1307,), "std": (0.3081,)}
_TIERS = {"tiers": (0.90, 0.70, 0.50)}

DATASETS: dict[str, DataSet] = {
    "cifar10": DataSet(50_000, 10_000, **_COLOUR, read=cifar.load_cifar10, ensure=cifar.ensure_cifar10),
    "synthetic": DataSet(50_000, 10_000, **_COLOUR, draw=synthetic.synthetic),
    "mnist": DataSet(60_000, 10_000, **_GREY, **_TIERS, read=mnist.load_mnist, ensure=mnist.ensure_mnist),
    "synthetic_mnist": DataSet(10_000, 2_000, **_GREY, **_TIERS, draw=synthetic.synthetic_grey),
    "random_mnist": DataSet(
        10_000,
        2_000,
        **_GREY,
        tiers=None,
        draw=synthetic.noise,
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


def image_shape(recipe: Recipe) -> tuple[int, int, int]:
    """What a recipe's network sees of an image: [C, S, S]."""
    dataset = DATASETS[recipe.dataset]
    size = recipe.image_size or recipe.resize or dataset.size
    return dataset.channels, size, size
