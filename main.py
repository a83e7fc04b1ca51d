"""Train on all the GPUs of this machine, or on its CPU: builds the deepspeed command, and minds it to its last process.

    uv run python main.py                                  the default recipe
    uv run python main.py --num-gpus 2 --epochs 10         two ranks; every other flag goes to cifar10_deepspeed.py

--num-gpus N is the number of ranks (default: the GPUs found; without any, one rank on all CPU cores).
Exit codes: 0 the run has finished; 75 it was stopped, and the same command with --output-dir goes on with it;
2 the command cannot be carried out, and nothing was started; anything else is the code of what failed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

from cifar10 import UsageError, preflight, run_folder

SCRIPT = Path(__file__).resolve().with_name("cifar10_deepspeed.py")
FINISHED, FAILED, CANNOT, RESUMABLE = 0, 1, 2, 75  # 75 is sysexits.h's EX_TEMPFAIL: try again
SECONDS_TO_SAVE = 60  # from a signal until what is left is killed; DeepSpeed's launcher gives each rank in turn 30 of its own


def split_flags(argv: list[str]) -> tuple[int | None, list[str]]:
    """--num-gpus N (or --num_gpus=N) out of `argv`, and the rest."""
    rest, count, words = [], None, iter(argv)
    for word in words:
        found = re.fullmatch(r"--num[-_]gpus(?:=(.*))?", word)
        if not found:
            rest.append(word)
            continue
        count = found[1] if found[1] is not None else next(words, "")
        if not count.isdecimal() or int(count) < 1:
            raise UsageError(f"--num-gpus {count!r} is impossible; type a whole number from 1 up, as in --num-gpus 1")
    return (int(count) if count is not None else None), rest


def count_gpus() -> int:
    """GPUs that torch can use. Torch, which takes seconds to import, is asked only where there is a driver."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    if not (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists() or Path("/dev/kfd").exists()):
        return 0
    import torch

    return torch.cuda.device_count()


def ranks_wanted(asked: int | None, gpus: int) -> int:
    """The number of ranks. Raises UsageError if more GPUs are asked for than there are."""
    if asked and gpus and asked > gpus:
        raise UsageError(f"--num-gpus {asked}, but this machine has {gpus}; type --num-gpus {gpus} or fewer")
    return asked or gpus or 1


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch_command(ranks: int, gpus: int, flags: list[str]) -> tuple[list[str], dict[str, str]]:
    """The deepspeed command line for `ranks` ranks on this machine, and its environment."""
    beside_python = Path(sys.executable).with_name("deepspeed")
    deepspeed = [str(beside_python)] if beside_python.exists() else [sys.executable, "-m", "deepspeed.launcher.runner"]
    where, environment = [f"--num_gpus={ranks}"], dict(os.environ)
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if gpus and visible:  # DeepSpeed ignores the variable where it is given a number of GPUs
        where = [f"--include=localhost:{','.join(visible[:ranks])}"]
        del environment["CUDA_VISIBLE_DEVICES"]
    if not gpus:
        environment.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed's detection prints a warning in every process
    return [*deepspeed, "-q", *where, f"--master_port={free_port()}", str(SCRIPT), *flags], environment


def processes_of(group: int) -> list[psutil.Process]:
    """The processes of a process group that are still alive; one that has died but was not waited for is not."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return found


class Launch:
    """A running launcher in a process group of its own; signals that reach us are passed on to all of the group.

    The launcher itself dies of a signal and leaves its ranks behind, so the end of a run is the end of the whole group.
    """

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.signalled = False
        self._first = self._deadline = float("inf")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._pass_on)
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        if self.signalled:  # it came while the process was being made
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
        while self._process.poll() is None or processes_of(self._process.pid):
            if time.monotonic() > self._deadline:
                self._signal_all(signal.SIGKILL)
            time.sleep(0.2)
        return self._process.returncode


def exit_code(launcher_code: int, signalled: bool, before: dict | None, after: dict | None) -> int:
    """What main.py returns, from the run folder's summary before and after: only a run that says so has finished."""
    status = after["status"] if after and after != before else None
    if status == "finished":
        return FINISHED
    if status == "stopped" or (signalled and status != "failed"):
        return RESUMABLE
    return launcher_code if launcher_code > 0 else 128 - launcher_code if launcher_code < 0 else FAILED


def main(argv: list[str]) -> int:
    """Check, launch, mind; returns the exit code."""
    try:
        asked, flags = split_flags(argv)
        gpus = count_gpus()
        ranks = ranks_wanted(asked, gpus)
        plan = preflight.check(flags, ranks, "main.py", __doc__)
        folder = run_folder.choose(plan.options.output_dir, plan.options.recipe)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return CANNOT
    before = run_folder.read_json(folder / "summary.json")
    if run_folder.is_finished(before, plan.options.max_steps):
        print(f"{folder} holds a finished run; its results are in its summary.json")
        return FINISHED
    command, environment = launch_command(ranks, gpus, [*flags, "--output-dir", str(folder)])
    environment["CIFAR10_STARTED_BY"] = shlex.join(["python", sys.argv[0], *(["--num-gpus", str(asked)] if asked else [])])
    launch = Launch(command, environment)
    code = launch.wait()
    after = run_folder.read_json(folder / "summary.json")
    if after and after != before and after["status"] == "running" and not launch.signalled:  # no rank was left to say so
        after = {**after, "status": "failed", "reason": f"the launcher ended with code {code}"}
        run_folder.write_json(folder / "summary.json", after)
    return exit_code(code, launch.signalled, before, after)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
