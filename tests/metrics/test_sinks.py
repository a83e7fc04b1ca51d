"""The CSV files, and what the console shows with and without a terminal."""

from __future__ import annotations

import csv
import re
import threading
from pathlib import Path

import pytest

from cifar10.metrics.console import ConsoleSink
from cifar10.metrics.csv_sink import CsvSink
from cifar10.metrics.sink import EpochRow, Metrics, Sink, StepRow, Steps
from cifar10.run.summary import SplitResult

TRAIN = SplitResult(loss=1.25, accuracy=0.5625, images=3_200, seconds=2.0)
VAL = SplitResult(loss=1.5, accuracy=0.5, images=500, seconds=0.5)
TEST = SplitResult(loss=1.75, accuracy=0.4375, images=1_000, seconds=1.0)


def step_row(step: int, epoch: int = 1, skipped: int = 0) -> StepRow:
    return StepRow(step, epoch, loss=2.25, accuracy=0.125, grad_norm=3.5, lr=0.0125, skipped=skipped)


def epoch_row(epoch: int, val: SplitResult | None = VAL, skipped: int = 0) -> EpochRow:
    return EpochRow(epoch, TRAIN, val, grad_norm=1.5, lr=0.0125, skipped=skipped)


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_columns_and_rows_of_the_files(tmp_path):
    sink = CsvSink(tmp_path, step=0, epoch=0)
    sink.step(step_row(100, skipped=2))
    sink.epoch(epoch_row(1))
    sink.epoch(epoch_row(2, val=None))
    sink.test(2, TEST)
    sink.close()
    header = (tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "epoch,phase,loss,accuracy,throughput"
    assert (tmp_path / "steps.csv").read_text(encoding="utf-8").splitlines()[
        0
    ] == "step,epoch,loss,accuracy,grad_norm,lr,skipped"
    assert [row[:2] for row in rows(tmp_path / "metrics.csv")[1:]] == [
        ["1", "train"],
        ["1", "val"],
        ["2", "train"],
        ["2", "test"],
    ]
    numbers = [[float(value) for value in row[2:]] for row in rows(tmp_path / "metrics.csv")[1:]]
    assert numbers == [[1.25, 0.5625, 1_600], [1.5, 0.5, 1_000], [1.25, 0.5625, 1_600], [1.75, 0.4375, 1_000]]
    assert [float(value) for value in rows(tmp_path / "steps.csv")[1]] == [100, 1, 2.25, 0.125, 3.5, 0.0125, 2]


def test_a_row_is_in_the_file_before_the_next_one_comes(tmp_path):
    sink = CsvSink(tmp_path, step=0, epoch=0)
    sink.step(step_row(100))
    sink.epoch(epoch_row(1))
    assert len(rows(tmp_path / "steps.csv")) == 2
    assert len(rows(tmp_path / "metrics.csv")) == 3
    sink.close()


def test_a_small_number_keeps_its_digits(tmp_path):
    sink = CsvSink(tmp_path, step=0, epoch=0)
    sink.step(StepRow(1, 1, loss=1.2345678e-7, accuracy=1.0, grad_norm=float("nan"), lr=1.217974e-05, skipped=0))
    sink.close()
    row = rows(tmp_path / "steps.csv")[1]
    assert float(row[2]) == pytest.approx(1.2345678e-7, rel=1e-6)
    assert float(row[5]) == pytest.approx(1.217974e-05, rel=1e-6)


def test_on_a_resume_rows_later_than_the_checkpoint_are_cut_and_the_rest_kept(tmp_path):
    sink = CsvSink(tmp_path, step=0, epoch=0)
    for epoch in (1, 2, 3):
        for step in (100, 200):
            sink.step(step_row(step + 200 * (epoch - 1), epoch))
        sink.epoch(epoch_row(epoch))
    sink.test(3, TEST)
    sink.close()
    kept = {name: rows(tmp_path / name) for name in ("metrics.csv", "steps.csv")}

    sink = CsvSink(tmp_path, step=450, epoch=2)
    assert rows(tmp_path / "metrics.csv") == kept["metrics.csv"][:5]  # the header, and two splits of two epochs
    assert rows(tmp_path / "steps.csv") == kept["steps.csv"][:5]  # the header, and steps 100 to 400
    sink.step(step_row(500, 3))
    sink.epoch(epoch_row(3))
    sink.close()
    assert [row[:2] for row in rows(tmp_path / "metrics.csv")[-3:]] == [["2", "val"], ["3", "train"], ["3", "val"]]
    assert [row[0] for row in rows(tmp_path / "steps.csv")[1:]] == ["100", "200", "300", "400", "500"]


def test_a_test_row_is_never_kept_because_a_run_that_goes_on_is_tested_again(tmp_path):
    sink = CsvSink(tmp_path, step=0, epoch=0)
    sink.epoch(epoch_row(1))
    sink.test(1, TEST)
    sink.close()
    CsvSink(tmp_path, step=100, epoch=1).close()
    assert [row[1] for row in rows(tmp_path / "metrics.csv")] == ["phase", "train", "val"]


def test_a_new_run_in_an_old_folder_starts_with_empty_files(tmp_path):
    sink = CsvSink(tmp_path, step=0, epoch=0)
    sink.step(step_row(100))
    sink.epoch(epoch_row(1))
    sink.close()
    CsvSink(tmp_path, step=0, epoch=0).close()
    assert len(rows(tmp_path / "metrics.csv")) == len(rows(tmp_path / "steps.csv")) == 1


@pytest.mark.parametrize("torn", ["2", "200,1,2.2", "20x,1", ",,,", "\n\n"])
def test_a_row_that_a_crash_has_torn_is_cut(tmp_path, torn):
    sink = CsvSink(tmp_path, step=0, epoch=0)
    sink.step(step_row(100))
    sink.close()
    with (tmp_path / "steps.csv").open("a", encoding="utf-8") as file:
        file.write(torn)
    CsvSink(tmp_path, step=300, epoch=0).close()
    assert [row[0] for row in rows(tmp_path / "steps.csv")] == ["step", "100"]


# --- sinks ------------------------------------------------------------------------------------------------------------


def test_metrics_passes_everything_to_every_sink_in_order():
    class Recorder(Sink):
        def __init__(self) -> None:
            self.calls: list[tuple] = []

        def step(self, row):
            self.calls.append(("step", row))

        def epoch(self, row):
            self.calls.append(("epoch", row))

        def test(self, epoch, result):
            self.calls.append(("test", epoch, result))

        def event(self, text):
            self.calls.append(("event", text))

        def close(self):
            self.calls.append(("close",))

    sinks = [Recorder(), Recorder()]
    for metrics in (Metrics(sinks), Metrics()):  # the second is that of ranks other than 0
        metrics.step(step_row(1))
        metrics.epoch(epoch_row(1))
        metrics.test(1, TEST)
        metrics.event("text")
        metrics.close()
    due = [("step", step_row(1)), ("epoch", epoch_row(1)), ("test", 1, TEST), ("event", "text"), ("close",)]
    assert sinks[0].calls == sinks[1].calls == due


def test_throughput_without_time_is_none():
    assert SplitResult(1.0, 0.5, 100, 0.0).throughput == 0.0


# --- the console ------------------------------------------------------------------------------------------------------


def a_run(sink: ConsoleSink) -> None:
    """Two epochs of two log intervals."""
    for epoch in (1, 2):
        for step in (50, 100):
            sink.step(step_row(100 * (epoch - 1) + step, epoch))
        sink.epoch(epoch_row(epoch, skipped=3 if epoch == 2 else 0))
    sink.event("a line about the run")
    sink.close()


def test_without_a_terminal_there_is_one_plain_line_per_epoch(capsys):
    a_run(ConsoleSink(Steps(100, last=200), first_step=0, global_images=32))
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", printed)  # no escape codes, no carriage returns
    first, second, event = printed.splitlines()
    for number, line in enumerate((first, second), start=1):
        assert line.startswith(f"epoch {number}/2 ")
        assert "train loss 1.2500 accuracy 56.25%" in line
        assert "val loss 1.5000 accuracy 50.00%" in line
        assert "1,600 images/s" in line
        assert "grad norm 1.500" in line
        assert "lr 0.012500" in line
    assert "skipped" not in first
    assert "skipped 3 steps" in second
    assert event == "a line about the run"


def test_a_line_per_log_interval_counts_steps_within_the_epoch(capsys):
    a_run(ConsoleSink(Steps(100, last=200), first_step=0, global_images=32, prints_steps=True))
    lines = capsys.readouterr().out.splitlines()
    said = [line if line.startswith("[") else line.split("  ")[0] for line in lines]
    assert said == [
        "[1,    50] loss: 2.250",
        "[1,   100] loss: 2.250",
        "epoch 1/2",
        "[2,    50] loss: 2.250",
        "[2,   100] loss: 2.250",
        "epoch 2/2",
        "a line about the run",
    ]


def test_without_a_validation_split_none_is_mentioned(capsys):
    sink = ConsoleSink(Steps(200, last=100), first_step=0, global_images=32)
    sink.epoch(epoch_row(1, val=None))
    sink.close()
    line = capsys.readouterr().out
    assert line.startswith("epoch 1/1 ")
    assert "val" not in line


@pytest.mark.parametrize("text", ["runs/[bold]a[/bold]", "[/]", ":car:", "a" * 300, "two  spaces   stay"])
def test_a_line_is_printed_as_it_is(capsys, text):
    sink = ConsoleSink(Steps(100, last=100), first_step=0, global_images=32)
    sink.event(text)
    sink.close()
    assert capsys.readouterr().out == text + "\n"


def test_with_a_terminal_there_is_a_live_line_that_ends_with_the_run(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    before = set(threading.enumerate())
    sink = ConsoleSink(Steps(100, last=200), first_step=0, global_images=32)
    (refreshing,) = set(threading.enumerate()) - before
    a_run(sink)
    refreshing.join(timeout=60)
    assert not refreshing.is_alive()
    printed = capsys.readouterr().out
    assert "\x1b[" in printed
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed)
    assert "epoch 2/2  loss 2.2500  train accuracy 12.50%" in text
    assert "eta" in text
    assert "100%" in text
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    assert sum(line.startswith("epoch 1/2  train loss") for line in lines) == 1  # the epoch's own line is there as well
    assert "a line about the run" in lines


def test_a_live_line_goes_on_where_a_resumed_run_starts(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    sink = ConsoleSink(Steps(100, last=200), first_step=150, global_images=32)
    sink.close()
    assert "75%" in capsys.readouterr().out


def test_closing_twice_is_harmless(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    sink = ConsoleSink(Steps(1, last=1), first_step=0, global_images=32)
    sink.close()
    sink.close()
    capsys.readouterr()
    sink.event("still says what happened")
    assert "still says what happened" in capsys.readouterr().out
