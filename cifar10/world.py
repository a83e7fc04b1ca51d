"""Who am I among the processes of this run: rank, world size, device, threads; and the few things that ranks agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cifar10 import UsageError

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
    def facts(self) -> dict[str, Any]:
        """What environment.json keeps of this."""
        place = {"launcher": self.launcher, "world_size": self.size, "device": self.device_name}
        return {**place, "threads": torch.get_num_threads(), "cores": cores()}

    @property
    def start_command(self) -> str:
        """The words before the script's name that start this many ranks on this machine."""
        if self.launcher == "python":
            return "python"
        return (
            f"deepspeed --num_gpus={self.local_size}"
            if self.launcher == "deepspeed"
            else f"torchrun --standalone --nproc_per_node={self.local_size}"
        )

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


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _launcher(environment: dict[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    if "LOCAL_SIZE" in environment and "CROSS_SIZE" in environment:
        return "deepspeed"
    return "python"


def speaks_for_its_machine() -> bool:
    """Whether this process is the first rank on its machine, known from the environment before any group exists."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def join(threads: int | None = None) -> World:
    """Take this process's place: threads, device and process groups. The same under every launcher.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which launchers set; without RANK it is a world of one.
    Threads per rank: `threads`, else the cores of the machine over the ranks on it.
    """
    alone = "RANK" not in os.environ
    rank, size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or (1 if alone else size))
    torch.set_num_threads(threads or max(1, cores() // local_size))
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if on_gpu and max(local_size, local_rank + 1) > torch.cuda.device_count():
        raise UsageError(
            f"{local_size} ranks but {torch.cuda.device_count()} GPUs on this machine; start as many ranks as GPUs"
        )
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; torch's default rounds convolutions to 10 bits
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed insists on it
    backend = "nccl" if on_gpu else "gloo"
    if alone:  # no other process, so no port to agree on
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    control = dist.new_group(backend="gloo") if size > 1 else None
    return World(rank, local_rank, size, local_size, device, _launcher(dict(os.environ)), control)


def leave() -> None:
    """Take the process groups down; a process that ends without it may fail on its way out."""
    if dist.is_initialized():
        dist.destroy_process_group()
