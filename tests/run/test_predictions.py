"""Predictions for reports: every image once, in the split's order, from any number of ranks."""

import numpy as np
import pytest

from cifar10 import UsageError
from cifar10.run.predictions import interleaved, read, save_predictions


@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
def test_the_logits_of_all_ranks_come_back_in_the_splits_order(ranks, tmp_path):
    logits, labels = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32), np.arange(11) % 4
    save_predictions(tmp_path / "p.npz", [logits[rank::ranks] for rank in range(ranks)], labels)
    found = read(tmp_path / "p.npz")
    assert np.array_equal(found.logits, logits)
    assert np.array_equal(found.labels, labels)
    assert found.accuracy == (logits.argmax(axis=1) == labels).mean()
    assert np.allclose(found.probabilities, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))


def test_large_logits_have_finite_probabilities(tmp_path):
    save_predictions(tmp_path / "p.npz", [np.float32([[1000, 0], [0, 1000]])], np.array([0, 0]))
    found = read(tmp_path / "p.npz")
    assert found.probabilities.tolist() == [[1, 0], [0, 1]]
    assert found.accuracy == 0.5


def test_parts_may_be_empty():
    parts = [np.ones((1, 3), np.float32), np.ones((0, 3), np.float32)]
    assert interleaved(parts).shape == (1, 3)


def test_no_file_is_none_and_a_damaged_one_is_named(tmp_path):
    assert read(tmp_path / "none.npz") is None
    for content in (b"", b"PK\x03\x04 something", b"\x93NUMPY"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.npz"):
            read(tmp_path / "bad.npz")
    for logits, labels in ((np.ones((2, 3)), np.ones(3)), (np.ones(3), np.ones(3)), (np.ones((0, 3)), np.ones(0))):
        np.savez(tmp_path / "odd.npz", logits=logits, labels=labels)
        with pytest.raises(UsageError, match=r"odd\.npz"):
            read(tmp_path / "odd.npz")


def test_a_full_disk_is_reported_and_ends_nothing(tmp_path, capsys):
    save_predictions(tmp_path / "no_such_folder" / "p.npz", [np.ones((1, 2), np.float32)], np.zeros(1, int))
    assert "p.npz" in capsys.readouterr().err
