"""Stopping in good order: a signal only sets a flag; ranks agree at a step boundary, and then all of them save and leave."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from cifar10.distributed.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS_BETWEEN_AGREEMENTS = 1.0
TIMED_STEPS = 20  # of which the second half is timed: the first steps are slow
LAUNCHERS = {
    b"deepspeed",
    b"deepspeed.launcher.runner",
    b"deepspeed.launcher.launch",
    b"torchrun",
    b"torch.distributed.run",
    b"main.py",
}


def _parent_and_start(pid: int) -> tuple[int, str] | None:
    """A process's parent and start time (which tells it from a later one of the same number), where /proc tells; None for one
    that is dead, also if nobody has waited for it yet."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return None
    return None if after_name[0] in "ZX" else (int(after_name[1]), after_name[19])


def _launchers_above() -> dict[int, str]:
    """The processes that this rank was launched by, from its parent up: {pid: start time}."""
    found, pid = {}, os.getppid()
    while pid > 1 and (known := _parent_and_start(pid)):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            break
        # whole words only: the text of a shell's -c names our script too, and that shell may leave while we go on
        words = {os.path.basename(word) for word in command.split(b"\0") if b" " not in word}
        if not words & LAUNCHERS:
            break
        found[pid] = known[1]
        pid = known[0]
    return found


class StopRequest:
    """Whether this run has been asked to stop: by SIGTERM, SIGINT or SIGUSR1, by a file called STOP in `folder`, by having
    run for `max_minutes`, by the time `stop_at` (seconds since 1970), or by the death of one of its launchers.

    Handlers are installed by the constructor. With several ranks, all of them get the same answer at the same step.
    """

    def __init__(self, world: World, folder: Path, max_minutes: float | None = None, stop_at: float | None = None) -> None:
        self._world = world
        self._file = folder / "STOP"
        self._max_minutes = max_minutes
        self._stop_at = stop_at
        self._began = time.monotonic()
        self._reason = ""
        self._interrupted = float("inf")  # when Ctrl-C was pressed first
        self._launchers = _launchers_above()
        self._started = time.perf_counter()
        self._calls = 0
        self._every = 0  # steps between agreements; 0 until rank 0 has timed the first steps
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # a closed terminal; under nohup it is ignored
            signal.signal(signal.SIGHUP, self._on_signal)

    @property
    def reason(self) -> str:
        """Why, in words; empty on a rank that was told by the others."""
        return self._reason

    def _on_signal(self, number: int, _frame: object) -> None:
        now = time.monotonic()  # torchrun passes on a Ctrl-C that the terminal has already sent to all
        if number == signal.SIGINT and now > self._interrupted + 1:
            raise KeyboardInterrupt  # Ctrl-C again, a second later: somebody does not want to wait for the save
        if number == signal.SIGINT:
            self._interrupted = min(self._interrupted, now)
        self._reason = self._reason or signal.Signals(number).name

    def _look(self) -> None:
        """At what no signal tells of. One rank looks for the file and at the clock, since clocks and file systems differ."""
        self._look_for_launchers()
        if not self._world.is_main:
            return
        if self._file.exists():
            self._reason = self._reason or "the file STOP"
            self._file.unlink(missing_ok=True)  # the same command is to go on
        if self._max_minutes is not None and time.monotonic() - self._began > 60 * self._max_minutes:
            self._reason = self._reason or f"--max-minutes {self._max_minutes:g}"
        if self._stop_at is not None and time.time() > self._stop_at:
            self._reason = self._reason or "--stop-at"

    def _look_for_launchers(self) -> None:
        for pid, started in self._launchers.items():
            known = _parent_and_start(pid)
            if known is None or known[1] != started:
                self._reason = self._reason or f"launcher process {pid} is gone"

    def agreed(self) -> bool:
        """Asked after every step. One rank reads its flag; several agree about once a second, all at the same steps, and at
        each of the first ones, until it is known how many steps a second has."""
        self._calls += 1
        if self._calls in (TIMED_STEPS // 2, TIMED_STEPS):
            seconds = (time.perf_counter() - self._started) / (TIMED_STEPS - TIMED_STEPS // 2)
            self._started = time.perf_counter()
            if self._calls == TIMED_STEPS:
                self._every = self._world.from_main(lambda: max(1, min(1_000, round(SECONDS_BETWEEN_AGREEMENTS / seconds))))
        if self._calls % (self._every or 1):
            return self._world.size == 1 and bool(self._reason)
        self._look()
        return self._world.any_rank(bool(self._reason))
