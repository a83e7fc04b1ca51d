"""The CSV files, and what the console shows with and without a terminal."""

import csv
import re
import sys
import threading
from asyncio import CancelledError
from collections.abc import Callable
from pathlib import Path

import pytest

from cifar10.metrics.console import ConsoleSink
from cifar10.metrics.csv_sink import CsvSink
from cifar10.metrics.sink import EpochRow, Metrics, ScalarSink, Section, Sink, StepRow, Steps
from cifar10.run.state import Sums
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
    monkeypatch.setenv("TERM", "xterm-256color")


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_columns_and_rows_of_the_files_which_are_there_at_once(tmp_path):
    sink = CsvSink(tmp_path, step=0, epoch=0)
    sink.step(step_row(100, skipped=2))
    sink.epoch(epoch_row(1))
    sink.epoch(epoch_row(2, val=None))
    sink.test(2, TEST)
    header, *lines = rows(tmp_path / "metrics.csv")  # the files are still open
    assert header == ["epoch", "phase", "loss", "accuracy", "throughput"]
    assert [line[:2] for line in lines] == [["1", "train"], ["1", "val"], ["2", "train"], ["2", "test"]]
    numbers = [[float(value) for value in line[2:]] for line in lines]
    assert numbers == [[1.25, 0.5625, 1_600], [1.5, 0.5, 1_000], [1.25, 0.5625, 1_600], [1.75, 0.4375, 1_000]]
    header, line = rows(tmp_path / "steps.csv")
    assert header == ["step", "epoch", "loss", "accuracy", "grad_norm", "lr", "skipped"]
    assert [float(value) for value in line] == [100, 1, 2.25, 0.125, 3.5, 0.0125, 2]
    sink.close()


def test_of_experts_there_are_a_file_a_line_and_scalars_and_of_other_networks_none(tmp_path, capsys):
    scalars = {}

    class Scalars(ScalarSink):
        steps = Steps(per_epoch=10, last=20)

        def log(self, prefix: str, step: int, **values: float) -> None:
            scalars[prefix, step] = values

    sums = Sums()
    for tokens in ((30.0, 10.0), (50.0, 10.0)):  # of two experts, of which each step drops 5
        sums.add(32, 2.25, 4, 3.5, [1.5, 5.0, *tokens])
    sinks = CsvSink(tmp_path, step=0, epoch=0), ConsoleSink(Steps(per_epoch=10, last=20), 0, 32), Scalars()
    for sink in sinks:
        sink.epoch(epoch_row(1))
    assert not (tmp_path / "experts.csv").exists()
    assert "experts" not in capsys.readouterr().out
    for sink in sinks:
        sink.epoch(EpochRow.of(2, sums, 0.0125, TRAIN, VAL))
        sink.close()
    measured = {"balance_loss": 1.5, "dropped": 0.1, "share_0": 0.8, "share_1": 0.2}
    header, line = rows(tmp_path / "experts.csv")
    assert dict(zip(header, map(float, line), strict=True)) == {"epoch": 2, **measured}
    assert scalars["experts", 20] == measured
    assert ("experts", 10) not in scalars
    assert capsys.readouterr().out.splitlines()[-1] == "experts: tokens 80.0% 20.0%, dropped 10.00%, balance loss 1.5000"


def test_a_small_number_keeps_its_digits(tmp_path):
    sink = CsvSink(tmp_path, step=0, epoch=0)
    sink.step(StepRow(1, 1, loss=1.2345678e-7, accuracy=1.0, grad_norm=float("nan"), lr=1.217974e-05, skipped=0))
    sink.close()
    row = rows(tmp_path / "steps.csv")[1]
    assert (float(row[2]), float(row[5])) == (pytest.approx(1.2345678e-7, rel=1e-6), pytest.approx(1.217974e-05, rel=1e-6))


def test_a_resume_cuts_the_rows_after_the_checkpoint_and_those_of_the_test(tmp_path):
    sink = CsvSink(tmp_path, step=0, epoch=0)
    for epoch in (1, 2, 3):
        for step in (100, 200):
            sink.step(step_row(step + 200 * (epoch - 1), epoch))
        sink.epoch(epoch_row(epoch))
    sink.test(2, TEST)
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

    CsvSink(tmp_path, step=0, epoch=0).close()  # a new run
    assert len(rows(tmp_path / "metrics.csv")) == len(rows(tmp_path / "steps.csv")) == 1


@pytest.mark.parametrize("torn", ["2", "200,1,2.2", "20x,1", ",,,", "\n\n"])
def test_a_row_torn_by_a_crash_is_cut(tmp_path, torn):
    sink = CsvSink(tmp_path, step=0, epoch=0)
    sink.step(step_row(100))
    sink.close()
    with (tmp_path / "steps.csv").open("a", encoding="utf-8") as file:
        file.write(torn)
    CsvSink(tmp_path, step=300, epoch=0).close()
    assert [row[0] for row in rows(tmp_path / "steps.csv")] == ["step", "100"]


