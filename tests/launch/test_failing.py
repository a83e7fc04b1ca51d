"""Runs that fail: a rank dies or hangs, the disk or the memory is full. What was saved stays, and the reason is reported."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from cifar10.engine.full_state import weights_sha256
from cifar10.launch import supervise
from cifar10.metrics import text
from cifar10.metrics.sink import Metrics, Sink, StepRow
from cifar10.models.registry import build_model
from cifar10.run import checkpoint
from cifar10.run.state import RunState
from cifar10.run.stop import StopRequest
from tests.helpers import make_engine, one_rank
from tests.launching import PROJECT, environment, has_trained, run, summary, wait_until

SHORT = "--dataset synthetic --log-every-steps 5 --test-images 200 --threads 1 --epochs 0.2 --save-every-epochs 0".split()
TWO_RANKS = [sys.executable, "main.py", "--num-gpus", "2", *SHORT]


def start(*flags: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*TWO_RANKS, *flags], cwd=PROJECT, env=environment(), **pipes)


def rank_process(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    ours = psutil.Process(launcher.pid).children(recursive=True)
    ranks = (p for p in ours if "cifar10_deepspeed.py" in " ".join(p.cmdline()))
    return next(p for p in ranks if p.environ().get("RANK") == str(rank))


SECRET = "a-key-that-nobody-may-see"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An undisturbed run: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    before = os.umask(0o077)
    try:
        process = run([*TWO_RANKS, "--output-dir", str(folder)], WANDB_API_KEY=SECRET)
    finally:
        os.umask(before)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout + process.stderr


@pytest.mark.slow
def test_the_umask_decides_who_may_read_a_run_folder(whole_run: tuple[Path, str]) -> None:
    modes = {str(path): path.stat().st_mode & 0o077 for path in (whole_run[0], *whole_run[0].rglob("*"))}
    assert len(modes) > 10
    assert set(modes.values()) == {0}, modes


@pytest.mark.slow
def test_no_key_of_the_environment_is_written_or_printed(whole_run: tuple[Path, str]) -> None:
    folder, printed = whole_run
    assert SECRET not in printed
    assert not [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_with_the_rank_the_step_and_the_reason(tmp_path: Path) -> None:
    launcher = start("--timeout-minutes", "0.1", "--output-dir", str(tmp_path / "run"))
    wait_until(lambda: has_trained(tmp_path / "run"), "the first steps")
    everyone = psutil.Process(launcher.pid).children(recursive=True)
    rank_process(launcher, 1).suspend()
    _, errors = launcher.communicate(timeout=600)
    assert launcher.returncode not in (0, 2, 75)
    results = summary(tmp_path / "run")
    assert results["status"] == "failed"
    assert results["reason"].startswith("rank 0 timed out at step ")
    assert f"error: {results['reason']}" in errors
    assert not [p for p in everyone if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_a_restart_comes_to_the_same_weights(
    tmp_path: Path, whole_run: tuple[Path, str]
) -> None:
    launcher = start("--max-restarts", "1", "--output-dir", str(tmp_path / "run"))
    wait_until(lambda: has_trained(tmp_path / "run"), "the first steps")
    rank_process(launcher, 1).send_signal(signal.SIGKILL)
    _, errors = launcher.communicate(timeout=600)
    assert launcher.returncode == 0, errors
    assert "error: rank 0 lost another rank at step " in errors
    assert "restart 1 of 1" in errors
    assert summary(tmp_path / "run")["weights_sha256"] == summary(whole_run[0])["weights_sha256"]


@pytest.mark.slow
def test_a_run_that_fails_each_time_is_restarted_as_often_as_asked(tmp_path: Path) -> None:
    """A learning rate of 1e30 makes every step skip, and 25 in a row end a run."""
    flags = ["--max-restarts", "1", "--lr", "1e30", "--output-dir", str(tmp_path / "run")]
    process = run([sys.executable, "main.py", *SHORT, *flags])
    assert process.returncode == 1
    assert process.stderr.count("error: 25 steps in a row") == 2
    assert (summary(tmp_path / "run")["status"], process.stderr.count("error: ")) == ("failed", 2)
    assert "25 steps in a row" in summary(tmp_path / "run")["reason"]
    assert process.stderr.count("restart 1 of 1") == 1


# DeepSpeed's launcher without DeepSpeed: it reports the first code that is not 0, and waits for all ranks.
TREE = """
import os, pathlib, signal, subprocess, sys, time
role, *rest = sys.argv[1:]
again = [sys.executable, __file__]
if role == "runner":
    sys.exit(subprocess.call([*again, "launcher", *rest]) & 255)
