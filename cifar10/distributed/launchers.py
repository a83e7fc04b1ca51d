"""Launchers, detected from the environment variables they set: torchrun, deepspeed, srun, mpirun, or none.

torch and DeepSpeed read RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which torchrun and deepspeed set. For srun
and mpirun they are derived from SLURM's and Open MPI's variables; every rank derives the same address and port.
"""

import os
import re
import socket
import subprocess
from contextlib import suppress

from cifar10 import UsageError

DERIVED = "CIFAR10_LAUNCHER"  # names the launcher whose variables were translated
PORTS = range(10_000, 60_000)  # the job ID selects one


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
    """RANK etc. of a process started by Open MPI's mpirun; empty without mpirun, and for a single rank."""
    size, local_size = (environment.get(f"OMPI_COMM_WORLD_{word}", "1") for word in ("SIZE", "LOCAL_SIZE"))
    if size == "1":
        return {}
    if size != local_size and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise UsageError(
            "mpirun on several machines needs MASTER_ADDR and MASTER_PORT, an address of the first that all can reach:"
            " mpirun -x MASTER_ADDR=10.0.0.1 -x MASTER_PORT=29500 ..."
        )
    return {
        "RANK": environment["OMPI_COMM_WORLD_RANK"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment["OMPI_COMM_WORLD_LOCAL_RANK"],
        "LOCAL_WORLD_SIZE": local_size,
        "MASTER_ADDR": environment.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(PORTS[os.getppid() % len(PORTS)]),  # mpirun, parent of all
        DERIVED: "mpirun",
    }


def world_size() -> int:
    """The number of ranks that the launcher started, or 1; under srun and mpirun this sets RANK, WORLD_SIZE and the others."""
    if "RANK" not in os.environ:
        # Open MPI first: in a multi-node job mpirun starts its daemons with srun, and ranks inherit SLURM's variables
        os.environ.update(_from_mpi(dict(os.environ)) or _from_slurm(dict(os.environ)))
    return int(os.environ.get("WORLD_SIZE", "1"))