# --- sinks ------------------------------------------------------------------------------------------------------------


def test_metrics_passes_everything_to_every_sink_in_order():
    verbs, calls = ("step", "epoch", "test", "event", "finished", "close"), []

    class Recorder(Sink):
        def __getattribute__(self, verb):
            return (lambda *what: calls.append((verb, *what))) if verb in verbs else super().__getattribute__(verb)

    due = [("step", step_row(1)), ("epoch", epoch_row(1)), ("test", 1, TEST), ("event", "text"), ("finished", {}), ("close",)]
    for metrics in (Metrics([Recorder(), Recorder()]), Metrics()):  # the second is that of ranks other than 0
        for verb, *what in due:
            getattr(metrics, verb)(*what)
    assert calls == [call for call in due for _ in range(2)]


class Gone(Sink):
    """A sink that raises this whatever it is given, also when it is closed."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __getattribute__(self, verb: str) -> Callable[..., None]:
        if verb not in ("event", "close"):
            return super().__getattribute__(verb)

        def fails(*_: object) -> None:
            raise super(Gone, self).__getattribute__("_error")

        return fails


FAULTS = [
    OSError(28, "No space left"),
    BrokenPipeError(),
    SystemExit(1),
    GeneratorExit(),
    UnicodeEncodeError("a", "±", 0, 1, ""),
]
FAULTS += [MemoryError(), RecursionError(), CancelledError(), ValueError("I/O operation on closed file"), StopIteration()]


@pytest.mark.parametrize("error", FAULTS, ids=repr)
def test_a_sink_that_goes_ends_nothing_whatever_it_raises(capsys, error):
    metrics = Metrics([Gone(error), ConsoleSink(Steps(100, last=200), first_step=0, global_images=32)])
    metrics.event("first")
    metrics.event("second")
    metrics.close()
    printed, errors = capsys.readouterr()
    assert printed == "first\nsecond\n"
    (line,) = errors.splitlines()
    assert line.startswith("Gone failed (")


def test_the_users_ctrl_c_is_no_fault_of_a_sink():
    with pytest.raises(KeyboardInterrupt):
        Metrics([Gone(KeyboardInterrupt())]).event("x")


def test_throughput_without_time_is_zero():
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
    numbers = "train loss 1.2500 accuracy 56.25%  val loss 1.5000 accuracy 50.00%  lr 0.012500  grad norm 1.500  1,600 images/s"
    assert first == f"epoch 1/2  {numbers}"
    assert second == f"epoch 2/2  {numbers}  skipped 3 steps"
    assert event == "a line about the run"


def test_a_line_per_log_interval_counts_steps_within_the_epoch(capsys):
    a_run(ConsoleSink(Steps(100, last=200), first_step=0, global_images=32, prints_steps=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["[1,    50] loss: 2.250", "[1,   100] loss: 2.250"]
    assert lines[3:5] == ["[2,    50] loss: 2.250", "[2,   100] loss: 2.250"]


def test_without_a_validation_split_none_is_mentioned(capsys):
    ConsoleSink(Steps(200, last=100), first_step=0, global_images=32).epoch(epoch_row(1, val=None))
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
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
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


LOGS = [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {"TTY_INTERACTIVE": "1"}, {"COLUMNS": "1"}, {"CLICOLOR_FORCE": "1"}]
TERMINALS = [{"TERM": "dumb"}, {"TERM": "unknown"}, {"NO_COLOR": "1"}, {"COLUMNS": "1"}, {"COLUMNS": "0"}, {"TERM": "nonsense"}]


@pytest.mark.parametrize(("is_terminal", "variables"), [*((False, log) for log in LOGS), *((True, one) for one in TERMINALS)])
def test_what_the_environment_asks_of_the_console(capsys, monkeypatch, is_terminal, variables):
    """No escape code gets into a log or a simple terminal, and no color where none is wanted; every line is there."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    sink = ConsoleSink(Steps(100, last=200), first_step=0, global_images=32)
    sink.event(Section("model", [("conv1", "Conv2d"), ("total", "all")]))
    a_run(sink)
    printed = capsys.readouterr().out
    assert "a line about the run\n" in printed
    assert printed.count("train loss 1.2500") == 2
    if not is_terminal or variables.get("TERM") in ("dumb", "unknown"):
        assert "model: conv1  Conv2d\n" in printed
        assert "\x1b" not in printed
    assert "NO_COLOR" not in variables or not re.search(r"\x1b\[[0-9;]*3[0-7]m", printed)


def test_a_live_line_goes_on_where_a_resumed_run_starts(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    sink = ConsoleSink(Steps(100, last=200), first_step=150, global_images=32)
    sink.close()
    assert "75%" in capsys.readouterr().out


def test_closing_twice_is_harmless(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sink = ConsoleSink(Steps(1, last=1), first_step=0, global_images=32)
    sink.close()
    sink.close()
    sink.event("still printed")
    assert "still printed" in capsys.readouterr().out
