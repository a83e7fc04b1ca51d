"""Launchers, detected from the environment variables they set: torchrun, deepspeed, srun, mpirun, or none.

torch and DeepSpeed read RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which torchrun and deepspeed set. For srun
and mpirun they are derived from SLURM's and the MPI library's variables; every rank derives the same address and port.
"""

import os
import re
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from cifar10 import UsageError

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))  # ask for a stop
DERIVED = "CIFAR10_LAUNCHER"  # names the launcher whose variables were translated
PORTS = range(10_000, 60_000)  # the job ID selects one
SECONDS_TO_RESOLVE = 30
START = "unset RANK to train in one process, or start the ranks with torchrun --nproc_per_node=N cifar10_deepspeed.py"
MPI = (  # rank, size, and both on this machine: Open MPI, Intel MPI and MPICH, MVAPICH, Cray
    tuple(f"OMPI_COMM_WORLD_{word}" for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    tuple(f"MV2_COMM_WORLD_{word}" for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)


def name(environment: dict[str, str]) -> str:
    """The launcher of this process: torchrun, deepspeed, srun, mpirun, or python if there is none."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    return "deepspeed" if "CROSS_SIZE" in environment else environment.get(DERIVED, "python")


def _slurm(*question: str) -> str:
    """The output of SLURM's scontrol; empty if it fails or is not installed."""
    try:
        return subprocess.run(["scontrol", *question], capture_output=True, check=True, timeout=30).stdout.decode(
            errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return ""


def _first_slurm_host(nodes: str) -> str:
    """The address of the first node in SLURM's compressed list, such as `gpu[03-05,09]`."""
    listed = _slurm("show", "hostnames", nodes).split()
    host = listed[0] if listed else "".join(re.match(r"([^,[]*)\[?(\d*)", nodes).groups())
    for address in (host, *re.findall(r"NodeAddr=(\S+)", _slurm("show", "node", host))):
        with suppress(OSError):  # it does not resolve
            socket.getaddrinfo(address, None)
            return address
    raise UsageError(f"cannot resolve the first node, {host}; set MASTER_ADDR to an address that every node can reach")


def _tasks_on_this_node(tasks_per_node: str, node: int) -> int:
    """Entry `node` of SLURM's run-length encoded list: `2(x3),1` means 2, 2, 2, 1."""
    runs = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in tasks_per_node.split(","))
    counts = [int(run[1]) for run in runs if run for _ in range(int(run[2] or 1))]
    return counts[node] if node < len(counts) else 1


def _from_slurm(environment: dict[str, str]) -> dict[str, str]:
    """RANK etc. of a task started by srun; empty outside a step of several tasks."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or "SLURM_PROCID" not in environment:  # a batch script has SLURM_PROCID too, but no step
        return {}
    if "SLURM_PTY_PORT" in environment:  # a shell of srun --pty, beside which no other task runs this program
        return {}
    node, job, step = (int(environment.get(f"SLURM_{word}", "0")) for word in ("NODEID", "JOB_ID", "STEP_ID"))
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    alone = environment.get("SLURM_STEP_NUM_NODES", "1") == "1"
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(_tasks_on_this_node(environment.get("SLURM_STEP_TASKS_PER_NODE", tasks), node)),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or ("127.0.0.1" if alone else _first_slurm_host(nodes)),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(PORTS[(job * 7 + step) % len(PORTS)]),
        DERIVED: "srun",
    }


def _from_mpi(environment: dict[str, str]) -> dict[str, str]:
    """RANK etc. of a process started by an mpirun or mpiexec; empty without one, and for a single rank."""
    family = next((names for names in MPI if environment.get(names[1], "1") != "1" and names[3] in environment), None)
    if family is None:
        if environment.get("PMI_SIZE", "1") != "1" and "SLURM_STEP_ID" not in environment:
            raise UsageError(
                "this MPI does not say which ranks share a machine; use torchrun, or mpirun of Open MPI or Intel MPI"
            )
        return {}
    rank, size, local_rank, local_size = family
    if environment[size] != environment[local_size] and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise UsageError(
            "mpirun on several machines needs MASTER_ADDR and MASTER_PORT, an address of the first that all can reach:"
            " mpirun -x MASTER_ADDR=10.0.0.1 -x MASTER_PORT=29500 ... (with Intel MPI: mpirun -genv MASTER_ADDR 10.0.0.1 ...)"
        )
    return {
        "RANK": environment[rank],
        "WORLD_SIZE": environment[size],
        "LOCAL_RANK": environment[local_rank],
        "LOCAL_WORLD_SIZE": environment[local_size],
        "MASTER_ADDR": environment.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(PORTS[os.getppid() % len(PORTS)]),  # mpirun, parent of all
        DERIVED: "mpirun",
    }


def _refuse_contradictions(environment: dict[str, str]) -> None:
    """Raise UsageError unless RANK and the others that it needs are there, and are numbers that fit together."""
    if missing := [name for name in ("RANK", "WORLD_SIZE") if not environment.get(name)]:
        raise UsageError(f"{missing[0]} is not set, but {'WORLD_SIZE' if 'RANK' in missing else 'RANK'} is; {START}")
    size = environment["WORLD_SIZE"]
    local_size = environment.get("LOCAL_WORLD_SIZE") or size
    for name, limit, below in (("RANK", size, 1), ("LOCAL_RANK", local_size, 1), ("LOCAL_WORLD_SIZE", size, 0)):
        number = environment.get(name) or "0"
        if not (number + limit).isdecimal() or int(number) > int(limit) - below:
            raise UsageError(f"{name} is {number} of {limit}, expected a number that fits; {START}")
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if absent and size != "1":
        raise UsageError(f"{absent[0]} is not set, with WORLD_SIZE {size}; {START}")


def world_size() -> int:
    """The number of ranks that the launcher started, or 1; under srun and mpirun this sets RANK, WORLD_SIZE and the others.

    Without RANK this process is alone, whatever else a shell has left over. Raises UsageError for what contradicts itself.
    """
    if "RANK" not in os.environ:
        # MPI first: in a multi-node job mpirun starts its daemons with srun, and ranks inherit SLURM's variables
        os.environ.update(_from_mpi(dict(os.environ)) or _from_slurm(dict(os.environ)))
    if "RANK" not in os.environ:
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
            os.environ.pop(name, None)
        return 1
    _refuse_contradictions(dict(os.environ))
    return int(os.environ["WORLD_SIZE"])


def notes(output_dir: Path | None) -> list[str]:
    """What is odd about how this process was started, a line each."""
    found, restarts = [], os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        found.append(f"WORLD_SIZE={os.environ['WORLD_SIZE']} has no effect without RANK: this process trains alone")
    if "SLURM_PTY_PORT" in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        found.append(
            "this is a shell of srun --pty: this process trains alone; for all tasks: srun python cifar10_deepspeed.py"
        )
    if restarts != "0" and output_dir is None:
        found.append(
            f"torchrun has restarted the run (restart {restarts}), which begins anew; with --output-dir it would go on"
        )
    return found


def wait_for_name(host: str) -> None:
    """Return when `host` resolves, which in a new container takes a while. Raises UsageError if it does not."""
    for seconds_left in range(SECONDS_TO_RESOLVE, -1, -1):
        with suppress(OSError, UnicodeError):
            socket.getaddrinfo(host, None)
            return
        if seconds_left:
            time.sleep(1)
    raise UsageError(f"MASTER_ADDR={host} does not resolve on this machine; set it to an address, for example 10.0.0.1")
