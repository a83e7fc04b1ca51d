"""Process groups: this process's rank, world size, device and threads, and the collectives that a run needs."""

import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from cifar10 import UsageError
from cifar10.distributed import cpus, launchers
from cifar10.distributed import device as devices

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's rank and device. `control` is a CPU group, so that its collectives never synchronize the device."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    launcher: str
    control: Any = None
    group: Any = None  # of the device's collectives; None is that of all ranks

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def description(self) -> str:
        """`2 ranks on cpu, 1 thread each`, with the number of machines if there are several."""
        machines = f", {self.size // self.local_size} machines" if self.size > self.local_size else ""
        ranks = "1 rank" if self.size == 1 else f"{self.size} ranks"
        threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
        return f"{ranks} on {self.device_name}{machines}, {threads} each"

    @property
    def facts(self) -> dict[str, Any]:
        """The entries for environment.json."""
        compute = {"device": self.device_name, "threads": torch.get_num_threads(), "cores": cpus.cores()}
        return {"launcher": self.launcher, "world_size": self.size, **compute, **devices.facts()}

    @property
    def start_command(self) -> str:
        """The launcher command, up to the script's name, that starts these ranks."""
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
        """Peak memory of each rank so far, in MiB: resident, and on a GPU what tensors allocated. Collective."""
        most = {"peak_memory_mib": _peak_resident_mib()}
        if self.device.type == "cuda":
            most["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated(self.device) >> 20
        ranks = self.gather(most)
        return {name: [rank[name] for rank in ranks] for name in most}

    def total(self, values: Tensor) -> Tensor:
        """All-reduce (sum) in place on the device."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def split(self, groups: Sequence[Sequence[int]]) -> "World":
        """The one of these groups of ranks that this rank is in, as a world of its own; its ranks count from 0. Collective."""
        mine = next(number for number, ranks in enumerate(groups) if self.rank in ranks)
        control = [dist.new_group(ranks, backend="gloo") for ranks in groups][mine]
        group = control if self.device.type == "cpu" else [dist.new_group(ranks) for ranks in groups][mine]
        rank, size = groups[mine].index(self.rank), len(groups[mine])
        return replace(self, rank=rank, size=size, control=control, group=group)

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. Collective."""
        if self.size == 1:
            return flag
        votes = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return bool(votes.item())

    def barrier(self) -> None:
        """Wait for all ranks, without synchronizing the device."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def gather(self, value: T) -> list[T]:
        """All-gather: every rank's `value`, in rank order."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.control)
        return gathered

    def from_main(self, produce: Callable[[], T]) -> T:
        """Run `produce()` on rank 0 and broadcast what it returns, or raises, to every rank."""
        if self.size == 1:
            return produce()
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [produce()]
            except Exception as error:  # or the other ranks would wait until the timeout
                known = isinstance(error, UsageError)
                outcome = [error if known else RuntimeError(f"on rank 0: {type(error).__name__}: {error}")]
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]


def _peak_resident_mib() -> int:
    """Linux resets VmHWM at exec; ru_maxrss, used elsewhere, is in KiB, on macOS in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) >> 10
    except (OSError, StopIteration):
        import resource  # Windows has none

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def is_local_main() -> bool:
    """Whether this is the first rank on its machine, read from the environment before any process group exists."""
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def _device(local_rank: int, local_size: int, launcher: str) -> torch.device:
    """This rank's GPU, or the CPU. Raises UsageError if the machine has fewer GPUs than ranks."""
    gpus = devices.count_gpus()
    if not gpus:
        return torch.device("cpu")
    if launcher in ("srun", "mpirun") and gpus == 1:  # --gpus-per-task=1: each task sees only its own GPU
        return torch.device("cuda", 0)
    if max(local_size, local_rank + 1) > gpus:
        raise UsageError(f"{local_size} ranks but {gpus} GPUs on this machine; start one rank per GPU")
    return torch.device("cuda", local_rank)


def choose_interface(one_machine: bool) -> None:
    """Make sure that gloo finds a network interface. Without 127.0.0.1 (IPv6 only) it needs to be told one, on one machine.

    Raises UsageError if $GLOO_SOCKET_IFNAME names none, or if none has an address.
    """
    families, addresses = (socket.AF_INET, socket.AF_INET6), psutil.net_if_addrs()
    found = {name: {one.address for one in ones if one.family in families} for name, ones in addresses.items()}
    names, asked = [name for name in found if found[name]], os.environ.get("GLOO_SOCKET_IFNAME", "")
    if not names:
        raise UsageError("no network interface has an address, not even the loopback; bring that up: ip link set lo up")
    if asked and not {*asked.split(",")} <= {*names}:
        there = f"the interfaces with an address are {', '.join(names)}"
        raise UsageError(f"GLOO_SOCKET_IFNAME is {asked}, and {there}; unset it, or set it to one of them")
    if not asked and one_machine and "127.0.0.1" not in set().union(*found.values()):
        os.environ["GLOO_SOCKET_IFNAME"] = next((name for name in names if "::1" in found[name]), names[0])


def join(threads: int | None = None, timeout_minutes: float = 10.0, *, deterministic: bool = False) -> World:
    """Initialize threads, device and process groups from RANK, WORLD_SIZE and so on (see launchers.py).

    `threads` per rank: see cpus.threads. `deterministic` is about GPUs.
    """
    if dist.is_initialized():
        raise UsageError("this process is in a process group already; call torch.distributed.destroy_process_group() first")
    size = launchers.world_size()
    rank, local_rank = (int(os.environ.get(name) or 0) if size > 1 else 0 for name in ("RANK", "LOCAL_RANK"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size) if size > 1 else 1
    launcher = launchers.name(dict(os.environ))
    torch.set_num_threads(threads or cpus.threads(launcher, local_size))
    device = _device(local_rank, local_size, launcher)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # adaptive pooling on a GPU has none: only a warning
        torch.utils.deterministic.fill_uninitialized_memory = False  # half as many kernels again, and nothing reads such memory
    if device.type == "cpu":
        devices.keep_freed_memory()
    else:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # torch's default rounds fp32 convolutions to 10 bits of mantissa
        torch.backends.cudnn.benchmark = not deterministic  # the fastest algorithm for each shape, tried at its first step
        if size == 1:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # one rank needs no network
    os.environ["LOCAL_RANK"] = str(device.index or 0 if device.type == "cuda" else local_rank)  # DeepSpeed's device index
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if size > 1 or backend == "gloo":
        choose_interface(size == local_size)
    single = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}  # a single process needs no port
    if size > 1:
        launchers.wait_for_name(os.environ["MASTER_ADDR"])
    try:
        dist.init_process_group(backend, timeout=timeout, **single)
    except dist.DistNetworkError as error:
        if "address already in use" not in str(error).lower():
            raise
        port = os.environ["MASTER_PORT"]
        raise UsageError(
            f"port {port} is in use on this machine; choose another, for example MASTER_PORT={int(port) + 1}"
        ) from None
    control = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None
    return World(rank, local_rank, size, local_size, device, launcher, control)


def limit_waiting(timeout_minutes: float) -> None:
    """Set the timeout of every process group: DeepSpeed creates its own with torch's default of 30 minutes."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before torch 2.15
    for group in dist.distributed_c10d._world.pg_map if dist.get_world_size() > 1 else ():
        set_timeout(timedelta(minutes=timeout_minutes), group)
