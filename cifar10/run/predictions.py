"""What a model answered on a split: its logits and the true labels, in the split's order, in one small file.

Everything that a report says of single images or classes is computed from this file, without the model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar10 import UsageError
from cifar10.files import written_whole

TEST_FILE = "test_predictions.npz"  # in a run's folder: best_model's, written by the run's own test, and anew by evaluate


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
    def answers(self) -> np.ndarray:
        """The class with the largest logit: int64 [N]."""
        return self.logits.argmax(axis=1)

    @property
    def accuracy(self) -> float:
        return float((self.answers == self.labels).mean())


def interleaved(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of all ranks in the split's order: of R ranks, rank r has rows r, r + R, r + 2 R, ..."""
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def save_predictions(path: Path, parts: Sequence[np.ndarray], labels: np.ndarray) -> bool:
    """Write a file for `read` from the logits of all ranks; a disk that will not take it does not end a run: it is told.

    Returns whether the file is written.
    """
    try:
        with written_whole(path) as file:
            np.savez_compressed(file, logits=interleaved(parts), labels=labels)
    except OSError as error:
        print(f"{path} is not written: {error.strerror}", file=sys.stderr)
        return False
    return True


def read(path: Path) -> Predictions | None:
    """What `save_predictions` wrote; None if there is no such file. Raises UsageError for something else; executes nothing."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = Predictions(file["logits"].astype(np.float32), file["labels"].astype(np.int64))
        if found.logits.ndim != 2 or found.labels.shape != found.logits.shape[:1] or not len(found.labels):
            raise ValueError(f"logits {found.logits.shape} for labels {found.labels.shape}")
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever bytes that are no such file make of a reader
        raise UsageError(f"{path} is damaged ({type(error).__name__}); `python -m cifar10 evaluate` writes it anew") from None
    return found
