"""Train on all the GPUs of this machine, or on its CPU: builds the deepspeed command, and minds it to its last process.

    uv run python main.py                                  the default recipe
    uv run python main.py --num-gpus 2 --epochs 10         two ranks; every other flag goes to cifar10_deepspeed.py
    uv run python main.py --num-nodes 2 --node-rank 0 --master-addr 10.0.0.1 --output-dir SHARED/run
                                                           the first of two machines; on the other, --node-rank 1
    uv run python main.py --seeds 3                        three runs, one after another, and what they have in common

--num-gpus N is the number of ranks on this machine (default: the GPUs found; without any, one rank on all CPU cores).
With --num-nodes, type the same on each machine but for --node-rank; --master-addr is the first machine's address,
--master-port (default 29500) a free port of it, and --output-dir a folder that all of them see.
--max-restarts N starts a run that has failed again, up to N times, from its newest checkpoint.
--seeds N trains with N seeds from --seed up, in the folders seed_0, seed_1, ... of --output-dir, prints mean and deviation, and
compares them in compare.html; the same command leaves finished seeds alone and goes on with the rest.
Exit codes: 0 the run has finished; 75 it was stopped, and the same command with --output-dir goes on with it;
2 the command cannot be carried out, and nothing was started; anything else is the code of what failed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType

import psutil

from cifar10 import UsageError
from cifar10.distributed import device
from cifar10.launch import seeds as sweep
from cifar10.plan import Plan, make_plan
from cifar10.run import folder as run_folder

SCRIPT = Path(__file__).resolve().with_name("cifar10_deepspeed.py")
FINISHED, FAILED, CANNOT, RESUMABLE = 0, 1, 2, 75  # 75 is sysexits.h's EX_TEMPFAIL: try again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS_TO_SAVE = 60  # from a signal until what is left is killed; DeepSpeed's launcher gives each rank in turn 30 of its own


@dataclass(frozen=True)
class Machines:
    """main.py's own flags: how many ranks on each machine, which of how many machines this is, and how many runs to start."""

    num_gpus: int | None = None
    num_nodes: int = 1
    node_rank: int = 0
    master_addr: str = ""
    master_port: int = 29_500
    max_restarts: int = 0
    seeds: int | None = None


def _value(flag: str, given: str) -> int | str:
    """The value of one of main.py's own flags. Raises UsageError."""
    if flag == "master_addr":
        return given
    least = 0 if flag in ("node_rank", "max_restarts") else 1
    if not given.isdecimal() or int(given) < least:
        dashed = "--" + flag.replace("_", "-")
        raise UsageError(f"{dashed} {given!r} is impossible; type a whole number from {least} up, as in {dashed} {least}")
    return int(given)


def split_flags(argv: list[str]) -> tuple[Machines, list[str]]:
    """main.py's own flags out of `argv` (--num-gpus N, --num_gpus=N), and the rest. Raises UsageError."""
    own, rest, words = {}, [], iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in {field.name for field in fields(Machines)}:
            rest.append(word)
        else:
            own[name] = _value(name, value if equals else next(words, ""))
    return _checked(Machines(**own)), rest


def _checked(machines: Machines) -> Machines:
    """Raise UsageError unless this is one of the machines that were announced, and knows the first one's address."""
    if machines.node_rank >= machines.num_nodes:
        last = machines.num_nodes - 1
        raise UsageError(
            f"--node-rank {machines.node_rank} of --num-nodes {machines.num_nodes} is impossible; type 0 to {last}"
        )
    if machines.num_nodes > 1 and not machines.master_addr:
        raise UsageError("--num-nodes needs --master-addr, the first machine's address, as in --master-addr 10.0.0.1")
    if machines.num_nodes > 1 and machines.seeds:
        raise UsageError("--seeds needs one machine; leave --num-nodes out, or start each seed by itself, as in --seed 1")
    if machines.num_nodes == 1 and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "RANK" not in os.environ:
        raise UsageError(
            "srun has started several of main.py, which starts all ranks of a machine itself; type srun python"
            " cifar10_deepspeed.py, or sbatch run_deepspeed.sh"
        )
    return machines


