"""CIFAR-10, and the format of the CIFAR archives: files are verified by md5, restored from the archive, or downloaded.

The files are torchvision's: `<data_dir>/cifar-10-batches-py/data_batch_1` and so on. They are pickles, which can run code, so
only bytes with the known md5 are ever unpickled. Importing this file needs neither torch nor torchvision: the launcher checks
the data before it starts any rank.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tarfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar10 import UsageError
from cifar10.data.dataset import DataSet, Description, Images, Split
from cifar10.data.download import download, has_md5, say
from cifar10.files import one_process_at_a_time, written_whole


def _listed(faults: dict[str, str]) -> str:
    return ", ".join(f"{name} ({fault})" for name, fault in faults.items())


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Cifar(DataSet):
    """A data set in the format of the CIFAR archives."""

    name: str  # cifar10: of the lock, and of the environment variable with a mirror's URL, CIFAR10_URL
    title: str
    folder: str
    archive: str
    archive_md5: str
    url: str
    files: dict[str, str]  # name -> md5; those in no split are for torchvision
    split_files: dict[Split, tuple[str, ...]]
    label_key: str
    description: Description

    def describe(self, data_dir: Path) -> Description:
        return self.description

    @property
    def source(self) -> str:
        """A mirror given by the environment, or the authors' server."""
        return os.environ.get(f"{self.name.upper()}_URL") or self.url

    def _read(self, path: Path) -> tuple[bytes, str]:
        """The content of a file, and what is wrong with it; "" if these very bytes have the known md5."""
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b"", "missing"
        except OSError as error:
            return b"", f"unreadable: {error.strerror}"
        return content, "" if _md5(content) == self.files[path.name] else f"corrupt: {len(content)} bytes with another md5"

    def faulty_files(self, data_dir: Path, names: Iterable[str]) -> dict[str, str]:
        """Name -> fault of those files that cannot be used."""
        found = {name: self._read(data_dir / self.folder / name)[1] for name in names}
        return {name: fault for name, fault in found.items() if fault}

    def _extract(self, archive: Path, folder: Path, names: set[str]) -> None:
        """Write the named files from the archive, and nothing else. Raises UsageError unless all are there and intact."""
        wanted = {f"{self.folder}/{name}": name for name in names}
        folder.mkdir(exist_ok=True)
        with tarfile.open(archive, "r:gz") as members:
            for member in members:
                content = members.extractfile(member).read() if member.name in wanted and member.isreg() else b""
                if content and _md5(content) == self.files[wanted[member.name]]:
                    with written_whole(folder / wanted.pop(member.name)) as file:
                        file.write(content)
                if not wanted:
                    return
        raise UsageError(f"{archive} has no intact {', '.join(sorted(wanted.values()))}; delete it to download it again")

    def _repair(self, data_dir: Path, faults: dict[str, str]) -> None:
        """Restore files from the archive, which is downloaded if there is no intact one. Raises ConnectionError."""
        archive, folder = data_dir / self.archive, data_dir / self.folder
        absent = {name for name in self.files if not os.path.lexists(folder / name)}  # torchvision and a later test need them
        if damaged := {name: fault for name, fault in faults.items() if name not in absent}:
            say(f"{folder}: restoring {_listed(damaged)}")
        if not has_md5(archive, self.archive_md5):
            if archive.exists():
                say(f"{archive} is damaged (its md5 differs)")
            download(self.source, archive, self.archive_md5, self.title)
        self._extract(archive, folder, {*faults, *absent})
        say(f"{folder}: {len({*faults, *absent})} files written from {archive.name}, md5 verified")

    def ensure(self, data_dir: Path, *, need_test: bool) -> None:
        """Return once `data_dir` holds intact files, without `need_test` only those of train; else raise UsageError.

        Intact files are only read, without a lock; others are restored. Interrupted downloads can be resumed.
        """
        names = self.split_files["train"] + (self.split_files["test"] if need_test else ())
        faults = self.faulty_files(data_dir, names)
        if not faults:
            return
        trouble = f"no {self.title} in {data_dir}"
        if set(faults.values()) != {"missing"} or len(faults) < len(names):
            trouble = f"{self.title} in {data_dir} is damaged: {_listed(faults)}"
        remedy = "point --data-dir / CIFAR10_DIR at"
        try:
            if data_dir.exists() and not data_dir.is_dir():
                raise UsageError(f"{data_dir} is not a folder; {remedy} one")
            data_dir.mkdir(parents=True, exist_ok=True)
            with one_process_at_a_time(data_dir / f".{self.name}.lock", f"fetching {self.title} to {data_dir}"):
                if faults := self.faulty_files(data_dir, names):  # else another process was faster
                    self._repair(data_dir, faults)
        except ConnectionError as error:
            raise UsageError(
                f"{trouble}, and {self.source} cannot be fetched: {error}; put {self.archive} of"
                f" https://www.cs.toronto.edu/~kriz/cifar.html into {data_dir}, or {remedy} a folder that holds it, or set"
                f" {self.name.upper()}_URL to a mirror, or use --dataset synthetic"
            ) from error
        except OSError as error:
            raise UsageError(
                f"{trouble}, and it cannot be written: {error.strerror or error} ({error.filename or data_dir}); make room or"
                f" make the folder writable, or {remedy} another, or use --dataset synthetic"
            ) from error

    def _unpickled(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """One file -> (uint8 [n, 32, 32, 3], int64 [n]). Raises UsageError, before unpickling, unless the md5 is right."""
        content, fault = self._read(path)
        if fault:
            raise UsageError(f"{path} is {fault}; run the same command again to restore it, or use --dataset synthetic")
        with warnings.catch_warnings():  # NumPy 2.4 deprecates the spelling of a dtype inside these files of 2009
            warnings.simplefilter("ignore")
            batch = pickle.loads(content, encoding="latin1")
        pixels = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(pixels), np.array(batch[self.label_key], np.int64)

    def load(self, split: Split, data_dir: Path, seed: int = 0) -> Images:
        """The whole split in the order of its files. Raises UsageError for a damaged file."""
        names, all_pixels, all_labels = self.split_files[split], np.empty(0), np.empty(0)
        for number, name in enumerate(names):  # one in memory at a time; all hold equally many images
            pixels, labels = self._unpickled(data_dir / self.folder / name)
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
    archive="cifar-10-python.tar.gz",
    archive_md5="c58f30108f718f92721af3b95e74349a",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
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
