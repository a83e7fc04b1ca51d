"""A launcher under supervision: signals go to all of its processes, and it ends when the last of them does; restarts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

import psutil

from cifar10.distributed import device
from cifar10.launch.command import LaunchOptions, deepspeed_command, start_command
from cifar10.run.summary import Summary, read_summary

FINISHED, FAILED, REFUSED, RESUMABLE = 0, 1, 2, 75  # 75 is sysexits.h's EX_TEMPFAIL: try again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS_TO_SAVE = 60  # from a signal until what is left is killed; DeepSpeed's launcher gives each rank in turn 30 of its own


def live_processes(group: int) -> list[psutil.Process]:
    """The live processes of a process group, without zombies."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return found


class Launch:
    """A running launcher in a process group of its own; signals that reach us are passed on to the whole group.

    The launcher itself dies of a signal and leaves its ranks behind, so a run has ended when its whole group has.
    """

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.signalled = False
        self._first = self._deadline = float("inf")
        self._handlers_before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        if self.signalled:  # while the process was being started
            self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        again = number == signal.SIGINT and now > self._first + 1  # Ctrl-C twice: do not wait for the save
        if not self.signalled:
            self._first, self._deadline = now, now + SECONDS_TO_SAVE
        self.signalled = True
        if hasattr(self, "_process"):
            self._signal_all(signal.SIGKILL if again else signal.SIGTERM)

    def wait(self) -> int:
        """The launcher's exit code, once no process of the run is left."""
        while self._process.poll() is None or live_processes(self._process.pid):
            if time.monotonic() > self._deadline:
                self._signal_all(signal.SIGKILL)
            time.sleep(0.2)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        return self._process.returncode


def exit_code(launcher_code: int, signalled: bool, before: Summary | None, after: Summary | None) -> int:
    """main.py's exit code, from the run folder's summary before and after: only a run whose summary says so has finished."""
    status = after.status if after and after != before else None
    if status == "finished":
        return FINISHED
    if status == "stopped" or (signalled and status != "failed"):
        return RESUMABLE
    return launcher_code if launcher_code > 0 else 128 - launcher_code if launcher_code < 0 else FAILED


def describe(code: int) -> str:
    """` with code 1`. A rank killed by a signal leaves DeepSpeed's launcher with minus its number, as an unsigned byte."""
    if code in (247, 137, -9):
        return ": a rank was killed by SIGKILL, as the system does when memory runs out"
    return f" with code {code}"


def train_once(options: LaunchOptions, ranks: int, flags: list[str], folder: Path) -> int:
    """Start the launcher and supervise it until its last process has ended; returns the exit code."""
    before = read_summary(folder)
    with tempfile.TemporaryDirectory() as scratch:
        command, environment = deepspeed_command(options, ranks, device.count_gpus(), flags, Path(scratch) / "hostfile")
        environment.setdefault("CIFAR10_STARTED_BY", start_command(options))
        launch = Launch(command, environment)
        code = launch.wait()
    after = read_summary(folder)
    first = options.node_rank == 0  # of several machines, the first writes the summary
    if first and after and after != before and after.status == "running" and not launch.signalled:  # no rank was left to
        after = replace(after, status="failed", reason=f"the run ended{describe(code)}")
        after.write(folder)
    return exit_code(code, launch.signalled, before, after)


def train(options: LaunchOptions, ranks: int, flags: list[str], max_steps: int | None, folder: Path) -> int:
    """Train the run in `folder` to its end, with its restarts; returns the exit code."""
    summary = read_summary(folder)
    if summary and summary.is_complete(max_steps):
        print(f"{folder} holds a finished run; its results are in its summary.json", flush=True)
        return FINISHED
    for restart in range(options.max_restarts + 1):
        code = train_once(options, ranks, [*flags, "--output-dir", str(folder)], folder)
        if code in (FINISHED, REFUSED, RESUMABLE) or restart == options.max_restarts:
            return code
        print(f"the run failed{describe(code)}; restart {restart + 1} of {options.max_restarts}", file=sys.stderr)
    return FAILED
