"""What a data set is, and how validation images are held out. A new one is a file with a `DataSet`, added to registry.py."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cifar10 import UsageError
from cifar10.config.recipe import Recipe

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Images:
    """One split, in its fixed order."""

    pixels: np.ndarray  # uint8 [N, S, S, C]
    labels: np.ndarray  # int64 [N], indices into the data set's classes

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Description:
    """The facts of a data set."""

    train_images: int
    test_images: int
    size: int  # height and width of an image
    channels: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # suggested if a recipe does not fit
    std: tuple[float, ...]
    tiers: tuple[float, float, float] | None = None  # lowest test accuracies of Excellent, Good and Fair
    note: str | None = None  # shown at the start of a run
    manifest: str | None = None  # identifies images that are not always the same, a user's own

    def num_images(self, split: Split) -> int:
        return self.train_images if split == "train" else self.test_images


def placeholder(facts: Description, split: Split) -> Images:
    """Random images in a data set's place, to measure how long a step takes."""
    count, rng = facts.num_images(split), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, facts.size, facts.size, facts.channels), np.uint8)
    return Images(pixels, np.arange(count) % len(facts.classes))


def description_from(values: dict[str, Any]) -> Description:
    """A description from JSON. Raises TypeError or ValueError for anything else."""
    found = Description(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    counts = found.train_images, found.test_images, found.size, found.channels
    if not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(f"images, size and channels are {counts}, expected whole numbers above 0")
    if not found.classes or not all(isinstance(name, str) for name in found.classes):
        raise ValueError("its classes are not names")
    return found


class DataSet:
    """One data set; `describe` may look into `data_dir`."""

    def of(self, recipe: Recipe) -> "DataSet":
        """The data set as this recipe has it, if that makes a difference."""
        return self

    def describe(self, data_dir: Path) -> Description:
        raise NotImplementedError

    def load(self, split: Split, data_dir: Path, seed: int) -> Images:
        """A whole split in its fixed order, after `ensure`; `seed` is for generated images."""
        raise NotImplementedError

    def whereabouts(self, data_dir: Path) -> str:
        """Where the images come from, for --dry-run."""
        return "generated"

    def ensure(self, data_dir: Path, *, need_test: bool) -> None:
        """Return once `data_dir` holds intact files, downloaded if needed; else raise UsageError."""

    def changes(self, data_dir: Path, manifest: str) -> str:
        """What differs from the images that had this manifest."""
        raise NotImplementedError


def about_model(recipe: Recipe, classes: Sequence[str], channels: int, size: int) -> dict[str, Any]:
    """How to feed a model, and what its outputs mean, as plain values; `channels` and `size` are the data set's."""
    image = {"channels": channels, "size": recipe.network_size(size), "resize": recipe.resize, "dataset_size": size}
    return {
        "model": recipe.model,
        "classes": list(classes),
        "normalization": {"mean": list(recipe.mean), "std": list(recipe.std)},
        "image": image,
        "recipe": json.loads(json.dumps(asdict(recipe))),
    }


def philox(key: int, stream: int) -> np.random.Philox:
    """A counter-based source of random 64-bit words, the same on every platform and in every version of NumPy."""
    return np.random.Philox(key=np.array([key, stream], np.uint64))


def stratified_split(labels: np.ndarray, val_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted int64 indices (train, val), fixed by `seed`, with the classes of val in proportion.

    For one seed, a larger val contains a smaller one. Raises UsageError unless 0 <= val_images < N.
    """
    if not 0 <= val_images < len(labels):
        raise UsageError(f"invalid value for --val-images: {val_images}, expected a number from 0 to {len(labels) - 1}")
    shuffled = np.argsort(philox(seed, 0).random_raw(len(labels)), kind="stable")
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]  # class after class, each in random order
    counts = np.bincount(labels)
    position = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)  # of each image within its class
    share = (position + 0.5) / np.repeat(counts, counts)
    chosen = by_class[np.argsort(share, kind="stable")]  # round after round, one of each class, in proportion to its size
    return np.sort(chosen[val_images:]), np.sort(chosen[:val_images])
