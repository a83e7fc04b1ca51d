"""SVHN: 32x32 color pictures of house numbers' digits (Netzer et al. 2011), in MATLAB's format, which scipy reads."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar10 import UsageError
from cifar10.data.archived import Archived
from cifar10.data.dataset import Description, Images, Split
from cifar10.data.download import Archive


@dataclass(frozen=True)
class Svhn(Archived):
    """The cropped digits; the files are what is downloaded."""

    def ensure(self, data_dir: Path, *, need_test: bool) -> None:
        try:
            import scipy.io  # noqa: F401
        except ImportError:
            raise UsageError("--dataset svhn needs scipy, which is not installed; type uv sync --extra svhn") from None
        super().ensure(data_dir, need_test=need_test)

    def load(self, split: Split, data_dir: Path, seed: int = 0) -> Images:
        """The whole split, a 0 labeled 0 (10 in the file). Raises UsageError for a damaged file."""
        from scipy.io import loadmat

        (name,) = self.split_files[split]
        file = loadmat(io.BytesIO(self.intact(self.place(data_dir)[0] / name)))
        pixels, labels = file["X"].transpose(3, 0, 1, 2), file["y"].ravel().astype(np.int64) % 10
        return Images(np.ascontiguousarray(pixels), labels)


SVHN = Svhn(
    name="svhn",
    title="SVHN",
    folder=".",
    archives=(
        Archive("train_32x32.mat", 182_040_794, "e26dedcc434d2e4c54c9b2d4a06d8373", b"MATLAB"),
        Archive("test_32x32.mat", 64_275_384, "eb5a983be6a315427106f1b164d9cef3", b"MATLAB"),
    ),
    archives_in=".",
    sources=("http://ufldl.stanford.edu/housenumbers",),
    page="http://ufldl.stanford.edu/housenumbers",
    files={"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373", "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"},
    split_files={"train": ("train_32x32.mat",), "test": ("test_32x32.mat",)},
    description=Description(
        train_images=73_257,
        test_images=26_032,
        size=32,
        channels=3,
        classes=tuple("0123456789"),
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
    ),
)
