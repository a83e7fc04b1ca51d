"""main.py --seeds: the runs that are started, stops and failures, and the summary at the end."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import main
from cifar10.launch import supervise
from cifar10.launch.command import LaunchOptions
from cifar10.launch.seeds import print_summary, summary_lines
from cifar10.run.record import open_record
from tests.launching import SHORT, run, summary
from tests.report.test_report import make_run

FLAGS = ["--dataset", "synthetic", "--threads", "1"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """main.py without the launcher: each run ends at once with the next of these codes; the flags of each."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    flags_of_each: list[list[str]] = []

    def ends_with(*codes: int) -> list[list[str]]:
        left = list(codes)

        def train_once(options: LaunchOptions, ranks: int, flags: list[str], folder: Path) -> int:
            assert options.seeds is None
            flags_of_each.append(flags)
            code = left.pop(0)
            shutil.rmtree(folder, ignore_errors=True)
            seed = int(folder.name.removeprefix("seed_"))
            make_run(folder, seed=seed, test=0.5 + seed / 10, status={0: "finished", 75: "stopped"}.get(code, "failed"))
            (folder / "ds_config.json").unlink()  # or its settings would be compared with the command's
            return code

        monkeypatch.setattr(supervise, "train_once", train_once)
        return flags_of_each

    return ends_with


def start(folder: Path, *flags: str) -> int:
    return main.main([*FLAGS, *flags, "--output-dir", str(folder)])


def test_seeds_are_counted_from_the_given_one_and_each_has_a_folder(tmp_path, launched, capsys):
    flags = launched(0, 0, 0)
    assert start(tmp_path, "--seeds", "3", "--seed=2", "--report") == 0
    assert [words[-4:-2] for words in flags] == [[f"--seed={s}", f"--output-dir={tmp_path}/seed_{s}"] for s in (2, 3, 4)]
    printed = capsys.readouterr().out
    assert "3 of 3 seeds finished:" in printed
    assert "seed_3: finished; train accuracy 41.00%, val accuracy 62.00%, test accuracy 80.00%" in printed
    assert "test accuracy over seeds: 80.00 ± 10.00% (n = 3, 95% interval of the mean 55.16 to 100.00%)" in printed
    assert printed.splitlines()[-1] == f"report: {tmp_path}/compare.html"
    assert "80.00 ± 10.00%" in (tmp_path / "compare.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("seeds", "left"), [("1", "chosen"), ("2", None)])
def test_several_seeds_are_several_runs_at_wandb(seeds, left, tmp_path, launched, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")  # by a sweep's agent, for one run
    launched(0, 0)
    assert start(tmp_path, "--seeds", seeds) == 0
    assert os.environ.get("WANDB_RUN_ID") == left


def test_a_stop_ends_the_sweep_and_the_same_command_continues_it(tmp_path, launched, capsys):
    flags = launched(0, 75)
    assert start(tmp_path, "--seeds", "3") == 75
    assert len(flags) == 2
    printed = capsys.readouterr().out
    assert "1 of 2 seeds finished:" in printed
    how = printed.splitlines()[-1]
    assert how.startswith("to continue all seeds: ")
    assert how.endswith(f"--seeds 3 {' '.join(FLAGS)} --output-dir {tmp_path}")
    flags = launched(0, 0)
    for _ in range(2):  # the second time there is nothing left to train
        assert start(tmp_path, "--seeds", "3") == 0
        assert [words[-1][-1] for words in flags] == ["0", "1", "1", "2"]
        assert "seed_0 holds a finished run" in capsys.readouterr().out


def test_a_failure_does_not_end_the_sweep_but_is_its_exit_code(tmp_path, launched, capsys):
    flags = launched(0, 3, 0)
    assert start(tmp_path, "--seeds", "3") == 3
    assert len(flags) == 3
    assert "test accuracy over seeds: 60.00 ± 14.14% (n = 2" in capsys.readouterr().out


def test_an_invalid_seed_is_refused_before_any_is_started(tmp_path, launched, capsys):
    flags = launched()
    make_run(tmp_path / "seed_2", seed=2)  # of other settings than the command's
    assert start(tmp_path, "--seeds", "3") == 2
    assert flags == []
    assert "seed_2 holds a run with other settings" in capsys.readouterr().err


def test_without_reports_there_is_no_page(tmp_path, launched):
    launched(0)
    assert start(tmp_path, "--seeds", "1", "--no-report") == 0
    assert not (tmp_path / "compare.html").exists()


def test_with_a_corrupt_run_there_is_no_comparison(tmp_path, capsys):
    (make_run(tmp_path / "seed_0") / "metrics.csv").write_text("x,y\n1,2\n")
    print_summary(tmp_path, [tmp_path / "seed_0"], with_page=True)
    assert "no comparison: " in capsys.readouterr().out


def test_one_seed_has_no_interval_and_test_time_augmentation_has_a_line_of_its_own(tmp_path):
    folder = make_run(tmp_path / "seed_0")
    saved = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(saved | {"test_accuracy_tta": 0.75}))
    due = ["test accuracy over seeds: 50.00% (n = 1)", "test accuracy with test-time augmentation over seeds: 75.00% (n = 1)"]
    assert summary_lines([open_record(folder)])[-2:] == due


def test_after_a_launch_signals_are_what_they_were():
    before = [signal.getsignal(number) for number in supervise.SIGNALS]
    launch = supervise.Launch([sys.executable, "-c", "pass"], dict(os.environ))
    assert [signal.getsignal(number) for number in supervise.SIGNALS] != before
    assert launch.wait() == 0
    assert [signal.getsignal(number) for number in supervise.SIGNALS] == before


@pytest.mark.slow
def test_real_runs_of_two_seeds(tmp_path):
    process = run([sys.executable, "main.py", *SHORT, "--seeds", "2", "--output-dir", str(tmp_path)], OMP_NUM_THREADS="1")
    assert (process.returncode, process.stderr) == (0, "")
    results = [summary(tmp_path / f"seed_{seed}") for seed in (0, 1)]
    assert [result["seed"] for result in results] == [0, 1]
    assert results[0]["weights_sha256"] != results[1]["weights_sha256"]
    mean = sum(result["test_accuracy"] for result in results) / 2
    assert f"test accuracy over seeds: {100 * mean:.2f} ± " in process.stdout
