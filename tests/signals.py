"""Every signal to every process of a run: all processes end, the summary records how, and the same command finishes the run.

    python -m tests.signals --json FILE

Real launches through main.py with two ranks. A chain is one run: its command is started once for each cell and gets the cell's
signal; at last it is left alone, and must end with the weights of a run without signals. Exit code 0: all did.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tests.launching import DEADLINE_SECONDS, PROJECT, environment, run, summary, wait_until

PROCESSES = ("main.py", "runner", "launch.py", "rank 0", "rank 1", "group")  # group: all but main.py
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGKILL")
IN_TRAINING, AT_ONCE, STARTING = "in training", "at once", "ranks starting"
TRAINED = "--dataset synthetic --global-batch-size 64 --epochs 2 --log-every-steps 5 --test-images 200 --threads 1"
SECONDS_TO_LEAVE = 120  # for processes that outlive main.py


@dataclass(frozen=True)
class Cell:
    """Which process gets which signal, and when: in training, just launched, or while the ranks import."""

    process: str
    signal: str
    moment: str = IN_TRAINING


@dataclass(frozen=True)
class Outcome:
    """What came of a cell."""

    at_step: int
    code: int  # main.py's
    status: str | None
    steps: int  # saved
    said: str
    left: int  # processes
    seconds: float  # from the signal to the end of the last process


CHAINS = {
    "before training": [Cell("main.py", number, moment) for moment in (AT_ONCE, STARTING) for number in SIGNALS[:3]],
    **{process: [Cell(process, number) for number in SIGNALS] for process in PROCESSES},
}


def command_for(folder: Path, steps: int) -> list[str]:
    flags = [*TRAINED.split(), "--max-steps", str(steps), "--output-dir", str(folder)]
    return [sys.executable, "main.py", "--num-gpus", "2", *flags]


# --- processes and progress -----------------------------------------------------------------------------------------------


def processes_of_run(folder: Path) -> dict[str, psutil.Process]:
    """The live processes of the run in `folder`, by their names in PROCESSES or their number."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if str(folder) not in words or process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                continue
            names = {Path(word).name for word in words}
            if "deepspeed.launcher.launch" in names:
                found["launch.py"] = process
            elif names & {"deepspeed", "deepspeed.launcher.runner"}:
                found["runner"] = process
            elif "main.py" in names:
                found["main.py"] = process
            else:
                rank = process.environ().get("RANK")
                found[f"rank {rank}" if rank else f"process {process.pid}"] = process
    return found


def saved_step(folder: Path) -> int:
    latest = folder / "checkpoints" / "latest"
    return int(latest.read_text().split("_")[1]) if latest.exists() else 0


def trained_step(folder: Path) -> int:
    """The last step in steps.csv, if a start is running and beyond what is saved; else 0."""
    with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
        step = int((folder / "steps.csv").read_text().splitlines()[-1].split(",")[0])
        return step if summary(folder)["status"] == "running" and step > saved_step(folder) else 0
    return 0


def has_come(moment: str, folder: Path) -> bool:
    if moment == IN_TRAINING:
        return trained_step(folder) > 0
    return {AT_ONCE: "runner", STARTING: "rank 0"}[moment] in processes_of_run(folder)


# --- cells and chains -----------------------------------------------------------------------------------------------------


def send(cell: Cell, folder: Path) -> None:
    found, number = processes_of_run(folder), signal.Signals[cell.signal]
    if cell.process == "group":
        os.killpg(os.getpgid(found["runner"].pid), number)
    else:
        found[cell.process].send_signal(number)


