"""Every launcher trains the same model; a run that stops or fails leaves no process behind, and the right exit code."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests import launching
from tests.launching import COMMANDS, PROJECT, SHORT, environment, has_trained, run, summary, wait_until

LONG = ("--dataset", "synthetic", "--log-every-steps", "5", "--test-images", "200", "--threads", "1", "--epochs", "1")
MAIN = [sys.executable, "main.py"]


def processes_mentioning(text: str) -> list[psutil.Process]:
    """Live processes whose command line contains `text`, except this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            alive = process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
            if alive and any(text in word for word in process.cmdline()):
                found.append(process)
    return found


class Runs(dict[str, tuple[Path, subprocess.CompletedProcess[str]]]):
    """The same short run under every launcher, started when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, name: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
        output = self.folder / name.replace(" ", "_")
        extra = ["--deepspeed", "--deepspeed_config", "ds_config.json"] if name.startswith("deepspeed") else []
        self[name] = output, run([*COMMANDS[name], *extra, *SHORT, "--output-dir", str(output)])
        return self[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("launchers"))


QUICK = "python", "main.py, 2 ranks"
LAUNCHERS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in COMMANDS]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_runs_to_a_finished_summary(runs, name) -> None:
    folder, process = runs[name]
    assert process.returncode == 0, process.stderr
    results = summary(folder)
    due = "finished", 2 if "2 ranks" in name else 1, 200
    assert (results["status"], results["world_size"], results["test_images"]) == due
    assert f"test accuracy  {results['test_accuracy']:.2%}  (best_model; the first 200 of 10,000 images)" in process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_final_weights_do_not_depend_on_the_launcher(runs, ranks) -> None:
    prints = {name: summary(runs[name][0])["weights_sha256"] for name in COMMANDS}
    of_these = {name: value for name, value in prints.items() if ("2 ranks" in name) == (ranks == 2)}
    assert len(of_these) >= 2
    assert len(set(of_these.values())) == 1, of_these


@pytest.mark.slow
def test_mpirun_starts_the_same_training(runs, tmp_path) -> None:
    if not shutil.which("mpirun"):
        pytest.skip("needs Open MPI's mpirun")
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", *COMMANDS["python"]]
    process = run([*command, *SHORT, "--output-dir", str(tmp_path / "run")])
    assert process.returncode == 0, process.stderr
    results, others = summary(tmp_path / "run"), summary(runs["torchrun, 2 ranks"][0])
    assert all(results[key] == others[key] for key in ("status", "world_size", "weights_sha256"))
    (start,) = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert start["launcher"] == "mpirun"


def start_on_two_machines(flags: tuple[str, ...] | list[str], folder: Path) -> list[subprocess.Popen[str]]:
    """main.py as on two machines that share `folder`: the same command twice, except for --node-rank."""
    machines = f"--num-nodes 2 --master-addr 127.0.0.1 --master-port {launching.free_port()} --num-gpus 1".split()
    options = {"cwd": PROJECT, "env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = ([*MAIN, *machines, "--node-rank", rank, *flags, "--output-dir", str(folder)] for rank in "01")
    return [subprocess.Popen(command, **options) for command in commands]


def ended(launchers: list[subprocess.Popen[str]]) -> tuple[list[int], list[str], list[str]]:
    """Their exit codes, and what each printed to stdout and stderr."""
    printed = [launcher.communicate(timeout=launching.DEADLINE_SECONDS) for launcher in launchers]
    return [launcher.returncode for launcher in launchers], [out for out, _ in printed], [err for _, err in printed]


@pytest.mark.slow
def test_a_run_on_two_machines_is_stopped_and_resumed(tmp_path) -> None:
    """That it ends with the weights of one machine, test_two_hosts.py shows."""
    folder, flags = tmp_path / "run", [*LONG, "--max-steps", "120"]
    launchers = start_on_two_machines(flags, folder)
    wait_until(lambda: has_trained(folder) or launchers[0].poll() is not None, "the first steps")
    for launcher in launchers:
        launcher.send_signal(signal.SIGTERM)
    codes, printed, errors = ended(launchers)
    assert codes == [75, 75], errors
    assert processes_mentioning(str(folder)) == []
    stopped_at = summary(folder)["steps"]
    assert summary(folder)["status"] == "stopped"
    assert 0 < stopped_at < 120
    (how,) = (line for line in printed[0].splitlines() if line.startswith("to continue: "))
    assert "python main.py --num-gpus 1 --num-nodes 2 --master-addr 127.0.0.1" in how

    codes, printed, errors = ended(start_on_two_machines(flags, folder))
    assert codes == [0, 0], errors
    assert "2 ranks on cpu, 2 machines" in printed[0]
    assert printed[1] == "", "only the first machine prints"
    results = summary(folder)
    assert (results["status"], results["steps"], results["resumed_at_steps"]) == ("finished", 120, [stopped_at])


@pytest.mark.parametrize("name", QUICK)
def test_the_libraries_print_nothing(runs, name) -> None:
    _, process = runs[name]
    assert process.stderr == ""
    assert process.stdout.startswith("recipe bn_cnn: bn_cnn, 268,746 parameters")
    assert process.stdout.count("train loss") == 1, "not once per rank"


def test_the_run_folder_says_what_was_run(runs) -> None:
    folder, _ = runs["main.py, 2 ranks"]
    files = "recipe.json ds_config.json environment.json metrics.csv steps.csv summary.json test_predictions.npz .lock"
    files += " test_ledger.jsonl chain.jsonl"
    assert {path.name for path in folder.iterdir()} == {*files.split(), "tensorboard", "checkpoints"}
    rows = [line.split(",")[:2] for line in (folder / "metrics.csv").read_text().splitlines()]
    assert rows == [["epoch", "phase"], ["1", "train"], ["1", "val"], ["1", "test"]]
    assert [line.split(",")[0] for line in (folder / "steps.csv").read_text().splitlines()] == ["step", "4", "8"]


@pytest.mark.slow
def test_no_compiler_is_needed_and_nothing_is_built(tmp_path) -> None:
    built, folder = tmp_path / "extensions", tmp_path / "run"
    flags = [*SHORT, "--max-steps", "2", "--output-dir", str(folder)]
    process = run([*COMMANDS["python"], *flags], PATH=str(tmp_path), TORCH_EXTENSIONS_DIR=str(built), CC="", CXX="")
    assert process.returncode == 0, process.stderr
    assert summary(folder)["status"] == "finished"
    assert not built.exists()


def test_a_finished_run_is_not_run_again(runs) -> None:
    folder, _ = runs["python"]
    before = (folder / "summary.json").stat().st_mtime_ns
    again = run([*COMMANDS["python"], *SHORT, "--output-dir", str(folder)])
    assert (again.returncode, "holds a finished run" in again.stdout) == (0, True)
    assert (folder / "summary.json").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_resumable_and_the_same_command_finishes_it(tmp_path, number) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [*LONG, "--max-steps", "120", "--num-gpus", "2" if number == signal.SIGTERM else "1"]
    command, options = [*MAIN, *flags, "--output-dir", str(stopped)], {"cwd": PROJECT, "env": environment(), "text": True}
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, **options)
    wait_until(lambda: has_trained(stopped) or launcher.poll() is not None, "the first steps")
    launcher.send_signal(number)
    printed, _ = launcher.communicate(timeout=launching.DEADLINE_SECONDS)
    assert launcher.returncode == 75, printed
    assert processes_mentioning(str(stopped)) == []
    assert summary(stopped)["status"] == "stopped"
    assert 0 < summary(stopped)["steps"] < 120

    to_continue = next(line for line in printed.splitlines() if line.startswith("to continue: "))
    words = to_continue.removeprefix("to continue: ").removeprefix("uv run ").split()
    assert words[:2] == ["python", "main.py"]
    assert run([sys.executable, *words[1:]]).returncode == 0
    assert (summary(stopped)["status"], bool(summary(stopped)["resumed_at_steps"])) == ("finished", True)
    if number == signal.SIGINT:  # the weights are compared once
        return
    assert run([*MAIN, *flags, "--output-dir", str(whole)]).returncode == 0
    assert summary(stopped)["weights_sha256"] == summary(whole)["weights_sha256"]
    assert (stopped / "steps.csv").read_text() == (whole / "steps.csv").read_text()


@pytest.mark.slow
def test_killing_main_leaves_no_rank_behind(tmp_path) -> None:
    folder = tmp_path / "run"
    command = [*MAIN, *LONG, "--num-gpus", "2", "--output-dir", str(folder)]
    launcher = subprocess.Popen(command, cwd=PROJECT, env=environment(), stdout=subprocess.DEVNULL)
    wait_until(lambda: has_trained(folder) or launcher.poll() is not None, "the first steps")
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not processes_mentioning(str(folder)), "the ranks to end")
    assert summary(folder)["status"] == "stopped"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--epoch", "3"], "did you mean --epochs?"),
        (["--engine-level", "captured", "--dataset", "synthetic"], "--engine-level captured needs a GPU"),
        (["--num-gpus", "3", "--global-batch-size", "128", "--dataset", "synthetic"], "but by 2 or 4; or try"),
        (["--recipe", "bn_cn"], "did you mean bn_cnn?"),
    ],
)
def test_main_refuses_in_one_line_before_anything_starts(tmp_path, flags, expected) -> None:
    folder = tmp_path / "run"
    process = run([*MAIN, *flags, "--output-dir", str(folder)])
    assert (process.returncode, process.stdout) == (2, "")
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert not folder.exists()


def test_another_launcher_refuses_in_one_line_from_rank_0(tmp_path) -> None:
    process = run([*COMMANDS["torchrun, 2 ranks"], "--epoch", "3", "--output-dir", str(tmp_path / "run")])
    assert process.returncode != 0
    (error,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert "did you mean --epochs?" in error
