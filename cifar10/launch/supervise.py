"""Supervises a launcher: passes signals on to its ranks, waits for all of its processes, restarts failed runs."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

import psutil

from cifar10.distributed import device
from cifar10.distributed.launchers import SIGNALS
from cifar10.launch.budget import Choice, verdict
from cifar10.launch.command import BUDGET_PROGRAM, SCRIPT, LaunchOptions, deepspeed_command, start_command
from cifar10.run.summary import Summary, has_finished, read_summary

FINISHED, FAILED, REFUSED, RESUMABLE = 0, 1, 2, 75  # 75 is sysexits.h's EX_TEMPFAIL: try again
SECONDS_TO_SAVE = 60  # from a signal until the remaining processes are killed
SECONDS_TO_FAIL = 5  # from the death of a rank until the others are killed, which may be waiting for it on the GPU


def live_processes(group: int) -> list[psutil.Process]:
    """The processes of a process group, without zombies."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def rank_processes(launcher: int) -> list[psutil.Process]:
    """The ranks of DeepSpeed's launcher: children, with the script in their command line, of what it has started."""
    with contextlib.suppress(psutil.Error):
        found = (child for launch in psutil.Process(launcher).children() for child in launch.children())
        return [process for process in found if {str(SCRIPT), BUDGET_PROGRAM} & {*process.cmdline()}]
    return []


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


class Launch:
    """A launcher in a process group of its own, whose ranks get the signals; it may exit before they do."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.signalled = False
        self._ranks: list[psutil.Process] = []
        self._first = self._deadline = self._first_death = float("inf")
        self._handlers_before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        self._handlers_before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._pause)
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        if self.signalled:  # while the process was being started
            self._ask_to_stop()

    def _signal_all(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _ask_to_stop(self) -> None:
        """Send SIGTERM to the ranks, or to all where there are none yet. DeepSpeed's launcher would kill them 30 s after it."""
        ranks = rank_processes(self._process.pid)
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.terminate()
        if not ranks:
            self._signal_all(signal.SIGTERM)

    def _pause(self, *_: object) -> None:
        """Ctrl-Z: the ranks, which the terminal does not reach, stop with this process and go on with it."""
        if hasattr(self, "_process"):
            self._signal_all(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        if hasattr(self, "_process"):
            self._signal_all(signal.SIGCONT)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        again = number == signal.SIGINT and now > self._first + 1  # Ctrl-C twice: do not wait for the checkpoint
        if not self.signalled:
            self._first, self._deadline = now, now + SECONDS_TO_SAVE
        self.signalled = True
        if hasattr(self, "_process"):
            if again:
                self._signal_all(signal.SIGKILL)
            else:
                self._ask_to_stop()

    def _end_after_a_death(self, ranks: int, is_over: Callable[[], bool]) -> None:
        """Kill what is left of `ranks` ranks a few seconds after the first has died, unless the run had come to its end.

        DeepSpeed's launcher sends SIGTERM, at which a rank saves if it can, and waits half a minute for each. It is not killed
        itself, because it knows the dead rank's exit code.
        """
        if len(self._ranks) < ranks:
            self._ranks = rank_processes(self._process.pid)
            return
        alive = [rank for rank in self._ranks if is_alive(rank)]
        if len(alive) == ranks:
            return
        self._first_death = min(self._first_death, time.monotonic())
        if time.monotonic() < self._first_death + SECONDS_TO_FAIL or is_over():
            return
        for rank in alive:
            with contextlib.suppress(psutil.Error):
                for process in (*rank.children(recursive=True), rank):
                    process.kill()
        if not alive and self._process.poll():  # the launcher has failed, and only what the ranks had started is left
            self._signal_all(signal.SIGKILL)

    def wait(self, ranks: int = 1, is_over: Callable[[], bool] = lambda: False) -> int:
        """Wait until no process of the run is left; returns the launcher's exit code. `is_over`: all is written."""
        while self._process.poll() is None or live_processes(self._process.pid):
            if time.monotonic() > self._deadline:
                self._signal_all(signal.SIGKILL)
            self._end_after_a_death(ranks, is_over)
            time.sleep(0.2)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        return self._process.returncode


def is_at_its_end(before: Summary | None, after: Summary | None) -> bool:
    """Whether a run has finished or stopped, and all is written: its summary is new and says so."""
    return after is not None and after != before and after.status in ("finished", "stopped")


def exit_code(launcher_code: int, signalled: bool, before: Summary | None, after: Summary | None) -> int:
    """main.py's exit code: a run has finished or stopped if its summary is new and has that status."""
    status = after.status if after and after != before else None
    if status == "finished":
        return FINISHED
    if status == "stopped" or (signalled and status != "failed"):
        return RESUMABLE
    return launcher_code if launcher_code > 0 else 128 - launcher_code if launcher_code < 0 else FAILED


def describe(code: int) -> str:
    """How a run ended; DeepSpeed's launcher exits with 256 minus the number of the signal that killed a rank."""
    return ": a rank was killed by SIGKILL; out of memory?" if code in (247, 137, -9) else f" with code {code}"


def launched(
    options: LaunchOptions, ranks: int, flags: list[str], is_over: Callable[[], bool] = lambda: False
) -> tuple[int, bool]:
    """Start the launcher and wait for the end of its last process; returns its exit code, and whether it was signalled.

    Several ranks of --budget only choose, and a second launch trains: they cannot meet twice in one process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command, environment = deepspeed_command(options, ranks, device.count_gpus(), flags, Path(scratch) / "hostfile")
        again = start_command(replace(options, budget=None))  # the flags of its choice are added
        launch = Launch(command, {"CIFAR10_STARTED_BY": again, **environment})
        code, signalled = launch.wait(ranks, is_over), launch.signalled
    if options.budget and not (code or signalled) and "--dry-run" not in flags:
        folder = Path(flags[-1])
        if ranks > 1 and (choice := Choice.read(folder, options.budget)):
            code, signalled = launched(replace(options, budget=None), ranks, [*choice.flags, *flags], is_over)
        if line := verdict(options.budget, folder, psutil.Process().create_time()):
            print(line, flush=True)
    return code, signalled


def train_once(options: LaunchOptions, ranks: int, flags: list[str], folder: Path) -> int:
    """Train once; returns the exit code."""
    before = read_summary(folder)
    code, signalled = launched(options, ranks, flags, lambda: is_at_its_end(before, read_summary(folder)))
    after = read_summary(folder)
    crashed = after and after != before and after.status == "running" and not signalled
    if crashed and options.node_rank == 0:  # no rank could write it, and the first machine writes the summary
        after = replace(after, status="failed", reason=f"the run ended{describe(code)}")
        after.write(folder)
    return exit_code(code, signalled, before, after)


def train(options: LaunchOptions, ranks: int, flags: list[str], max_steps: int | None, folder: Path) -> int:
    """Train the run in `folder`, restarting it if it fails; returns the exit code."""
    if has_finished(folder, max_steps):
        return FINISHED
    for restart in range(options.max_restarts + 1):
        code = train_once(options, ranks, [*flags, "--output-dir", str(folder)], folder)
        if code in (FINISHED, REFUSED, RESUMABLE) or restart == options.max_restarts:
            return code
        print(f"the run failed{describe(code)}; restart {restart + 1} of {options.max_restarts}", file=sys.stderr)
    return FAILED
