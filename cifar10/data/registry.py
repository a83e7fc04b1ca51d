"""Data sets by name, and the folder of their files."""

from __future__ import annotations

import os
from pathlib import Path

from cifar10 import UsageError, nearest
from cifar10.data import cifar, cifar100, mnist, synthetic
from cifar10.data.dataset import DataSet, Images, Split

DATASETS: dict[str, DataSet] = {
    "cifar10": cifar.CIFAR10,
    "cifar100": cifar100.CIFAR100,
    "synthetic": synthetic.SYNTHETIC,
    "mnist": mnist.MNIST,
    "synthetic_mnist": synthetic.SYNTHETIC_MNIST,
    "random_mnist": synthetic.RANDOM_MNIST,
}


def find(name: str) -> DataSet:
    """The data set called `name`. Raises UsageError with the nearest name."""
    if name not in DATASETS:
        raise UsageError(f"--dataset {name} is unknown{nearest(name, list(DATASETS))}")
    return DATASETS[name]


def folder(data_dir: Path | None) -> Path:
    """--data-dir, else $CIFAR10_DIR, else data/."""
    return data_dir or Path(os.environ.get("CIFAR10_DIR") or "data")


def load(name: str, split: Split, data_dir: Path, seed: int) -> Images:
    """A whole split of the data set called `name`, in its fixed order."""
    return find(name).load(split, data_dir, seed)
