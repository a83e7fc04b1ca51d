"""TensorBoard and Weights & Biases: what a stopped and resumed run has in both, read back; neither can block or end a run.

wandb 0.31 has no reader in Python; its files are LevelDB logs of its own protobuf records, and are read as such.
"""

import contextlib
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifar10.metrics import wandb_sink
from cifar10.metrics.csv_sink import CsvSink
from cifar10.metrics.open import open_sinks
from cifar10.metrics.sink import Context, EpochRow, StepRow, Steps
from cifar10.metrics.tensorboard_sink import TensorBoardSink
from cifar10.metrics.wandb_sink import choose_mode
from cifar10.plan import make_plan
from cifar10.run.state import RunState
from cifar10.run.summary import SplitResult
from tests.helpers import WORKERS
from tests.launching import DEADLINE_SECONDS, PROJECT, environment, has_trained, run, summary, wait_until
from tests.metrics.test_sinks import rows

SMALL = "--dataset synthetic --val-images 100 --test-images 200 --global-batch-size 32 --log-every-steps 4 --threads 1".split()
STEPS = [4, 8, 12, 15, 19, 23, 27, 30]  # of the rows: every fourth of an epoch of 15 steps, and its last
STOP_AT = 20

DOCUMENTS_STEP_KEYS = {"step_loss", "step_accuracy", "gradient_norm", "learning_rate", "epoch", "step"}
DOCUMENTS_EPOCH_KEYS = {"epoch_avg_loss", "epoch_accuracy", "epoch_avg_grad_norm", "best_loss", "best_accuracy", "patience"}


# --- reading back -------------------------------------------------------------------------------------------------------