def ranks_wanted(asked: int | None, gpus: int) -> int:
    """The number of ranks. Raises UsageError if more GPUs are asked for than there are."""
    if asked and gpus and asked > gpus:
        raise UsageError(f"--num-gpus {asked}, but this machine has {gpus}; type --num-gpus {gpus} or fewer")
    return asked or gpus or 1


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def which_devices(machines: Machines, ranks: int, gpus: int, hostfile: Path) -> tuple[list[str], dict[str, str]]:
    """The part of the deepspeed command line that says where ranks go, and what that leaves of the environment."""
    environment = dict(os.environ)
    hosts = [f"node{number}" for number in range(machines.num_nodes)] if machines.num_nodes > 1 else ["localhost"]
    where = [f"--num_gpus={ranks}", f"--master_port={free_port()}"]
    if machines.num_nodes > 1:
        hostfile.write_text("".join(f"{host} slots={ranks}\n" for host in hosts))
        first = [f"--master_addr={machines.master_addr}", f"--master_port={machines.master_port}"]
        where = [f"--hostfile={hostfile}", "--no_ssh", f"--node_rank={machines.node_rank}", *first]
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if gpus and visible:  # DeepSpeed ignores the variable where it is given a number of GPUs
        devices = ",".join(visible[:ranks])
        where = [word for word in where if not word.startswith("--num_gpus")]
        where.append("--include=" + "@".join(f"{host}:{devices}" for host in hosts))
        del environment["CUDA_VISIBLE_DEVICES"]
    return where, environment


def launch_command(
    machines: Machines, ranks: int, gpus: int, flags: list[str], hostfile: Path
) -> tuple[list[str], dict[str, str]]:
    """The deepspeed command line for `ranks` ranks on this machine, and its environment; `hostfile` is written if needed."""
    beside_python = Path(sys.executable).with_name("deepspeed")
    deepspeed = [str(beside_python)] if beside_python.exists() else [sys.executable, "-m", "deepspeed.launcher.runner"]
    where, environment = which_devices(machines, ranks, gpus, hostfile)
    if not gpus:
        environment.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed's detection prints a warning in every process
    return [*deepspeed, "-q", *where, str(SCRIPT), *flags], environment


def started_by(machines: Machines) -> str:
    """The words before the flags that start this again."""
    given = [(f.name, getattr(machines, f.name)) for f in fields(Machines) if getattr(machines, f.name) != f.default]
    own = [word for name, value in given for word in ("--" + name.replace("_", "-"), str(value))]
    return shlex.join(["python", sys.argv[0], *own])


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
        self._before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
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
        for number, handler in self._before.items():
            signal.signal(number, handler)
        return self._process.returncode


def exit_code(launcher_code: int, signalled: bool, before: dict | None, after: dict | None) -> int:
    """What main.py returns, from the run folder's summary before and after: only a run that says so has finished."""
    status = after["status"] if after and after != before else None
    if status == "finished":
        return FINISHED
    if status == "stopped" or (signalled and status != "failed"):
        return RESUMABLE
    return launcher_code if launcher_code > 0 else 128 - launcher_code if launcher_code < 0 else FAILED


def check(argv: list[str]) -> tuple[Machines, int, list[str], Plan, Path]:
    """All that is needed to launch: the machines, the ranks on this one, the script's flags, its plan and its folder."""
    machines, flags = split_flags(argv)
    ranks = ranks_wanted(machines.num_gpus, device.count_gpus())
    plan = make_plan(flags, ranks * machines.num_nodes, "main.py", __doc__)
    if machines.num_nodes > 1 and plan.options.output_dir is None:
        raise UsageError("--num-nodes needs --output-dir, a folder that all machines see, as in --output-dir SHARED/run")
    return machines, ranks, flags, plan, run_folder.choose(plan.options.output_dir, plan.options.recipe)


