"""Fashion-MNIST: Zalando's 28x28 grayscale pictures of clothes, in MNIST's format, read from their archives."""

import gzip
from dataclasses import dataclass, replace
from pathlib import Path

from cifar10.data.archived import Archived
from cifar10.data.download import Archive
from cifar10.data.mnist import MNIST, Mnist


@dataclass(frozen=True)
class ZippedMnist(Mnist):
    """A data set in MNIST's format whose files stay compressed: torchvision knows no md5 of the others."""

    archive_of, unpacked = Archived.archive_of, Archived.unpacked

    def intact(self, path: Path) -> bytes:
        return gzip.decompress(super().intact(path))


_ARCHIVES = (
    Archive("train-images-idx3-ubyte.gz", 26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    Archive("train-labels-idx1-ubyte.gz", 29_515, "25c81989df183df01b3e8a0aad5dffbe"),
    Archive("t10k-images-idx3-ubyte.gz", 4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
    Archive("t10k-labels-idx1-ubyte.gz", 5_148, "bb300cfdad3c16e7a12a480ee83cd310"),
)
_NAMES = tuple(archive.name for archive in _ARCHIVES)

FASHION_MNIST = ZippedMnist(
    name="fashion_mnist",
    title="Fashion-MNIST",
    folder="FashionMNIST/raw",
    archives=_ARCHIVES,
    archives_in="FashionMNIST/raw",
    sources=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",),
    page="https://github.com/zalandoresearch/fashion-mnist",
    files={archive.name: archive.md5 for archive in _ARCHIVES},
    split_files={"train": _NAMES[:2], "test": _NAMES[2:]},
    description=replace(
        MNIST.description,
        classes=("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        mean=(0.2860,),
        std=(0.3530,),
        tiers=None,
    ),
)
