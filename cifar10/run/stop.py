"""Graceful stop: signals only set a flag; all ranks agree at a step boundary, save and exit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from cifar10.distributed.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS_BETWEEN_AGREEMENTS = 1.0
TIMED_STEPS = 20  # the first half is warmup
LAUNCHERS = {
    b"deepspeed",
    b"deepspeed.launcher.runner",
    b"deepspeed.launcher.launch",
    b"torchrun",
    b"torch.distributed.run",
    b"main.py",
}


def _parent_and_start(pid: int) -> tuple[int, str] | None:
    """A process's parent and start time (process IDs are reused) from /proc; None if dead, a zombie, or without /proc."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return None
    return None if after_name[0] in "ZX" else (int(after_name[1]), after_name[19])


def _launchers_above() -> dict[int, str]:
    """The launcher processes among this rank's ancestors: {pid: start time}."""
    found, pid = {}, os.getppid()
    while pid > 1 and (known := _parent_and_start(pid)):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            break
        # whole words only: a shell's -c contains the script's name too, and that shell may exit earlier
        words = {os.path.basename(word) for word in command.split(b"\0") if b" " not in word}
        if not words & LAUNCHERS:
            break
        found[pid] = known[1]
        pid = known[0]
    return found


class StopRequest:
    """Whether to stop: after SIGTERM, SIGINT or SIGUSR1, when a file STOP appears in `folder`, after `max_minutes`, at the Unix
    time `stop_at`, or when a launcher process has died.

    The constructor installs the signal handlers. All ranks stop at the same step.
    """

    def __init__(self, world: World, folder: Path, max_minutes: float | None = None, stop_at: float | None = None) -> None:
        self._world = world
        self._file = folder / "STOP"
        self._max_minutes = max_minutes
        self._stop_at = stop_at
        self._began = time.monotonic()
        self._reason = ""
        self._interrupted = float("inf")  # time of the first Ctrl-C
        self._launchers = _launchers_above()
        self._started = time.perf_counter()
        self._calls = 0
        self._every = 0  # steps between agreements; 0 until rank 0 has timed the first steps
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # terminal closed; nohup ignores it
            signal.signal(signal.SIGHUP, self._on_signal)

    @property
    def reason(self) -> str:
        """Why to stop; empty on a rank where nothing happened."""
        return self._reason

    def _on_signal(self, number: int, _frame: object) -> None:
        now = time.monotonic()  # torchrun forwards a Ctrl-C that the terminal already sent to all ranks
        if number == signal.SIGINT and now > self._interrupted + 1:
            raise KeyboardInterrupt  # a second Ctrl-C skips the save
        if number == signal.SIGINT:
            self._interrupted = min(self._interrupted, now)
        self._reason = self._reason or signal.Signals(number).name

    def _poll(self) -> None:
        """Check what sends no signal. Only rank 0 checks the file and the clock: nodes may differ in both."""
        self._check_launchers()
        if not self._world.is_main:
            return
        if self._file.exists():
            self._reason = self._reason or "the file STOP"
            self._file.unlink(missing_ok=True)  # so that the same command can resume
        if self._max_minutes is not None and time.monotonic() - self._began > 60 * self._max_minutes:
            self._reason = self._reason or f"--max-minutes {self._max_minutes:g}"
        if self._stop_at is not None and time.time() > self._stop_at:
            self._reason = self._reason or "--stop-at"

    def _check_launchers(self) -> None:
        for pid, started in self._launchers.items():
            known = _parent_and_start(pid)
            if known is None or known[1] != started:
                self._reason = self._reason or f"launcher process {pid} has exited"

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
            return self._world.size == 1 and bool(self._reason)
        self._poll()
        return self._world.any_rank(bool(self._reason))
