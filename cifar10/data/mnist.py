"""MNIST, downloaded and read by torchvision, which is not imported to check files that are there."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cifar10 import UsageError
from cifar10.data.dataset import DataSet, Description, Images, Split
from cifar10.files import download_limits, one_process_at_a_time

FOLDER = Path("MNIST") / "raw"
FILES = {  # name -> bytes: a header, and one byte a pixel or label
    "train-images-idx3-ubyte": 16 + 60_000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}
DESCRIPTION = Description(
    train_images=60_000,
    test_images=10_000,
    size=28,
    channels=1,
    classes=tuple("0123456789"),
    mean=(0.1307,),
    std=(0.3081,),
    tiers=(0.90, 0.70, 0.50),
)
INSTEAD = "point --data-dir at a folder that holds MNIST/raw, or use --dataset synthetic_mnist"


def _missing(folder: Path) -> list[str]:
    return [name for name in FILES if not (folder / name).exists()]


def _damaged(folder: Path) -> list[str]:
    """Files with another size, with what is wrong."""
    sizes = {name: (folder / name).stat().st_size for name in FILES if (folder / name).exists()}
    return [f"{name} ({sizes[name]} of {FILES[name]} bytes)" for name in sizes if sizes[name] != FILES[name]]


class Mnist(DataSet):
    """All four files are needed: torchvision reads none without the others."""

    def describe(self, data_dir: Path) -> Description:
        return DESCRIPTION

    def ensure(self, data_dir: Path, *, need_test: bool) -> None:
        """Download missing files; a damaged one is a UsageError."""
        folder = data_dir / FOLDER
        if _missing(folder) and not _damaged(folder):
            from torchvision.datasets import MNIST

            try:
                folder.mkdir(parents=True, exist_ok=True)
                with one_process_at_a_time(data_dir / ".mnist.lock", f"fetching MNIST to {data_dir}"):
                    if _missing(folder):  # else another process was faster
                        with download_limits():
                            MNIST(data_dir, download=True)
            except (OSError, RuntimeError, EOFError) as error:  # the network, the disk; a wrong md5; an archive cut short
                reason = " ".join(str(error).split())
                raise UsageError(f"no MNIST in {data_dir}, and it cannot be downloaded: {reason}; {INSTEAD}") from None
        if faults := _damaged(folder):
            raise UsageError(f"MNIST in {folder} is damaged: {', '.join(faults)}; delete that file to restore it, or {INSTEAD}")

    def load(self, split: Split, data_dir: Path, seed: int) -> Images:
        from torchvision.datasets import MNIST

        try:
            files = MNIST(data_dir, train=split == "train")
            pixels, labels = files.data.numpy(), files.targets.numpy()
            expected = (DESCRIPTION.num_images(split), DESCRIPTION.size, DESCRIPTION.size)
            if pixels.shape != expected or labels.shape != expected[:1] or labels.max() >= len(DESCRIPTION.classes):
                raise ValueError(f"images {pixels.shape}, labels {labels.shape} up to {labels.max()}")
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(f"MNIST in {data_dir / FOLDER} is damaged: {reason}; delete that folder, or {INSTEAD}") from None
        return Images(pixels[..., None], labels.astype(np.int64))


MNIST = Mnist()