def carry_out(cell: Cell, command: list[str], folder: Path) -> Outcome:
    """Launch, signal, and wait for the end of all processes."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command, cwd=PROJECT, env=environment(OMP_NUM_THREADS="1"), **options)
    try:
        wait_until(lambda: has_come(cell.moment, folder) or launcher.poll() is not None, f"the moment of {cell}")
        assert launcher.poll() is None, f"ended before {cell}: {launcher.returncode}, {launcher.communicate()}"
        send(cell, folder)
        began, at_step = time.monotonic(), trained_step(folder)
        printed, errors = launcher.communicate(timeout=DEADLINE_SECONDS)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not processes_of_run(folder), "the run's processes to end", seconds=SECONDS_TO_LEAVE)
        seconds = time.monotonic() - began
    finally:
        left = processes_of_run(folder)
        for process in left.values():
            process.kill()
    found = summary(folder) if (folder / "summary.json").exists() else {}
    lines = [*filter(str.strip, errors.splitlines()), *(line for line in printed.splitlines() if line.startswith("stopped at"))]
    said = found.get("reason") or (lines[-1] if lines else "")
    return Outcome(at_step, launcher.returncode, found.get("status"), saved_step(folder), said, len(left), round(seconds, 1))


def fault_of(cell: Cell, outcome: Outcome) -> str:
    """What is wrong with a cell's outcome, or ""."""
    if outcome.left:
        return f"{outcome.left} processes were left"
    if cell.signal == "SIGKILL" and cell.process.startswith(("rank", "group")):  # nothing can be saved then
        well = outcome.status == "failed" and outcome.said and outcome.code not in (0, 75)
        return "" if well else f"it should have failed: {outcome.status}, {outcome.code}"
    if cell.moment == IN_TRAINING and (outcome.status != "stopped" or outcome.steps < outcome.at_step):
        return f"it was not saved: {outcome.status} at step {outcome.steps}"
    expected = -signal.SIGKILL if (cell.process, cell.signal) == ("main.py", "SIGKILL") else 75
    return "" if outcome.code == expected else f"main.py ended with {outcome.code}, not {expected}"


def weights_of(command: list[str], folder: Path) -> str:
    """The weights_sha256 that the command, left alone, ends with."""
    process = run(command, OMP_NUM_THREADS="1")
    return summary(folder)["weights_sha256"] if process.returncode == 0 else f"exit code {process.returncode}: {process.stderr}"


def undisturbed(base: Path, steps: int) -> str:
    """The weights_sha256 of a run without signals."""
    return weights_of(command_for(base / "whole", steps), base / "whole")


# --- the whole matrix -----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.signals", description=__doc__.split("\n")[0])
    parser.add_argument("--chains", nargs="+", default=list(CHAINS), choices=list(CHAINS), help="which")
    parser.add_argument("--steps", type=int, default=1_200, help="of the run")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    options = parser.parse_args()
    found = {"command": " ".join(sys.argv[1:]), "cells": [], "chains": {}}
    with tempfile.TemporaryDirectory() as base:
        print("| signal to | signal | when | at step | exit code | status | saved | reason | seconds | |\n" + "|---" * 10 + "|")
        for name in options.chains:
            folder = Path(base) / f"chain_{len(found['chains'])}"  # the name of no process
            command = command_for(folder, options.steps)
            for cell in CHAINS[name]:
                outcome = carry_out(cell, command, folder)
                fault = fault_of(cell, outcome)
                row = {**asdict(cell), **asdict(outcome), "fault": fault or "right"}
                print("| " + " | ".join(str(row[key]) for key in row if key != "left") + " |", flush=True)
                found["cells"].append(row)
            found["chains"][name] = weights_of(command, folder)
            print(f"{name}: ends with weights {found['chains'][name]}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
        found["chains"]["no signal"] = undisturbed(Path(base), options.steps)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    same = len(set(found["chains"].values())) == 1
    faults = sum(row["fault"] != "right" for row in found["cells"])
    print(f"{len(found['cells'])} cells, {faults} with a fault; the weights of all chains are {'' if same else 'not '}equal")
    return 1 if faults or not same else 0


if __name__ == "__main__":
    sys.exit(main())
