"""python -m cifar10 compare: which runs are started, when it ends, and what it says; one real comparison is a slow test."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cifar10.__main__ import main
from cifar10.commands import compare
from cifar10.commands.compare import as_flags, split_candidates
from tests.launching import run
from tests.report.test_report import make_run, words

BETTER = "bn_cnn --lr 0.2"
COMMON = ("--dataset", "synthetic", "--threads", "1")


@pytest.fixture
def trained_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """Runs without the launcher: of the accuracies that a function gives for a folder, with a code that ends them."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    started: list[Path] = []

    def give(accuracy: Callable[[str, int], float], stop_at: int | None = None) -> list[Path]:
        def train(_launch: object, _ranks: int, flags: list[str], _steps: int | None, folder: Path) -> int:
            if (folder / "summary.json").exists():
                return 0
            assert flags[-1] == f"--output-dir={folder}"
            assert {"--sealed", "--no-report"} <= {*flags}
            if len(started) == stop_at:
                return 75
            started.append(folder)
            seed = int(folder.name.removeprefix("seed_"))
            make_run(folder, seed=seed, test=None)
            content = json.loads((folder / "summary.json").read_text())
            content["val_accuracy"] = accuracy(folder.parent.name, seed)
            (folder / "summary.json").write_text(json.dumps(content))
            (folder / "ds_config.json").unlink()  # or its settings would be compared with the command's
            return 0

        monkeypatch.setattr(compare, "train", train)
        return started

    return give


def start(folder: Path, *argv: str) -> int:
    return main(["compare", "bn_cnn", BETTER, *argv, *COMMON, "--output-dir", str(folder)])


def accuracy(name: str, seed: int, gain: float = 0.01) -> float:
    return (
        0.6
        + np.random.default_rng(seed).normal(0, 0.002)
        + gain * ("0.2" in name)
        + 0.001 * np.random.default_rng([seed, "0.2" in name]).normal()
    )


def test_the_better_one_is_found_after_paired_seeds_in_turns(tmp_path, trained_runs, capsys):
    started = trained_runs(accuracy)
    assert start(tmp_path, "--seed", "3") == 0
    names = [f"{folder.parent.name} {folder.name}" for folder in started]
    a, b = "bn_cnn", "bn_cnn_lr_0.2"
    assert names[:4] == [f"{a} seed_3", f"{b} seed_3", f"{b} seed_4", f"{a} seed_4"]
    assert len(started) < 24
    said = capsys.readouterr().out
    assert f"{BETTER} is better than bn_cnn, decided after {len(started) // 2} pairs; {BETTER} - bn_cnn: +" in said
    assert "95% interval +" in said
    assert f"cost: {1.5 * len(started):.1f} minutes of training" in said
    page = words(tmp_path / "compare.html")
    assert f"{BETTER} is better than bn_cnn, decided after" in page
    assert "Within 1.5 minutes of training each" in page


def test_a_stop_is_continued_by_the_same_command_and_a_limit_by_a_larger_one(tmp_path, trained_runs, capsys):
    started = trained_runs(lambda name, seed: accuracy(name, seed, 0), stop_at=5)
    assert start(tmp_path, "--max-runs", "8") == 75
    assert "to continue: python -m cifar10 compare bn_cnn 'bn_cnn --lr 0.2' --max-runs 8" in capsys.readouterr().out
    trained_runs(lambda name, seed: accuracy(name, seed, 0))
    assert start(tmp_path, "--max-runs", "8") == 0
    assert len(started) == len({*started}) == 8
    said = capsys.readouterr().out
    assert "--max-runs 8 is reached" in said
    assert "not decided between bn_cnn and bn_cnn --lr 0.2" in said
    assert start(tmp_path, "--max-runs", "12") == 0
    assert len(started) == len({*started}) == 12
    assert "could still have been missed" in capsys.readouterr().out