def launch_and_wait(machines: Machines, ranks: int, flags: list[str]) -> tuple[int, bool]:
    """Run the launcher to its end: its exit code, and whether it was asked to stop."""
    with tempfile.TemporaryDirectory() as scratch:
        command, environment = launch_command(machines, ranks, device.count_gpus(), flags, Path(scratch) / "hostfile")
        environment.setdefault("CIFAR10_STARTED_BY", started_by(machines))
        launch = Launch(command, environment)
        return launch.wait(), launch.signalled


def in_words(code: int) -> str:
    """` with code 1`; a rank that a signal has ended leaves DeepSpeed's launcher with minus its number, as an unsigned byte."""
    if code in (247, 137, -9):
        return ": a rank was killed by SIGKILL; the system does that, too, when memory runs out"
    return f" with code {code}"


def once(machines: Machines, ranks: int, flags: list[str], folder: Path) -> int:
    """Launch, and mind it to its last process; returns the exit code."""
    before = run_folder.read_json(folder / "summary.json")
    code, signalled = launch_and_wait(machines, ranks, flags)
    after = run_folder.read_json(folder / "summary.json")
    first = machines.node_rank == 0  # of several machines one speaks for the run
    if first and after and after != before and after["status"] == "running" and not signalled:  # no rank was left to say so
        after = {**after, "status": "failed", "reason": f"the run ended{in_words(code)}"}
        run_folder.write_json(folder / "summary.json", after)
    return exit_code(code, signalled, before, after)


def train(machines: Machines, ranks: int, flags: list[str], max_steps: int | None, folder: Path) -> int:
    """The run in `folder` to its end, with its restarts; returns the exit code."""
    if run_folder.is_finished(run_folder.read_json(folder / "summary.json"), max_steps):
        print(f"{folder} holds a finished run; its results are in its summary.json", flush=True)
        return FINISHED
    for restart in range(machines.max_restarts + 1):
        code = once(machines, ranks, [*flags, "--output-dir", str(folder)], folder)
        if code in (FINISHED, CANNOT, RESUMABLE) or restart == machines.max_restarts:
            return code
        print(f"it failed{in_words(code)}; restart {restart + 1} of {machines.max_restarts}", file=sys.stderr)
    return FAILED


def train_seeds(machines: Machines, ranks: int, flags: list[str], plan: Plan, output: Path) -> int:
    """A run for each of --seeds, and what they come to. Raises UsageError if one of them cannot be, before any is started."""
    seeds, of_each = range(plan.recipe.seed, plan.recipe.seed + (machines.seeds or 1)), replace(machines, seeds=None)
    for seed in seeds:
        make_plan(sweep.flags_of(flags, output, seed), ranks, "main.py")
    if len(seeds) > 1:  # each is a run of its own at W&B, whose id a sweep's agent chooses for one
        os.environ.pop("WANDB_RUN_ID", None)
    for number in SIGNALS:  # between two runs; a run in progress has its own way to stop
        signal.signal(number, lambda *_: sys.exit(RESUMABLE))

    def train_one(seed: int) -> int:
        its_flags, folder = sweep.flags_of(flags, output, seed), sweep.folder_of(output, seed)
        return train(of_each, ranks, its_flags, plan.options.max_steps, folder)

    code = sweep.carry_out(seeds, train_one, stopped=(RESUMABLE,))
    sweep.tell(output, seeds, with_page=plan.options.report)
    if code != FINISHED:
        print(f"to go on with all seeds: {run_folder.command_to_continue(started_by(machines), flags, output)}", flush=True)
    return code


def main(argv: list[str]) -> int:
    """Check, launch, mind; returns the exit code."""
    try:
        machines, ranks, flags, plan, folder = check(argv)
        if machines.seeds:
            return train_seeds(machines, ranks, flags, plan, folder)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return CANNOT
    return train(machines, ranks, flags, plan.options.max_steps, folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
