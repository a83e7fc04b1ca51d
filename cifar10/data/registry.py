"""Data sets by name, and the folder of their files."""

from pathlib import Path

from cifar10 import UsageError, nearest
from cifar10.config.recipe import Recipe
from cifar10.data import cifar, cifar100, fashion_mnist, folder, mnist, svhn, synthetic
from cifar10.data.dataset import DataSet, Images, Split
from cifar10.data.ledger import Look

DATASETS: dict[str, DataSet] = {
    "cifar10": cifar.CIFAR10,
    "cifar100": cifar100.CIFAR100,
    "synthetic": synthetic.SYNTHETIC,
    "svhn": svhn.SVHN,
    "mnist": mnist.MNIST,
    "fashion_mnist": fashion_mnist.FASHION_MNIST,
    "synthetic_mnist": synthetic.SYNTHETIC_MNIST,
    "random_mnist": synthetic.RANDOM_MNIST,
    "folder": folder.FOLDER,
}


def find(name: str) -> DataSet:
    """The data set called `name`. Raises UsageError with the nearest name."""
    if name not in DATASETS:
        raise UsageError(f"--dataset {name} is unknown{nearest(name, list(DATASETS))}")
    return DATASETS[name]


def of(recipe: Recipe) -> DataSet:
    """The recipe's data set. Raises UsageError for an unknown one."""
    return find(recipe.dataset).of(recipe)


def images(recipe: Recipe, split: Split, data_dir: Path, look: Look | None = None) -> Images:
    """A whole split of the recipe's data set, in its fixed order; nothing is downloaded. Raises UsageError if it is missing.

    This is the only place where a test split is opened, so that each opening is in the ledger.
    """
    dataset = of(recipe)
    if split == "test":
        facts = dataset.describe(data_dir)
        (look or Look()).opens(data_dir, recipe.dataset, facts.manifest, facts.test_images)
    return dataset.load(split, data_dir, recipe.split_seed)
