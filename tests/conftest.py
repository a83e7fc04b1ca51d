"""Fixtures that several test files share."""

import os
import tempfile
from pathlib import Path

import pytest

from tests import helpers, small_trained
from tests.launching import COMMANDS, SHORT, run, summary

os.environ["CIFAR10_LEDGER"] = str(Path(tempfile.mkdtemp(prefix="ledger-")) / "test_ledger.jsonl")  # not beside the data
PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    """The folder of the real CIFAR-10. Without it tests are skipped, or fail where CIFAR10_TESTS_NEED_DATA is set (.ci/run)."""
    for folder in (os.environ.get("CIFAR10_DIR"), PROJECT.parent / "shared" / "data", PROJECT / "data"):
        if folder and (Path(folder) / "cifar-10-batches-py" / "data_batch_1").is_file():
            return Path(folder).resolve()
    if os.environ.get("CIFAR10_TESTS_NEED_DATA"):
        pytest.fail("CIFAR10_TESTS_NEED_DATA is set, and there is no real data set")
    pytest.skip("needs the real data set: set CIFAR10_DIR to a folder that holds cifar-10-batches-py")


@pytest.fixture(scope="session")
def two_ranks_here(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sha256 of the weights that the short run ends with on two ranks of this machine."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    process = run([*COMMANDS["torchrun, 2 ranks"], *SHORT, "--output-dir", str(folder)], OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr
    return summary(folder)["weights_sha256"]


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the trained runs of small_trained.RUNS."""
    base = tmp_path_factory.mktemp("trained")
    small_trained.train_all(base, small_trained.RUNS)
    return base


@pytest.fixture
def trained(trained_once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with data sets as small in this process as those runs had. Tests leave the folders as they are."""
    helpers.cut_down(monkeypatch)
    return trained_once