if role == "launcher":
    ranks = [subprocess.Popen([*again, "rank", str(number), *rest]) for number in (1, 0)]
    codes = [rank.wait() for rank in ranks]
    sys.exit(next((code & 255 for code in codes if code), 0))
number, end, folder, script = rest
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if number == "1":
    if end != "0":
        subprocess.Popen(["sleep", "600"])  # as W&B's process, it is left behind
    while not pathlib.Path(folder, "both are seen").exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL) if end == "killed" else sys.exit(int(end))
time.sleep(2 if end == "0" else 600)
"""


@pytest.mark.parametrize(("end", "code"), [("killed", 247), ("3", 3), ("0", 0)])
def test_ranks_that_wait_for_a_dead_one_are_killed_and_its_exit_code_is_kept(tmp_path, monkeypatch, end, code):
    """A rank that waits on a GPU handles no signal. At the end of a run (0) a slow rank is left in peace."""
    find = supervise.rank_processes

    def seen(launcher: int) -> list[psutil.Process]:
        found = find(launcher)
        if len(found) == 2:
            (tmp_path / "both are seen").touch()
        return found

    monkeypatch.setattr(supervise, "rank_processes", seen)
    monkeypatch.setattr(supervise, "SECONDS_TO_FAIL", 0.3)
    (tmp_path / "tree.py").write_text(TREE)
    command = [sys.executable, str(tmp_path / "tree.py"), "runner", end, str(tmp_path), str(supervise.SCRIPT)]
    launch = supervise.Launch(command, dict(os.environ))
    assert launch.wait(2, lambda: end == "0") == code
    assert supervise.live_processes(launch._process.pid) == []


SAVING = """
import pathlib, signal, subprocess, sys, time
role, *rest = sys.argv[1:]
again = [sys.executable, __file__]
if role == "runner":
    sys.exit(subprocess.call([*again, "launcher", *rest]))
if role == "launcher":
    rank = subprocess.Popen([*again, "rank", *rest])
    signal.signal(signal.SIGTERM, lambda *_: rank.kill())  # as DeepSpeed's does, after 30 seconds
    sys.exit(rank.wait())
