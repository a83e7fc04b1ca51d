"""CIFAR from disk: every file is verified by md5, repaired from the archive, or downloaded.

The files are torchvision's: `<data_dir>/cifar-10-batches-py/data_batch_1` and so on, each a pickle with a known md5, made
from `cifar-10-python.tar.gz`. A pickle can run code, so only bytes with the known md5 are ever unpickled. Importing this
file needs neither torch nor torchvision: the launcher checks the data before it starts any rank.
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


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _listed(faults: dict[str, str]) -> str:
    """`data_batch_3 (corrupt), test_batch (missing)`."""
    return ", ".join(f"{name} ({fault})" for name, fault in faults.items())


@dataclass(frozen=True)
class Cifar(DataSet):
    """A data set in the format of the CIFAR archives, with torchvision's names and md5 sums; a test compares them."""

    name: str  # cifar10: of the lock, and of the variable that holds a mirror's URL, CIFAR10_URL
    title: str
    folder: str
    archive: str
    archive_md5: str
    url: str
    files: dict[str, str]  # name -> md5; those that are in no split are read by torchvision only
    split_files: dict[Split, tuple[str, ...]]
    label_key: str
    description: Description

    def describe(self, data_dir: Path) -> Description:
        return self.description

    @property
    def url_variable(self) -> str:
        return f"{self.name.upper()}_URL"

    @property
    def source(self) -> str:
        """Where the archive is downloaded from: the mirror that the environment names, else the authors' server."""
        return os.environ.get(self.url_variable) or self.url

    # --- what lies on disk --------------------------------------------------------------------------------------------

    def _read(self, path: Path) -> tuple[bytes, str]:
        """The content of a file, and its fault: "" if the md5 is the known one, else a word or two for the message.

        Content and verdict come from one read, so whoever unpickles the content unpickles the very bytes that were verified.
        """
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b"", "missing"
        except OSError as error:
            return b"", f"unreadable: {error.strerror}"
        return content, "" if _md5(content) == self.files[path.name] else f"corrupt: {len(content)} bytes with another md5"

    def faulty_files(self, data_dir: Path, names: Iterable[str]) -> dict[str, str]:
        """Name -> fault of those of the named files that cannot be used."""
        found = {name: self._read(data_dir / self.folder / name)[1] for name in names}
        return {name: fault for name, fault in found.items() if fault}

    # --- repair -------------------------------------------------------------------------------------------------------

    def _extract(self, archive: Path, folder: Path, names: set[str]) -> None:
        """Write the named files from the archive; its other members, whatever their names and kinds, are not looked at.

        Raises UsageError if the archive lacks one of them or holds it with another md5.
        """
        wanted = {f"{self.folder}/{name}": name for name in names}
        folder.mkdir(exist_ok=True)
        with tarfile.open(archive, "r:gz") as members:
            for member in members:
                if member.name not in wanted or not member.isreg():
                    continue
                name, content = wanted[member.name], members.extractfile(member).read()
                if _md5(content) != self.files[name]:
                    continue
                del wanted[member.name]
                with written_whole(folder / name) as file:
                    file.write(content)
                if not wanted:
                    return
        raise UsageError(f"{archive} lacks a sound {', '.join(sorted(wanted.values()))}; delete it, and it is fetched anew")

    def _repair(self, data_dir: Path, faults: dict[str, str]) -> None:
        """Replace the faulty files from the archive, which is fetched if there is no sound one. Raises ConnectionError."""
        archive, folder = data_dir / self.archive, data_dir / self.folder
        # Whatever else is absent is written too, so that the folder is complete for torchvision and for a later test.
        absent = {name for name in self.files if not os.path.lexists(folder / name)}
        if damaged := {name: fault for name, fault in faults.items() if name not in absent}:
            say(f"{folder}: repairing {_listed(damaged)}")
        if not has_md5(archive, self.archive_md5):
            if archive.exists():
                say(f"{archive} is damaged (its md5 differs)")
            download(self.source, archive, self.archive_md5, self.title)
        self._extract(archive, folder, {*faults, *absent})
        say(f"{folder}: {len({*faults, *absent})} files written from {archive.name}, md5 verified")

    def ensure(self, data_dir: Path, *, need_test: bool) -> None:
        """Return once `data_dir` holds sound files: those of train, and those of test if `need_test`.

        Sound files are only read: no lock, nothing written, and without `need_test` the test files are not opened. Else they
        are restored from the archive in `data_dir`, which is downloaded if it is not there. Raises UsageError, one line,
        if that cannot be done; nothing half-written ever has a final name, and a broken download can be resumed.
        """
        names = self.split_files["train"] + (self.split_files["test"] if need_test else ())
        faults = self.faulty_files(data_dir, names)
        if not faults:
            return
        trouble = f"no {self.title} in {data_dir}"
        if set(faults.values()) != {"missing"} or len(faults) < len(names):
            trouble = f"{self.title} in {data_dir} is damaged: {_listed(faults)}"
        try:
            if data_dir.exists() and not data_dir.is_dir():
                raise UsageError(f"{data_dir} is not a folder; point --data-dir / CIFAR10_DIR at one")
            data_dir.mkdir(parents=True, exist_ok=True)
            with one_process_at_a_time(data_dir / f".{self.name}.lock", f"fetching {self.title} to {data_dir}"):
                if faults := self.faulty_files(data_dir, names):  # else another process was faster
                    self._repair(data_dir, faults)
        except ConnectionError as error:
            raise UsageError(
                f"{trouble}, and {self.source} cannot be fetched: {error}; put {self.archive} of "
                f"https://www.cs.toronto.edu/~kriz/cifar.html into {data_dir} or point --data-dir / CIFAR10_DIR at a folder "
                f"that holds it, or set {self.url_variable} to a mirror, or use --dataset synthetic"
            ) from error
        except OSError as error:
            raise UsageError(
                f"{trouble}, and it cannot be put there: {error.strerror or error} ({error.filename or data_dir}); make room "
                f"or make the folder writable, or point --data-dir / CIFAR10_DIR at another, or use --dataset synthetic"
            ) from error

    # --- arrays -------------------------------------------------------------------------------------------------------

    def _unpickled(self, path: Path) -> tuple[np.ndarray, list[int]]:
        """One file -> (uint8 [n, 32, 32, 3], n labels). Raises UsageError, and unpickles nothing, unless the md5 is right."""
        content, fault = self._read(path)
        if fault:
            raise UsageError(f"{path} is {fault}; run the same command again to have it repaired, or use --dataset synthetic")
        with warnings.catch_warnings():  # NumPy 2.4 deprecates the spelling of a dtype inside these files of 2009
            warnings.simplefilter("ignore")
            batch = pickle.loads(content, encoding="latin1")
        return batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), batch[self.label_key]

    def load(self, split: Split, data_dir: Path, seed: int = 0) -> Images:
        """The whole split in the order of its files, the only ones that are opened; a damaged file is a UsageError."""
        labels: list[int] = []
        pixels, names = np.empty((0, 32, 32, 3), np.uint8), self.split_files[split]
        for number, name in enumerate(names):  # one in memory at a time; all have equally many images
            its_pixels, its_labels = self._unpickled(data_dir / self.folder / name)
            if number == 0:
                pixels = np.empty((len(names) * len(its_labels), 32, 32, 3), np.uint8)
            pixels[len(labels) : len(labels) + len(its_labels)] = its_pixels
            labels += its_labels
        return Images(pixels, np.array(labels, np.int64))


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
