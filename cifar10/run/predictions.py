"""A model's predictions on a split: logits and true labels in the split's order, in one .npz file.

Reports compute everything about single images and classes from this file, without the model.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar10 import UsageError
from cifar10.files import written_whole

TEST_FILE = "test_predictions.npz"  # best_model's, written by the final test and by `evaluate`


@dataclass(frozen=True)
class Predictions:
    """Logits float32 [N, classes] and labels int64 [N]."""

    logits: np.ndarray
    labels: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """Softmax of the logits: float64 [N, classes]."""
        shifted = np.exp(self.logits.astype(np.float64) - self.logits.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)

    @property
    def predicted(self) -> np.ndarray:
        """The predicted classes: int64 [N]."""
        return self.logits.argmax(axis=1)

    @property
    def accuracy(self) -> float:
        return float((self.predicted == self.labels).mean())


def interleaved(parts: Sequence[np.ndarray]) -> np.ndarray:
    """All ranks' rows in the split's order: of R ranks, rank r has rows r, r + R, r + 2 R, ..."""
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def save_predictions(path: Path, parts: Sequence[np.ndarray], labels: np.ndarray) -> bool:
    """Write the logits of all ranks to a file for `read`; returns whether that worked: a full disk does not end the run."""
    try:
        with written_whole(path) as file:
            np.savez_compressed(file, logits=interleaved(parts), labels=labels)
    except OSError as error:
        print(f"cannot write {path}: {error.strerror}", file=sys.stderr)
        return False
    return True


def read(path: Path) -> Predictions | None:
    """Load what `save_predictions` wrote, without unpickling; None if it is missing. Raises UsageError if it is corrupt."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = Predictions(file["logits"].astype(np.float32), file["labels"].astype(np.int64))
        if found.logits.ndim != 2 or found.labels.shape != found.logits.shape[:1] or not len(found.labels):
            raise ValueError(f"logits {found.logits.shape} for labels {found.labels.shape}")
    except FileNotFoundError:
        return None
    except Exception as error:  # a corrupt or foreign file
        raise UsageError(f"{path} is damaged ({type(error).__name__}); `python -m cifar10 evaluate` rewrites it") from None
    return found
