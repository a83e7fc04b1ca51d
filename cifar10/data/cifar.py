"""CIFAR-10 from disk: every file is verified by md5, repaired from the archive, or downloaded.

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
from pathlib import Path

import numpy as np

from cifar10 import UsageError
from cifar10.data.dataset import Images, Split
from cifar10.data.download import download, has_md5, say
from cifar10.files import one_process_at_a_time, written_whole

CLASSES: tuple[str, ...] = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

# torchvision.datasets.CIFAR10's own words; a test compares them.
FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"  # $CIFAR10_URL wins
FILES: dict[str, tuple[str, int]] = {  # name -> (md5, bytes)
    "data_batch_1": ("c99cafc152244af753f735de768cd75f", 31_035_704),
    "data_batch_2": ("d4bba439e000b95fd0a9bffe97cbabec", 31_035_320),
    "data_batch_3": ("54ebc095f3ab1f0389bbae665268c751", 31_035_999),
    "data_batch_4": ("634d18415352ddfa80567beed471001a", 31_035_696),
    "data_batch_5": ("482c414d41f54cd18b22e5b47cb7c3cb", 31_035_623),
    "test_batch": ("40351d587109b95175f43aff81a1287e", 31_035_526),
    "batches.meta": ("5ff9c542aee3614f3951f8cda6e48888", 158),  # read by torchvision only
}
SPLIT_FILES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}


# --- what lies on disk ------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[bytes, str]:
    """The content of one of FILES, and its fault: "" if the md5 is the known one, else a word or two for the message.

    Content and verdict come from one read, so whoever unpickles the content unpickles the very bytes that were verified.
    """
    md5, num_bytes = FILES[path.name]
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b"", "missing"
    except OSError as error:
        return b"", f"unreadable: {error.strerror}"
    if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
        return content, ""
    return content, f"truncated: {len(content)} of {num_bytes} bytes" if len(content) < num_bytes else "altered"


def faulty_files(data_dir: Path, names: Iterable[str]) -> dict[str, str]:
    """Name -> fault of those of the named files that cannot be used."""
    found = {name: _read(data_dir / FOLDER / name)[1] for name in names}
    return {name: fault for name, fault in found.items() if fault}


def _listed(faults: dict[str, str]) -> str:
    """`data_batch_3 (truncated: 5 of 31035999 bytes), test_batch (missing)`."""
    return ", ".join(f"{name} ({fault})" for name, fault in faults.items())


# --- repair -----------------------------------------------------------------------------------------------------------


def _extract(archive: Path, folder: Path, names: set[str]) -> None:
    """Write the named FILES from the archive; its other members, whatever their names and kinds, are not looked at.

    Raises UsageError if the archive lacks one of them or holds it with another md5.
    """
    wanted = {f"{FOLDER}/{name}": name for name in names}
    folder.mkdir(exist_ok=True)
    with tarfile.open(archive, "r:gz") as members:
        for member in members:
            if member.name not in wanted or not member.isreg():
                continue
            name = wanted[member.name]
            content = members.extractfile(member).read()
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != FILES[name][0]:
                continue
            del wanted[member.name]
            with written_whole(folder / name) as file:
                file.write(content)
            if not wanted:
                return
    raise UsageError(f"{archive} lacks a sound {', '.join(sorted(wanted.values()))}; delete it, and it is fetched anew")


def _repair(data_dir: Path, faults: dict[str, str]) -> None:
    """Replace the faulty files from the archive, which is fetched if there is no sound one. Raises ConnectionError."""
    archive = data_dir / ARCHIVE
    # Whatever else is absent is written too, so that the folder is complete for torchvision and for a later test.
    absent = {name for name in FILES if not os.path.lexists(data_dir / FOLDER / name)}
    if damaged := {name: fault for name, fault in faults.items() if name not in absent}:
        say(f"{data_dir / FOLDER}: repairing {_listed(damaged)}")
    if not has_md5(archive, ARCHIVE_MD5):
        if archive.exists():
            say(f"{archive} is damaged (its md5 differs)")
        download(os.environ.get("CIFAR10_URL") or URL, archive, ARCHIVE_MD5, "CIFAR-10")
    _extract(archive, data_dir / FOLDER, {*faults, *absent})
    say(f"{data_dir / FOLDER}: {len({*faults, *absent})} files written from {archive.name}, md5 verified")


def ensure_cifar10(data_dir: Path, *, need_test: bool) -> None:
    """Return once `data_dir` holds sound CIFAR-10 files: those of train, and that of test if `need_test`.

    Sound files are only read: no lock, nothing written, and without `need_test` the test file is not opened. Else they
    are restored from the archive in `data_dir`, which is downloaded if it is not there. Raises UsageError, one line,
    if that cannot be done; nothing half-written ever has a final name, and a broken download can be resumed.
    """
    names = SPLIT_FILES["train"] + (SPLIT_FILES["test"] if need_test else ())
    faults = faulty_files(data_dir, names)
    if not faults:
        return
    trouble = f"no CIFAR-10 in {data_dir}"
    if set(faults.values()) != {"missing"} or len(faults) < len(names):
        trouble = f"CIFAR-10 in {data_dir} is damaged: {_listed(faults)}"
    try:
        if data_dir.exists() and not data_dir.is_dir():
            raise UsageError(f"{data_dir} is not a folder; point --data-dir / CIFAR10_DIR at one")
        data_dir.mkdir(parents=True, exist_ok=True)
        with one_process_at_a_time(data_dir / ".cifar10.lock", f"fetching CIFAR-10 to {data_dir}"):
            if faults := faulty_files(data_dir, names):  # else another process was faster
                _repair(data_dir, faults)
    except ConnectionError as error:
        raise UsageError(
            f"{trouble}, and {os.environ.get('CIFAR10_URL') or URL} cannot be fetched: {error}; put {ARCHIVE} of "
            f"https://www.cs.toronto.edu/~kriz/cifar.html into {data_dir} or point --data-dir / CIFAR10_DIR at a folder "
            f"that holds it, or set CIFAR10_URL to a mirror, or use --dataset synthetic"
        ) from error
    except OSError as error:
        raise UsageError(
            f"{trouble}, and it cannot be put there: {error.strerror or error} ({error.filename or data_dir}); make room "
            f"or make the folder writable, or point --data-dir / CIFAR10_DIR at another, or use --dataset synthetic"
        ) from error


# --- arrays -----------------------------------------------------------------------------------------------------------


def _unpickled(path: Path) -> tuple[np.ndarray, list[int]]:
    """One file -> (uint8 [n, 32, 32, 3], n labels). Raises UsageError, and unpickles nothing, unless the md5 is right."""
    content, fault = _read(path)
    if fault:
        raise UsageError(f"{path} is {fault}; type the same command again to have it repaired, or use --dataset synthetic")
    with warnings.catch_warnings():  # NumPy 2.4 deprecates the spelling of a dtype inside these files of 2009
        warnings.simplefilter("ignore")
        batch = pickle.loads(content, encoding="latin1")
    return batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), batch["labels"]


def load_cifar10(data_dir: Path, split: Split) -> Images:
    """The whole split in the order of its files, the only ones that are opened: 50,000 or 10,000 images.

    Call `ensure_cifar10` first; a file that is damaged here and now is a UsageError.
    """
    labels: list[int] = []
    pixels = np.empty((0, 32, 32, 3), np.uint8)
    for number, name in enumerate(SPLIT_FILES[split]):  # one in memory at a time; all have equally many images
        its_pixels, its_labels = _unpickled(data_dir / FOLDER / name)
        if number == 0:
            pixels = np.empty((len(SPLIT_FILES[split]) * len(its_labels), 32, 32, 3), np.uint8)
        pixels[len(labels) : len(labels) + len(its_labels)] = its_pixels
        labels += its_labels
    return Images(pixels, np.array(labels, np.int64))