def test_a_candidate_that_is_beaten_gets_no_more_runs(tmp_path, trained_runs, capsys):
    started = trained_runs(lambda name, seed: accuracy(name, seed, 0.003) - 0.3 * ("0.01" in name))
    assert main(["compare", "bn_cnn", BETTER, "--lr 0.01", *COMMON, "--output-dir", str(tmp_path)]) == 0
    counts = {name: sum(folder.parent.name == name for folder in started) for name in ("bn_cnn", "bn_cnn_lr_0.2", "lr_0.01")}
    assert counts["lr_0.01"] < counts["bn_cnn"] == counts["bn_cnn_lr_0.2"]
    assert "98.33% interval" in capsys.readouterr().out  # 5% shared among three pairs


def test_a_grid_is_searched_by_halves_with_the_same_seeds(tmp_path, trained_runs, capsys):
    started = trained_runs(lambda name, seed: accuracy(name, seed, 0.05))
    grid = ["--grid", "--lr 0.05,0.1,0.2", "--set optimizer.params.weight_decay=1e-3,5e-4"]
    assert main(["compare", "bn_cnn", *grid, "--val-images", "500", *COMMON, "--output-dir", str(tmp_path)]) == 0
    seeds: dict[str, list[int]] = {}
    for folder in started:
        seeds.setdefault(folder.parent.name, []).append(int(folder.name.removeprefix("seed_")))
    assert sorted(map(len, seeds.values())) == [1, 1, 1, 2, 4, 4]  # 6, 3 and 2 candidates with 1, 2 and 4 seeds in all
    assert all(of == list(range(len(of))) for of in seeds.values())
    said = capsys.readouterr().out
    best = max(seeds, key=lambda name: (len(seeds[name]), "0.2" in name))
    assert "0.2" in best
    assert "is the best of the search" in said
    assert "compare bn_cnn 'bn_cnn --lr 0.2 --set optimizer.params.weight_decay=" in said
    assert said.splitlines()[-1].endswith("--val-images 500 --dataset synthetic --threads 1 --seed 4")
    assert "interval" not in said


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["bn_cnn"], "two candidates"),
        (["bn_cnn", "bn_cnn"], "given twice"),
        (["bn_cnn", "bn_cnn --val-images 100"], "another --val-images"),
        (["bn_cnn", "bn_cn"], "did you mean bn_cnn"),
        (["bn_cnn", "bn_cnn --lr '0.1"], "quotes"),
        (["bn_cnn", BETTER, "--val-images", "0"], "holds no validation images out"),
        (["bn_cnn", BETTER, "--max-runs", "1"], "--max-runs"),
        (["bn_cnn", BETTER, "--seeds", "3"], "--seeds"),
        (["bn_cnn", BETTER, "--grid", "--lr 0.1,0.2"], "all but one"),
        (["--grid", "--lr 0.1,,0.2"], "with values"),
        (["bn_cnn", BETTER, "--test-images", "10"], "--sealed"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(argv, named, tmp_path, capsys):
    assert main(["compare", *argv, *COMMON, "--output-dir", str(tmp_path / "c")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert not (tmp_path / "c").exists()


def test_candidates_are_names_and_quoted_flags():
    assert split_candidates(["a", "--lr 0.1", "b --lr 2", "--epochs", "3"]) == (
        ["a", "--lr 0.1", "b --lr 2"],
        ["--epochs", "3"],
    )
    assert as_flags("b --lr 2") == ["--recipe", "b", "--lr", "2"]
    assert as_flags("--set 'a={\"b\": 1}'") == ["--set", 'a={"b": 1}']


@pytest.mark.slow
def test_real_runs_are_compared_without_a_test_image(tmp_path):
    words_ = [
        sys.executable,
        "-m",
        "cifar10",
        "compare",
        "bn_cnn",
        "bn_cnn --lr 1e-9",
        "--dataset",
        "synthetic",
        "--threads",
        "1",
    ]
    process = run([*words_, "--max-steps", "8", "--max-runs", "4", "--output-dir", str(tmp_path)])
    assert process.returncode == 0, process.stderr
    assert "n = 2 pairs" in process.stdout
    folders = [path.parent for path in tmp_path.rglob("summary.json")]
    assert len(folders) == 4
    assert all(json.loads((folder / "summary.json").read_text())["test_images"] == 0 for folder in folders)
    assert not list(tmp_path.rglob("test_ledger.jsonl"))
    assert (tmp_path / "compare.html").is_file()