def records(file: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb file: a header of 7 bytes, then a LevelDB log of blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, content = file.read_bytes(), 7, b""
    assert raw[:4] == b":W&B"
    while at + 7 <= len(raw):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", raw, at)
        piece = raw[at + 7 : at + 7 + length]
        assert zlib.crc32(bytes([kind]) + piece) == crc
        content = piece if kind in (1, 2) else content + piece
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(content)
            yield record


def as_dict(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def offline_runs(folder: Path) -> list[SimpleNamespace]:
    """What each start of a run has left for `wandb sync`, in their order."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        start = SimpleNamespace(folder=file.parent, history=[], summary={}, exit_code=None, metrics={})
        for record in records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                start.run, start.config = record.run, as_dict(record.run.config.update)
            elif kind == "history":
                start.history.append(as_dict(record.history.item))
            elif kind == "summary":
                start.summary |= as_dict(record.summary.update)
            elif kind == "metric":
                start.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            elif kind == "exit":
                start.exit_code = record.exit.exit_code
        found.append(start)
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All that TensorBoard would show of a folder: tag -> (step, value)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# --- a run that is stopped, and resumed ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped in its second epoch and resumed; a plot of a report lies in its folder."""
    base = tmp_path_factory.mktemp("tracked")
    folder = base / "run"
    (folder / "report").mkdir(parents=True)
    Image.new("RGB", (8, 6), (255, 0, 0)).save(folder / "report" / "curves.png")
    flags = [*SMALL, "--epochs", "2", "--wandb", "offline", "--wandb-name", "a name", "--output-dir", str(folder)]
    one = {"ranks": 1, "flags": flags, "keep_summary": str(base / "kept.json")}
    (base / "starts.json").write_text(json.dumps([{**one, "stop_after": STOP_AT}, one]))
    (base / "home").mkdir()
    command = [sys.executable, str(WORKERS / "small_runs.py"), str(base / "starts.json")]
    process = run(command, PYTHONPATH=str(PROJECT), HOME=str(base / "home"))
    assert (process.returncode, process.stderr) == (0, "")
    assert "wandb sync" in process.stdout
    assert summary(folder)["resumed_at_steps"] == [STOP_AT]
    return folder


def test_wandb_has_every_row_once_under_one_id(stopped_and_resumed) -> None:
    first, second = offline_runs(stopped_and_resumed)
    assert first.run.run_id == second.run.run_id == json.loads((stopped_and_resumed / "wandb_run.json").read_text())["id"]
    assert (first.exit_code, second.exit_code) == (75, 0)
    assert [row["step"] for row in first.history] == STEPS[:5]
    assert [row["step"] for row in second.history] == [*STEPS[5:], 30, 30]  # the test and the end have rows of their own
    steps = [row["_step"] for row in (*first.history, *second.history)]
    assert steps == sorted(set(steps))
    assert first.metrics == second.metrics == {"step": "", "*": "step"}


def test_wandb_has_the_documents_keys_and_the_values_of_the_csv_files(stopped_and_resumed) -> None:
    history = [row for start in offline_runs(stopped_and_resumed) for row in start.history]
    *during, test, end = history
    for row, saved in zip(during, rows(stopped_and_resumed / "steps.csv")[1:], strict=True):
        assert row.keys() >= DOCUMENTS_STEP_KEYS
        measured = [row[k] for k in ("step", "epoch", "step_loss", "step_accuracy", "gradient_norm", "learning_rate")]
        assert measured == pytest.approx([float(value) for value in saved[:6]], rel=1e-6)
    ends = [row for row in during if "epoch_avg_loss" in row]
    assert [row["step"] for row in ends] == [15, 30]
    lines = rows(stopped_and_resumed / "metrics.csv")[1:]
    saved = {(int(epoch), split): list(map(float, more)) for epoch, split, *more in lines}
    for epoch, row in enumerate(ends, start=1):
        assert row.keys() >= DOCUMENTS_EPOCH_KEYS
        for split in ("train", "val"):
            measured = [row[f"{split}/{what}"] for what in ("loss", "accuracy", "throughput")]
            assert measured == pytest.approx(saved[epoch, split], rel=1e-3)
        assert (row["epoch_avg_loss"], row["epoch_accuracy"]) == (row["train/loss"], row["train/accuracy"])
        assert row["best_accuracy"] == max(saved[e, "val"][1] for e in range(1, epoch + 1))  # fractions
        assert row["best_loss"] == pytest.approx(min(saved[e, "val"][0] for e in range(1, epoch + 1)), abs=1e-5)
        assert row["patience"] == 0
    assert test["test/accuracy"] == saved[2, "test"][1] == summary(stopped_and_resumed)["test_accuracy"]
    assert end["final/test_accuracy"] == test["test/accuracy"]


def test_wandb_has_the_settings_the_summary_and_the_plots(stopped_and_resumed) -> None:
    _, last = offline_runs(stopped_and_resumed)
    results = summary(stopped_and_resumed)
    assert (last.run.project, last.run.display_name) == ("deepspeed-cifar10", "a name")
    assert (last.config["model"], last.config["epochs"], last.config["lr"]) == ("bn_cnn", 2.0, 0.1)
    assert last.config["deepspeed"] == json.loads((stopped_and_resumed / "ds_config.json").read_text())
    for name in ("test_accuracy", "val_accuracy", "train_accuracy", "steps", "quality", "weights_sha256", "ended_by"):
        assert last.summary[name] == last.summary[f"final/{name}"] == results[name], name
    plot = last.history[-1]["report/curves.path"]
    with Image.open(last.folder / "files" / plot) as saved:
        assert (saved.size, saved.getpixel((0, 0))[:3]) == ((8, 6), (255, 0, 0))


def test_wandb_writes_into_the_runs_folder_and_into_its_cache_only(stopped_and_resumed) -> None:
    home = stopped_and_resumed.parent / "home"
    assert {path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()} <= {
        (".cache", "wandb"),
        (".cache", "cifar10-deepspeed"),
    }
    assert not (PROJECT / "wandb").exists()


def test_tensorboard_has_every_row_once(stopped_and_resumed) -> None:
    found = scalars(stopped_and_resumed / "tensorboard")
    for tag, column in (("loss", 2), ("accuracy", 3), ("gradient_norm", 4), ("learning_rate", 5)):
        saved = [(int(row[0]), float(row[column])) for row in rows(stopped_and_resumed / "steps.csv")[1:]]
        assert [step for step, _ in found[f"step/{tag}"]] == STEPS
        assert found[f"step/{tag}"] == [(step, pytest.approx(value, rel=1e-6)) for step, value in saved]
    for split, steps in (("train", [15, 30]), ("val", [15, 30]), ("test", [30])):
        saved = [row[2:] for row in rows(stopped_and_resumed / "metrics.csv") if row[1] == split]
        for tag, column in (("loss", 0), ("accuracy", 1), ("throughput", 2)):
            due = [(step, pytest.approx(float(row[column]), rel=1e-3)) for step, row in zip(steps, saved, strict=True)]
            assert found[f"{split}/{tag}"] == due
    assert found["final/test_accuracy"] == [(30, pytest.approx(summary(stopped_and_resumed)["test_accuracy"]))]
    events = EventAccumulator(str(stopped_and_resumed / "tensorboard")).Reload()
    (plot,) = events.Images("report/curves")
    assert (plot.width, plot.height) == (8, 6)
    assert "_hparams_/session_start_info" in events.summary_metadata


# --- a start that died --------------------------------------------------------------------------------------------------


def split(accuracy: float) -> SplitResult:
    return SplitResult(1.0, accuracy, 100, 1.0)


def step_row(step: int) -> StepRow:
    return StepRow(step, 1, loss=step / 100, accuracy=0.5, grad_norm=1.0, lr=0.1, skipped=0)


def test_rows_after_the_checkpoint_are_logged_again_and_tensorboard_shows_them_once(tmp_path) -> None:
    folder, steps = tmp_path / "tensorboard", Steps(per_epoch=300, last=600)
    for first, logged in ((0, (100, 200, 300)), (200, (300, 400))):
        sink = TensorBoardSink(folder, steps, first, {})
        for step in logged:
            sink.step(step_row(step + first // 200))  # other numbers, so that the later ones are known by them
        sink.epoch(EpochRow(1, split(0.5), split(0.25 + first / 800), 1.0, 0.1, 0))
        sink.close()
    assert [step for step, _ in scalars(folder)["step/loss"]] == [100, 200, 301, 401]
    assert scalars(folder)["val/accuracy"] == [(300, 0.5)]


LOGS = """
import os, sys
from pathlib import Path
from cifar10.metrics.sink import Context, StepRow, Steps
from cifar10.metrics.wandb_sink import open_sink
from cifar10.plan import make_plan
from cifar10.run.state import RunState
plan = make_plan(["--dataset", "synthetic", "--wandb", "offline"], 1, "x")
sink = open_sink(Context(plan, Path(sys.argv[1]), RunState(), Steps(1000, 1000)))
for step in map(int, sys.argv[3:]):
    sink.step(StepRow(step, 1, 0.5, 0.5, 1.0, 0.1, 0))
if sys.argv[2] == "dies":
    assert sink._run.summary.get("step") == int(sys.argv[-1])  # wandb-core answers: it has all rows
    os.kill(os.getpid(), 9)
if sys.argv[2] == "is terminated":
    import psutil
    for child in psutil.Process().children(recursive=True):  # as DeepSpeed's launcher does to a rank's
        child.terminate()
print(sink.note)
sink.close()
"""


class AtWandb:
    """wandb, as far as a sink uses it, with a server that has the rows below `starting_step`."""

    def __init__(self, starting_step: int) -> None:
        self.starting_step, self.sent, self.url, self.summary = starting_step, [], "https://wandb", {}
        self.Settings = dict
        self.init = lambda **_: self
        self.define_metric = self.teardown = lambda *_, **__: None
        self.finish = lambda **_: None

    def log(self, row: dict[str, Any], step: int, commit: bool) -> None:
        assert step >= self.starting_step, "the server would drop it"
        self.sent.append(step)


@pytest.mark.parametrize(("arrived", "due"), [(0, [10, 20, 30, 40, 50]), (10, [20, 30, 40, 50]), (30, [40, 50]), (40, [50])])
def test_rows_that_wandb_has_not_got_are_sent_again_and_none_twice(tmp_path, monkeypatch, arrived, due) -> None:
    """A start has sent steps 10 to 40 and was killed; the run resumes at its checkpoint of step 30, and trains to 50."""
    csv_sink = CsvSink(tmp_path, step=0, epoch=0)
    for step in (10, 20, 30):
        csv_sink.step(step_row(step))
    csv_sink.close()
    (tmp_path / "wandb_run.json").write_text(json.dumps({"id": "x", "step": 40, "closed": False}))
    fake = AtWandb(arrived + 1)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setattr(wandb_sink, "_Keeper", lambda _: SimpleNamespace(connect=lambda: None, end=lambda _: None))
    plan = make_plan(["--dataset", "synthetic"], 1, "x")
    sink = wandb_sink.WandbSink(Context(plan, tmp_path, RunState(step=30), Steps(1000, 1000)), "online")
    for step in (40, 50):
        sink.step(step_row(step))
    sink.close()
    assert fake.sent == due
    assert json.loads((tmp_path / "wandb_run.json").read_text()) == {"id": "x", "step": 50, "closed": True}


@pytest.mark.slow
@pytest.mark.parametrize("end", ["dies", "is terminated"])
def test_after_a_kill_wandb_has_every_row_once(tmp_path, end) -> None:
    """None twice; what a killed process has not handed over in time may be missing, and then a note says so."""
    for how, steps in ((end, "10 20 30"), ("closes", "20 30 40")):
        command = [sys.executable, "-c", LOGS, str(tmp_path), how, *steps.split()]
        ended = run(command, PYTHONPATH=str(PROJECT), CIFAR10_TEST=str(tmp_path))
        assert ended.returncode == (-signal.SIGKILL if how == "dies" else 0), ended.stderr
        wait_until(lambda: not processes_with("CIFAR10_TEST", str(tmp_path)), "wandb's own processes to write and leave")
    starts = offline_runs(tmp_path)
    steps = [row["step"] for start in starts for row in start.history]
    assert steps == sorted({*steps})
    assert steps[-1] == 40
    assert steps == [10, 20, 30, 40] or (end == "dies" and "up to step 30" in ended.stdout)
    assert [start.exit_code for start in starts] == [75, 75]


# --- signals ------------------------------------------------------------------------------------------------------------


def processes_with(name: str, value: str) -> list[psutil.Process]:
    """The live processes that have a variable in their environment, which all have from the one that was given it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.slow
def test_ctrl_c_with_wandb_saves_and_leaves_no_process(tmp_path) -> None:
    folder = tmp_path / "run"
    flags = "--dataset synthetic --epochs 50 --log-every-steps 5 --test-images 200 --threads 1 --wandb offline".split()
    command = [sys.executable, "main.py", "--num-gpus", "1", *flags, "--wandb-project", "mine", "--output-dir", str(folder)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command, cwd=PROJECT, env=environment(CIFAR10_TEST=str(folder)), **pipes)
    wait_until(lambda: has_trained(folder) or launcher.poll() is not None, "the first steps")
    assert "wandb-core" in {process.name() for process in processes_with("CIFAR10_TEST", str(folder))}
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=DEADLINE_SECONDS)
    assert (launcher.returncode, errors) == (75, "")
    wait_until(lambda: not processes_with("CIFAR10_TEST", str(folder)), "wandb's own process to leave")
    assert summary(folder)["status"] == "stopped"
    (start,) = offline_runs(folder)
    assert (start.run.project, start.exit_code) == ("mine", 75)
    assert [row["step"] for row in start.history] == [int(row[0]) for row in rows(folder / "steps.csv")[1:]]


# --- without a key, a network, a package ----------------------------------------------------------------------------------

KEY = "0123456789" * 4


@pytest.mark.parametrize(
    ("asked", "variables", "mode"),
    [
        ("auto", {}, "off"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "off"),
        ("auto", {"WANDB_MODE": "online"}, "online"),
        ("auto", {"NETRC": "known"}, "online"),
        ("auto", {"NETRC": "known", "WANDB_BASE_URL": "https://wandb.elsewhere"}, "off"),
        ("auto", {"NETRC": "broken"}, "off"),
        ("off", {"WANDB_API_KEY": KEY}, "off"),
        ("offline", {"WANDB_MODE": "disabled"}, "offline"),
        ("online", {}, "online"),
    ],
)
def test_when_wandb_is_on(tmp_path, monkeypatch, asked, variables, mode) -> None:
    monkeypatch.chdir(tmp_path)
    Path("known").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    Path("other").write_text(f"machine example.org login user password {KEY}\n")
    Path("broken").write_text("machine\n")
    assert choose_mode(asked, {"NETRC": "nowhere", **variables}) == mode


OPENS = """
import sys
from pathlib import Path
from cifar10.plan import make_plan
from cifar10.metrics.open import open_sinks
from cifar10.run.state import RunState
plan = make_plan(sys.argv[2:], 1, "x")
metrics = open_sinks(plan, Path(sys.argv[1]), RunState(), 10, 10)
metrics.event("opened")
metrics.close()
print("loaded", *sorted({"wandb", "torch.utils.tensorboard", "mlflow", "matplotlib"} & set(sys.modules)))
"""


def opened(folder: Path, *flags: str, **variables: str) -> tuple[list[str], str]:
    """Open and close the sinks of a run in a process of its own; returns what it prints to stdout and stderr."""
    given = ["--dataset", "synthetic", "--engine-level", "eager", *flags]  # fused would be compiled, in that home
    command = ["env", "-u", "WANDB_MODE", sys.executable, "-c", OPENS, str(folder), *given]
    process = run(command, PYTHONPATH=str(PROJECT), **{"HOME": str(folder), "NETRC": str(folder / "none"), **variables})
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines(), process.stderr


def test_what_is_off_is_not_even_imported(tmp_path) -> None:
    printed, errors = opened(tmp_path, "--no-tensorboard")
    assert (printed, errors) == (["opened", "loaded"], "")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", "steps.csv"}


def test_where_wandb_cannot_be_reached_it_is_recorded_offline(tmp_path) -> None:
    closed = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}
    printed, errors = opened(tmp_path, **closed)
    assert printed[0] == "opened"
    (line,) = errors.splitlines()
    assert line.startswith("W&B online failed (")
    (start,) = offline_runs(tmp_path)
    assert start.run.run_id


def in_a_terminal(command: list[str], **variables: str) -> tuple[int, str]:
    """Run a command that takes its terminal for a person's, who types nothing; its exit code and what it printed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, cwd=PROJECT, env=environment(**variables), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    printed, end = b"", time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end:
        if select.select([ours], [], [], 1)[0]:
            try:
                printed += os.read(ours, 65536)
            except OSError:  # the last process has closed the terminal
                break
    assert time.monotonic() < end, f"it waits for an answer: {printed!r}"
    os.close(ours)
    return process.wait(), printed.decode()


@pytest.mark.parametrize(("key", "message"), [("", "wandb_sink failed (no API key"), ("too-short", "W&B online failed (")])
def test_nobody_is_asked_for_a_key(tmp_path, key, message) -> None:
    command = [sys.executable, "-c", OPENS, str(tmp_path), "--dataset", "synthetic", "--wandb", "online", "--no-tensorboard"]
    variables = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": key, "WANDB_INIT_TIMEOUT": "2"}
    code, printed = in_a_terminal(command, PYTHONPATH=str(PROJECT), **variables)
    assert code == 0
    assert message in printed
    assert "opened" in printed
    assert "Enter your choice" not in printed


def test_without_the_package_training_goes_on(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    plan = make_plan(["--dataset", "synthetic", "--wandb", "offline"], 1, "x")
    metrics = open_sinks(plan, tmp_path, RunState(), 10, 10)
    metrics.event("continues")
    metrics.close()
    assert metrics.notes == ()
    printed, errors = capsys.readouterr()
    assert printed == "continues\n"
    assert [line.split()[:2] for line in errors.splitlines()] == [["tensorboard_sink", "failed"], ["wandb_sink", "failed"]]


# --- the sweep ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_sweep_files_command_trains_and_all_its_keys_are_flags(tmp_path) -> None:
    from wandb.sdk.launch.sweeps import utils  # what `wandb agent` makes its command line with

    sweep = yaml.safe_load((PROJECT / "recipes" / "sweep.yaml").read_text())
    known = run([sys.executable, sweep["program"], "--help"], COLUMNS="200").stdout
    for name in sweep["parameters"]:
        assert f"--{name.replace('_', '-')} " in known, name
    chosen = {k: v.get("value", v.get("min", v.get("values", [None])[-1])) for k, v in sweep["parameters"].items()}
    words = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
    words |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [sweep["program"]]}
    command = [word for part in utils.create_sweep_command(sweep["command"]) for word in words[part.strip("${}")]]
    few = "--dataset synthetic --max-steps 6 --val-images 100 --threads 1 --num-gpus 1".split()
    folder = tmp_path / "run"
    variables = {"WANDB_MODE": "offline", "WANDB_RUN_ID": "ofasweep", "WANDB_PROJECT": "theirs"}
    process = run([*command, *few, "--output-dir", str(folder)], **variables)
    assert process.returncode == 0, process.stderr
    (start,) = offline_runs(folder)
    assert (start.run.run_id, start.run.project) == ("ofasweep", "theirs")
    assert all(start.config[name] == value for name, value in chosen.items() if name != "test_images")
    assert sweep["metric"]["name"] in start.history[-2]
