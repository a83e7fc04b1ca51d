"""Images as uint8 arrays: CIFAR-10 from disk (verified, repaired, else downloaded), or made in memory, learnable or not.

The files are torchvision's: `<data_dir>/cifar-10-batches-py/data_batch_1` and so on, each a pickle with a known md5, made
from `cifar-10-python.tar.gz`. A pickle can run code, so only bytes with the known md5 are ever unpickled. Importing this
file needs neither torch nor torchvision: the launcher checks the data before it starts any rank.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import pickle
import sys
import tarfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cifar10 import UsageError
from cifar10.files import TIMEOUT_SECONDS, one_process_at_a_time, written_whole

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

CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Images:
    """One split, in its fixed order."""

    pixels: np.ndarray  # uint8 [N, S, S, C]: [N, 32, 32, 3] RGB for CIFAR-10, [N, 28, 28, 1] grey for MNIST
    labels: np.ndarray  # int64 [N], 0..9, indices into the data set's classes

    def __len__(self) -> int:
        return len(self.labels)


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


def _has_md5(path: Path, md5: str) -> bool:
    """Whether `path` is a file with this md5; read in pieces, for the archive is large. Raises OSError if unreadable."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except FileNotFoundError:
        return False
    return digest.hexdigest() == md5


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")  # one write, where print makes two: lines of several processes do not mix
    sys.stderr.flush()


# --- download: network trouble is a ConnectionError here, so that any other OSError is the disk's ---------------------


