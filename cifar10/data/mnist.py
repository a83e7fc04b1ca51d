"""MNIST: torchvision's files in `<data_dir>/MNIST/raw`, and the archives that they are unpacked from."""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar10.data.archived import Archived
from cifar10.data.dataset import Description, Images, Split
from cifar10.data.download import Archive


@dataclass(frozen=True)
class Mnist(Archived):
    """A data set in MNIST's format: an archive for each file, which is a header and one byte for each pixel or label."""

    def archive_of(self, file: str) -> Archive:
        return next(archive for archive in self.archives if archive.name == f"{file}.gz")

    def unpacked(self, archive: Path) -> Iterator[tuple[str, bytes]]:
        yield archive.stem, gzip.decompress(archive.read_bytes())

    def load(self, split: Split, data_dir: Path, seed: int = 0) -> Images:
        """The whole split. Raises UsageError for a damaged file."""
        folder, size = self.place(data_dir)[0], self.description.size
        pixels, labels = (np.frombuffer(self.intact(folder / name), np.uint8) for name in self.split_files[split])
        return Images(pixels[16:].reshape(-1, size, size, 1).copy(), labels[8:].astype(np.int64))


MNIST = Mnist(
    name="mnist",
    title="MNIST",
    folder="MNIST/raw",
    archives=(
        Archive("train-images-idx3-ubyte.gz", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        Archive("train-labels-idx1-ubyte.gz", 28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
        Archive("t10k-images-idx3-ubyte.gz", 1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
        Archive("t10k-labels-idx1-ubyte.gz", 4_542, "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
    archives_in="MNIST/raw",
    sources=("https://ossci-datasets.s3.amazonaws.com/mnist", "http://yann.lecun.com/exdb/mnist"),
    page="http://yann.lecun.com/exdb/mnist",
    files={
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    split_files={
        "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    },
    description=Description(
        train_images=60_000,
        test_images=10_000,
        size=28,
        channels=1,
        classes=tuple("0123456789"),
        mean=(0.1307,),
        std=(0.3081,),
        tiers=(0.90, 0.70, 0.50),
    ),
)
