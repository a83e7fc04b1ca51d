"""Who am I among the processes of this run: rank, world size, device, threads; and the few things that ranks agree on."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cifar10 import UsageError
from cifar10.distributed import launchers
from cifar10.distributed.device import keep_freed_memory

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among all ranks. `control` is a CPU group: agreeing never touches the device."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    launcher: str
    control: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def in_words(self) -> str:
        """`2 ranks on cpu, 1 threads each`; with several machines, how many."""
        machines = f" of {self.size // self.local_size} machines" if self.size > self.local_size else ""
        ranks = "1 rank" if self.size == 1 else f"{self.size} ranks"
        return f"{ranks} on {self.device_name}{machines}, {torch.get_num_threads()} threads each"

    @property
    def facts(self) -> dict[str, Any]:
        """What environment.json keeps of this."""
        place = {"launcher": self.launcher, "world_size": self.size, "device": self.device_name}
        return {**place, "threads": torch.get_num_threads(), "cores": cores()}

    @property
    def start_command(self) -> str:
        """The words before the script's name that start this many ranks on this machine."""
        if self.size != self.local_size and self.launcher in ("deepspeed", "torchrun"):
            return f"the same {self.launcher} command on each machine, with"
        return {
            "python": "python",
            "deepspeed": f"deepspeed --num_gpus={self.local_size}",
            "torchrun": f"torchrun --standalone --nproc_per_node={self.local_size}",
            "srun": f"srun --ntasks={self.size} python",
            "mpirun": f"mpirun -n {self.size} python",
        }[self.launcher]

    @property
    def peak_memory(self) -> dict[str, list[int]]:
        """The most memory that each rank has held so far, in MiB: its process's, and on a GPU what tensors took there. Every
        rank must ask."""
        most = {"peak_memory_mib": _peak_resident_mib()}
        if self.device.type == "cuda":
            most["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated(self.device) >> 20
        ranks = self.gather(most)
        return {name: [rank[name] for rank in ranks] for name in most}

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, elementwise; the same on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; every rank must ask."""
        if self.size == 1:
            return flag
        votes = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return bool(votes.item())

    def barrier(self) -> None:
        """Wait for all ranks, on the CPU."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.control)
        return gathered

    def from_main(self, produce: Callable[[], T]) -> T:
        """What `produce()` returns on rank 0, on every rank. What it raises there is raised everywhere."""
        if self.size == 1:
            return produce()
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [produce()]
            except UsageError as error:
                outcome = [error]
            except Exception as error:  # the others must not wait for an answer that never comes
                outcome = [RuntimeError(f"on rank 0: {type(error).__name__}: {error}")]
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]


def _peak_resident_mib() -> int:
    """Linux keeps it for each program that a process runs; elsewhere it is asked for, in KiB, or in bytes on a Mac."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) >> 10
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def speaks_for_its_machine() -> bool:
    """Whether this process is the first rank on its machine, known from the environment before any group exists."""
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def _device(local_rank: int, local_size: int, launcher: str) -> torch.device:
    """This rank's GPU, or the CPU. Raises UsageError if the machine has fewer GPUs than ranks."""
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if launcher == "srun" and gpus == 1:  # as with --gpus-per-task=1: SLURM shows each task its own
        return torch.device("cuda", 0)
    if max(local_size, local_rank + 1) > gpus:
        raise UsageError(f"{local_size} ranks but {gpus} GPUs on this machine; start as many ranks as GPUs")
    return torch.device("cuda", local_rank)


def join(threads: int | None = None, timeout_minutes: float = 10.0, *, deterministic: bool = False) -> World:
    """Take this process's place: threads, device and process groups. The same under every launcher.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which launchers set (see launchers.py); without RANK it
    is a world of one. Threads per rank: `threads`, else the cores of the machine over the ranks on it. `deterministic` asks
    PyTorch for algorithms that give the same bits each time; a CPU's do anyway. A rank that has waited `timeout_minutes` for
    another gives up. On a CPU, memory that is freed stays with the process (device.keep_freed_memory).
    """
    alone = "RANK" not in os.environ
    rank, size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or (1 if alone else size))
    launcher = launchers.name(dict(os.environ))
    torch.set_num_threads(threads or max(1, cores() // local_size))
    device = _device(local_rank, local_size, launcher)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # adaptive pooling on a GPU has none; that is only said
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; torch's default rounds convolutions to 10 bits
    os.environ["LOCAL_RANK"] = str(
        device.index or 0 if device.type == "cuda" else local_rank
    )  # DeepSpeed picks its device by it
    backend = "nccl" if device.type == "cuda" else "gloo"
    if alone:  # no other process, so no port to agree on
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    control = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes)) if size > 1 else None
    return World(rank, local_rank, size, local_size, device, launcher, control)


def limit_waiting(timeout_minutes: float) -> None:
    """Let a rank give up waiting after `timeout_minutes` in every process group there is: DeepSpeed makes its own with torch's
    half an hour."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # its name before torch 2.15
    for group in dist.distributed_c10d._world.pg_map if dist.get_world_size() > 1 else ():
        set_timeout(timedelta(minutes=timeout_minutes), group)


def leave() -> None:
    """Take the process groups down; a process that ends without it may fail on its way out."""
    if dist.is_initialized():
        dist.destroy_process_group()
