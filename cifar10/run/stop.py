"""Graceful stop: signals only set a flag; all ranks agree at a step boundary, save and exit."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from cifar10 import RunFailed
from cifar10.distributed.launchers import SIGNALS
from cifar10.distributed.world import World

HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
SECONDS_BETWEEN_AGREEMENTS = 1.0
TIMED_STEPS = 20  # the first half is warmup
LAUNCHERS = {*"deepspeed deepspeed.launcher.runner deepspeed.launcher.launch torchrun torch.distributed.run main.py".split()}


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _launchers_above() -> list[psutil.Process]:
    """The launcher processes among this rank's ancestors."""
    found = []
    with suppress(psutil.Error):
        for process in psutil.Process().parents():
            # whole words only: a shell's -c contains the script's name too, and that shell may exit earlier
            if not LAUNCHERS & {os.path.basename(word) for word in process.cmdline() if " " not in word}:
                break
            found.append(process)
    return found


@contextmanager
def handlers_given_back() -> Iterator[None]:
    """Whatever handles signals afterwards is what handled them before."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, HANGUP)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


class StopRequest:
    """Whether to stop: after SIGTERM, SIGINT or SIGUSR1, when a file STOP appears in `folder`, after `max_minutes`, at the Unix
    time `stop_at`, or when a launcher process has died.

    The constructor installs the signal handlers. All ranks stop at the same step.
    """

    def __init__(self, world: World, folder: Path, max_minutes: float | None = None, stop_at: float | None = None) -> None:
        self._world = world
        self._folder, self._file = folder, folder / "STOP"
        self._place = self._identity()
        self._max_minutes = max_minutes
        self._stop_at = stop_at
        self._began = time.monotonic()
        self.reason = ""  # why to stop; empty on a rank where nothing happened
        self._interrupted = float("inf")  # time of the first Ctrl-C
        self._launchers = _launchers_above()
        self._started = time.perf_counter()
        self._calls = 0
        self._every = 0  # steps between agreements; 0 until rank 0 has timed the first steps
        if threading.current_thread() is threading.main_thread():  # in another one, signals are for the program around us
            for number in SIGNALS:
                signal.signal(number, self._on_signal)
            if signal.getsignal(HANGUP) is signal.SIG_DFL:  # terminal closed; nohup ignores it
                signal.signal(HANGUP, self._on_signal)

    def _identity(self) -> tuple[int, int] | None:
        """What the run's folder is, whatever its name; None if there is none."""
        with suppress(OSError):
            found = self._folder.stat()
            return found.st_dev, found.st_ino
        return None

    def check_folder(self) -> None:
        """Raise RunFailed on all ranks if the run's folder was deleted or moved, before it is made again. Collective."""
        if self._world.any_rank(self._world.is_main and self._identity() != self._place):
            how = "was deleted or moved while the run was training"
            raise RunFailed(f"{self._folder} {how}; move it back, and the same command continues from its newest checkpoint")

    def _on_signal(self, number: int, _frame: object) -> None:
        now = time.monotonic()  # torchrun forwards a Ctrl-C that the terminal already sent to all ranks
        if number == signal.SIGINT and now > self._interrupted + 1:
            raise KeyboardInterrupt  # a second Ctrl-C skips the save
        if number == signal.SIGINT:
            self._interrupted = min(self._interrupted, now)
        self.reason = self.reason or signal.Signals(number).name

    def _poll(self) -> None:
        """Check what sends no signal. Only rank 0 checks the file and the clock: nodes may differ in both."""
        if dead := next((process for process in self._launchers if not _is_alive(process)), None):
            self.reason = self.reason or f"launcher process {dead.pid} has exited"
        if not self._world.is_main:
            return
        if self._identity() != self._place:
            self.reason = self.reason or "its folder is gone"
        if self._file.exists():
            self.reason = self.reason or "the file STOP"
            self._file.unlink(missing_ok=True)  # so that the same command can resume
        if self._max_minutes is not None and time.monotonic() - self._began > 60 * self._max_minutes:
            self.reason = self.reason or f"--max-minutes {self._max_minutes:g}"
        if self._stop_at is not None and time.time() > self._stop_at:
            self.reason = self.reason or "--stop-at"

    def agreed(self) -> bool:
        """Whether to stop now, called after every step. Several ranks communicate at the same steps, about once a second; at
        every step until rank 0 has measured the step time."""
        self._calls += 1
        if self._calls in (TIMED_STEPS // 2, TIMED_STEPS):
            seconds = (time.perf_counter() - self._started) / (TIMED_STEPS - TIMED_STEPS // 2)
            self._started = time.perf_counter()
            if self._calls == TIMED_STEPS:
                self._every = self._world.from_main(lambda: max(1, min(1_000, round(SECONDS_BETWEEN_AGREEMENTS / seconds))))
        if self._calls % (self._every or 1):
            return self._world.size == 1 and bool(self.reason)
        self._poll()
        return self._world.any_rank(bool(self.reason))