@contextmanager
def _network() -> Iterator[None]:
    """Turn whatever a network call raises into a ConnectionError with a one-line reason."""
    try:
        yield
    except urllib.error.HTTPError as error:
        raise ConnectionError(f"the server answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)  # URLError wraps the true one
        if isinstance(reason, TimeoutError):
            reason = f"no answer for {TIMEOUT_SECONDS:g} seconds"
        raise ConnectionError(" ".join(str(reason).split()) or type(error).__name__) from error


def _connect(url: str, offset: int) -> tuple[http.client.HTTPResponse, int] | None:
    """Ask for `url` from byte `offset` on -> (response, bytes it announces; 0 = unknown), or None: nothing lies there."""
    headers = {"User-Agent": "cifar10-deepspeed"} | ({"Range": f"bytes={offset}-"} if offset else {})
    with _network():
        try:
            response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            if offset and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return None
            raise
        return response, int(response.headers.get("Content-Length") or 0)


@contextmanager
def _progress_bar(done_bytes: int, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal; yields the function to call with each number of new bytes."""
    if not sys.stderr.isatty():
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=total_bytes or None, completed=done_bytes)
        yield lambda num_bytes: progress.advance(bar, num_bytes)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _transfer(url: str, part: Path) -> None:
    """Append to `part` what it lacks of `url`, or write it anew where the server cannot resume.

    Raises ConnectionError if the transfer fails, stalls or ends early; `part` then keeps what came.
    """
    done = _size(part)
    connection = _connect(url, done)
    if connection is None:  # `part` already reaches to the end; its md5 will tell
        return
    response, announced = connection
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        done = done if resumed else 0
        total = announced and done + announced
        with open(part, "ab" if resumed else "wb") as file, _progress_bar(done, total) as advance:
            while True:
                with _network():
                    chunk = response.read1(CHUNK_BYTES)  # what is there: read() would lose it if the rest never came
                if not chunk:
                    break
                file.write(chunk)
                advance(len(chunk))
    if _size(part) < total:
        raise ConnectionError(f"the connection closed after {_size(part)} of {total} bytes")


def _fetch(url: str, part: Path) -> None:
    """`_transfer`, and once more from where it broke. If nothing came at all, no second try keeps the user waiting."""
    before = _size(part)
    try:
        _transfer(url, part)
    except ConnectionError:
        if _size(part) == before:
            raise
        _transfer(url, part)


def _download(url: str, archive: Path) -> None:
    """Fetch the archive to a `.part` file beside its name, verify it as a whole, rename it. Raises ConnectionError."""
    part = archive.with_name(archive.name + ".part")
    resuming = f", of which {_size(part) / 1e6:.1f} MB are there" if _size(part) else ""
    _say(f"fetching CIFAR-10 from {url} to {archive}{resuming}")
    began = time.monotonic()
    for _ in range(2):  # a .part that turns out wrong is thrown away once, and all of it fetched anew
        _fetch(url, part)
        if _has_md5(part, ARCHIVE_MD5):
            break
        part.unlink()
        _say(f"{part} was not the archive (its md5 differs) and is thrown away")
    else:
        raise ConnectionError(f"what it sends is not {ARCHIVE} (its md5 differs)")
    os.replace(part, archive)
    _say(f"fetched {_size(archive) / 1e6:.1f} MB in {time.monotonic() - began:.1f} seconds, md5 verified")


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
        _say(f"{data_dir / FOLDER}: repairing {_listed(damaged)}")
    if not _has_md5(archive, ARCHIVE_MD5):
        if archive.exists():
            _say(f"{archive} is damaged (its md5 differs)")
        _download(os.environ.get("CIFAR10_URL") or URL, archive)
    _extract(archive, data_dir / FOLDER, {*faults, *absent})
    _say(f"{data_dir / FOLDER}: {len({*faults, *absent})} files written from {archive.name}, md5 verified")


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


def load_cifar10(data_dir: Path, split: Literal["train", "test"]) -> Images:
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


def _words(key: int, stream: int) -> np.random.Philox:
    """A source of random 64-bit words, by counter: the same on every platform and in every version of NumPy."""
    return np.random.Philox(key=np.array([key, stream], np.uint64))


SYNTHETIC_STREAMS = {"train": 0, "test": 1, "patterns": 2}
NOISE_STREAMS = {"train": 3, "test": 4}
PATTERNS_PER_CLASS = 3
MAX_SHIFT = 16  # pixels


def _patterns() -> np.ndarray:
    """The synthetic classes, the same for every seed: smooth colour fields -> int16 [10, PATTERNS, 48, 48, 3], -128..127.

    Whole numbers throughout: floating point may round differently on another machine.
    """
    cells = _words(0, SYNTHETIC_STREAMS["patterns"]).random_raw(10 * PATTERNS_PER_CLASS * 4 * 4 * 3) & np.uint64(255)
    field = cells.astype(np.int64).reshape(10, PATTERNS_PER_CLASS, 4, 4, 3) - 128
    for axis in (2, 3):  # bilinear, 4 cells -> 32 pixels, periodic
        steps = [(8 - k) * field + k * np.roll(field, -1, axis) for k in range(8)]
        field = np.stack(steps, axis + 1).reshape(*field.shape[:axis], 32, *field.shape[axis + 1 :])
    field = (field >> 6).astype(np.int16)
    return np.pad(field, [(0, 0), (0, 0), (0, MAX_SHIFT), (0, MAX_SHIFT), (0, 0)], mode="wrap")


def synthetic(split: Literal["train", "test"], num_images: int, seed: int) -> Images:
    """Ten learnable classes in memory: image i is a pattern of class i % 10, shifted, dimmed, brightened, with noise.

    Image i is a function of (seed, split, i) alone, not of `num_images`, and is the same on every platform. The seed
    draws the images; the classes stay the same, so what is learned from one seed holds for another.
    """
    labels = np.arange(num_images, dtype=np.int64) % 10
    pixels = np.empty((num_images, 32, 32, 3), np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(_patterns(), (32, 32), axis=(2, 3))
    windows = windows.transpose(0, 1, 2, 3, 5, 6, 4)  # [class, pattern, dy, dx, 32, 32, 3]
    words = _words(seed, SYNTHETIC_STREAMS[split])
    for start in range(0, num_images, 1000):  # small pieces stay in the cache
        out = pixels[start : start + 1000]
        draws = words.random_raw((len(out), 32 * 32 * 3 // 8 + 1)).astype("<u8").view(np.uint8)  # [n, 3072 + 8]
        noise = draws[:, :3072].reshape(out.shape).astype(np.int16) - 128
        pattern, dy, dx, contrast, light = draws[:, 3072:3077].T.astype(np.int16)
        image = windows[labels[start : start + 1000], pattern % PATTERNS_PER_CLASS, dy % (MAX_SHIFT + 1), dx % (MAX_SHIFT + 1)]
        image = image * (64 + contrast // 4)[:, None, None, None] >> 8  # -64..63
        out[:] = 128 + image + (light // 8 - 16)[:, None, None, None] + (noise >> 2)
    return Images(pixels, labels)


def synthetic_grey(split: Literal["train", "test"], num_images: int, seed: int) -> Images:
    """The synthetic images in MNIST's shape: the middle of their green channel, uint8 [N, 28, 28, 1]."""
    images = synthetic(split, num_images, seed)
    return Images(np.ascontiguousarray(images.pixels[:, 2:30, 2:30, 1:2]), images.labels)


def noise(split: Literal["train", "test"], num_images: int, seed: int) -> Images:
    """Uniform noise in MNIST's shape with uniformly random labels: nothing can be learned, everything can be memorised.

    Image i and its label are a function of (seed, split, i) alone, the same on every platform.
    """
    pixels = 28 * 28  # 98 words of 8 bytes; one more for the label
    words = _words(seed, NOISE_STREAMS[split]).random_raw((num_images, pixels // 8 + 1)).astype("<u8")
    labels = (words[:, -1] % np.uint64(10)).astype(np.int64)
    return Images(words.view(np.uint8)[:, :pixels].reshape(num_images, 28, 28, 1).copy(), labels)


def stratified_split(labels: np.ndarray, val_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, val), both sorted int64: a choice fixed by `seed`, with the classes as equal as can be in val.

    Of two sizes with one seed, the larger val contains the smaller. Raises UsageError unless 0 <= val_images < N.
    """
    if not 0 <= val_images < len(labels):
        raise UsageError(
            f"--val-images {val_images} is impossible with {len(labels)} training images; "
            f"type a number from 0 to {len(labels) - 1}"
        )
    shuffled = np.argsort(_words(seed, 0).random_raw(len(labels)), kind="stable")
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]  # class after class, each in random order
    counts = np.bincount(labels)
    position = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)  # of each image within its class
    share = (position + 0.5) / np.repeat(counts, counts)
    chosen = by_class[np.argsort(share, kind="stable")]  # round after round, one of each class, in proportion to its size
    return np.sort(chosen[val_images:]), np.sort(chosen[:val_images])