folder = pathlib.Path(rest[0])
def save(*_):
    time.sleep(0.5)
    (folder / "saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
(folder / "trains").touch()
time.sleep(600)
"""


def test_a_rank_may_take_longer_to_save_than_deepspeeds_launcher_would_wait(tmp_path: Path) -> None:
    (tmp_path / "tree.py").write_text(SAVING)
    command = [sys.executable, str(tmp_path / "tree.py"), "runner", str(tmp_path), str(supervise.SCRIPT)]
    launch = supervise.Launch(command, dict(os.environ))
    wait_until((tmp_path / "trains").exists, "the rank")
    os.kill(os.getpid(), signal.SIGTERM)
    assert launch.wait() == 0
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_a_rank_that_cannot_save_does_not_hold_up_the_end_of_a_run_that_has_lost_another(tmp_path: Path) -> None:
    """DeepSpeed's launcher would wait 30 seconds for the stopped one, as it does for a rank that waits on its GPU."""
    launcher = start("--output-dir", str(tmp_path / "run"))
    wait_until(lambda: has_trained(tmp_path / "run"), "the first steps")
    rank_process(launcher, 0).suspend()
    rank_process(launcher, 1).send_signal(signal.SIGKILL)
    killed = time.monotonic()
    launcher.communicate(timeout=600)
    assert time.monotonic() - killed < 20
    assert launcher.returncode == 247
    assert summary(tmp_path / "run")["status"] == "failed"
    assert "SIGKILL" in summary(tmp_path / "run")["reason"]


# --- a full disk -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing_that_was_saved_and_does_not_stop_training(tmp_path: Path) -> None:
    """From the second save on, files of more than 1 MiB fail in write(), as they do on a full disk."""
    engine, before = make_engine(one_rank(), build_model("bn_cnn", 0, 10)), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert checkpoint.save(tmp_path, engine, RunState(step=1), one_rank(), {}, keep=1) == ""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        why_not = checkpoint.save(tmp_path, engine, RunState(step=2), one_rank(), {}, keep=1)
        weights = checkpoint.save_portable(tmp_path / "best_model", engine.portable_state(), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert why_not.startswith("not saved at step 2: ")
    assert "\n" not in why_not + weights
    assert weights.startswith(f"{tmp_path / 'best_model'} is not written: ")
    assert checkpoint.find(tmp_path) == ("step_00000001", [])
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000001", "latest", "best_model"}
    other = make_engine(one_rank(), build_model("bn_cnn", 1, 10))
    assert checkpoint.resume(tmp_path, None, other, one_rank(), {}).step == 1
    assert weights_sha256(other.portable_state()) == weights_sha256(engine.portable_state())


# --- sinks, messages, stops -------------------------------------------------------------------------------------------------


class Full(Sink):
    def step(self, row: StepRow) -> None:
        raise OSError("No space left on device")


def test_a_sink_that_fails_is_reported_and_dropped_and_the_others_continue(capsys: pytest.CaptureFixture[str]) -> None:
    rows, row, other = [], StepRow(1, 1, 2.3, 0.1, 1.0, 0.1, 0), Sink()
    other.step = rows.append
    metrics = Metrics([Full(), other])
    metrics.step(row)
    metrics.step(row)
    metrics.close()
    assert rows == [row, row]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Full failed (No space left on device)")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "out of memory at step 7; use --micro-batch-size 32"),
        (RuntimeError("CPUAllocator: can't allocate memory: you"), "out of memory at step 7; use --micro-batch-size 32"),
        (RuntimeError("[/a/b.cc:5] Timed out waiting 10ms for recv"), "timed out at step 7 "),
        (RuntimeError("[/a/b.cc:5] Connection closed by peer [::1]:5"), "another rank at step 7, which died: Connection"),
        (ValueError("no\nmore"), "failed at step 7: ValueError: no"),
    ],
)
def test_a_failure_names_rank_step_and_remedy(error: Exception, words: str) -> None:
    line = text.failure(error, 3, 7, 64)
    assert line.startswith("rank 3 ")
    assert words in line
    assert "\n" not in line


def stopping(folder: Path, max_minutes: float | None = None) -> StopRequest:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)}
    request = StopRequest(one_rank(), folder, max_minutes)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return request


def test_a_file_called_stop_stops_a_run_once(tmp_path: Path) -> None:
    request = stopping(tmp_path)
    assert not request.agreed()
    (tmp_path / "STOP").touch()
    assert request.agreed()
    assert request.reason == "the file STOP"
    assert not (tmp_path / "STOP").exists()
    assert not stopping(tmp_path).agreed()


def test_max_minutes_stop_a_run(tmp_path: Path) -> None:
    assert not stopping(tmp_path, max_minutes=60).agreed()
    request = stopping(tmp_path, max_minutes=0.001)
    wait_until(request.agreed, "the time to be over")
    assert request.reason == "--max-minutes 0.001"


@pytest.mark.slow
def test_a_stop_file_stops_two_ranks_and_a_resume_comes_to_the_same_weights(
    tmp_path: Path, whole_run: tuple[Path, str]
) -> None:
    launcher = start("--output-dir", str(tmp_path / "run"))
    wait_until(lambda: has_trained(tmp_path / "run"), "the first steps")
    (tmp_path / "run" / "STOP").touch()
    output, errors = launcher.communicate(timeout=600)
    assert launcher.returncode == 75, errors
    assert "(the file STOP)" in output
    assert run([*TWO_RANKS, "--output-dir", str(tmp_path / "run")]).returncode == 0
    assert summary(tmp_path / "run")["weights_sha256"] == summary(whole_run[0])["weights_sha256"]
    assert os.listdir(tmp_path / "run").count("STOP") == 0
