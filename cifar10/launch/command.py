"""Launch options, and the deepspeed command line and environment for them."""

import contextlib
import os
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import tyro

from cifar10 import UsageError
from cifar10.config.cli import split_options
from cifar10.config.ds_config import Batch
from cifar10.config.recipe import PROJECT, check_values, invalid
from cifar10.distributed import device
from cifar10.launch import budget

SCRIPT = PROJECT / "cifar10_deepspeed.py"
BUDGET_PROGRAM, BUDGET_BEGAN = "cifar10.commands.budget", "CIFAR10_BUDGET_BEGAN"  # when main.py started, in Unix time
LEAST_IMAGES = 16  # a rank and step, below which BatchNorm's statistics are poor

_Count = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
_Address = Annotated[str, tyro.conf.arg(metavar="ADDRESS", help_behavior_hint="")]


@dataclass(frozen=True)
class LaunchOptions:
    """main.py's own options."""

    num_gpus: _Count = None
    """Ranks on this machine (default: one for each GPU, or the most that divide the global batch into at least 16 images each;
    without GPUs, one rank on all CPU cores)."""
    num_nodes: int = 1
    """Machines. Run the same command on each, with its own --node-rank, and with an --output-dir that all of them share."""
    node_rank: int = 0
    """This machine's rank among the machines, from 0."""
    master_addr: _Address = ""
    """With several machines, the address of the first."""
    master_port: int = 29_500
    """With several machines, a free port of the first."""
    max_restarts: int = 0
    """How many times to restart a run that fails, from its newest checkpoint."""
    seeds: _Count = None
    """Train with N seeds from --seed up, one run after another in seed_0, seed_1, ... of --output-dir, and compare them."""
    budget: Annotated[str | None, tyro.conf.arg(metavar="TIME", help_behavior_hint="")] = None
    """Measure this machine for a few seconds, and train the recipe for the number of epochs that promise the highest accuracy
    with the test accuracy printed within this time: 60s, 3m, 1h."""


def split_launch_options(argv: list[str]) -> tuple[LaunchOptions, list[str]]:
    """The checked launch options of a command line, and the script's flags. Raises UsageError."""
    options, flags = split_options(argv, LaunchOptions)
    check_values(
        options,
        ("num_gpus num_nodes master_port seeds", lambda n: n >= 1, "an integer >= 1"),
        ("max_restarts", lambda n: n >= 0, "an integer >= 0"),
        ("node_rank", lambda n: 0 <= n < options.num_nodes, f"0 to {options.num_nodes - 1}"),
    )
    if options.num_nodes > 1 and not options.master_addr:
        raise UsageError("--num-nodes needs --master-addr, the first machine's address, for example --master-addr 10.0.0.1")
    if options.budget:
        budget.seconds(options.budget)
        budget.refuse_decided(flags)
        if options.num_nodes > 1 or options.seeds:
            raise UsageError("--budget is not supported with --seeds or --num-nodes; leave out one of them")
    if options.num_nodes > 1 and options.seeds:
        raise UsageError("--seeds is not supported with --num-nodes; start each seed as a run of its own, for example --seed 1")
    if (
        options.num_nodes == 1
        and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
        and not {"RANK", "SLURM_PTY_PORT"} & {*os.environ}
    ):
        raise UsageError("main.py starts all ranks itself; use srun python cifar10_deepspeed.py, or sbatch run_deepspeed.sh")
    return options, flags


def count_ranks(asked: int | None, gpus: int, global_images: int | None = None, machines: int = 1) -> int:
    """The number of ranks on this machine. Raises UsageError if that is more than its GPUs.

    Unless a number was asked for, the largest that divides the global batch and leaves each rank LEAST_IMAGES of it; None is a
    batch that grows with the ranks.
    """
    if asked and gpus and asked > gpus:
        raise invalid("--num-gpus", asked, f"1 to {gpus}, the GPUs of this machine", gpus)
    if asked or not gpus or global_images is None:
        return asked or gpus or 1
    fitting = (n for n in range(gpus, 1, -1) if global_images % (n * machines) == 0)
    return next((n for n in fitting if global_images // (n * machines) >= LEAST_IMAGES), 1)


def idle_gpus(asked: int | None, gpus: int, batch: Batch, machines: int = 1) -> str | None:
    """Which GPUs of this machine get no rank, why, and what would use them; None if none, or if that was asked for."""
    ranks, all_ranks, images = batch.world_size // machines, gpus * machines, batch.global_images
    if asked or ranks >= gpus:
        return None
    idle, larger = ", ".join(device.visible_names(gpus)[ranks:]), max(LEAST_IMAGES, images // all_ranks) * all_ranks
    forced = f", or --num-gpus {gpus}, with {images // all_ranks} images a rank" if images % all_ranks == 0 else ""
    return (
        f"device: {ranks} of {gpus} GPUs, {batch.rank_images} of the global batch's {images} images on each; {idle} stay idle:"
        f" more ranks do not divide it into at least {LEAST_IMAGES} each; to use all: --global-batch-size {larger}{forced}"
    )


def free_port() -> tuple[str, int]:
    """A loopback address, ::1 where there is only IPv6, and a port of it that is free. Raises UsageError."""
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with contextlib.suppress(OSError), socket.socket(family) as listener:
            listener.bind((address, 0))
            return address, listener.getsockname()[1]
    raise UsageError("this machine has no loopback address, over which ranks meet; bring it up: ip link set lo up")


def deepspeed_command(
    options: LaunchOptions, ranks: int, gpus: int, flags: list[str], hostfile: Path
) -> tuple[list[str], dict[str, str]]:
    """The deepspeed command line for `ranks` ranks on this machine, and its environment; writes `hostfile` if needed.

    One rank of --budget is started without the launcher, which takes seconds to start.
    """
    environment, words, program = dict(os.environ), [], [sys.executable, "-u", str(SCRIPT)]
    if not gpus:
        environment.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed's detection prints a warning in every process
    if options.budget:
        environment[BUDGET_BEGAN] = str(psutil.Process().create_time())
        environment["PYTHONPATH"] = os.pathsep.join([str(PROJECT), *filter(None, [environment.get("PYTHONPATH")])])
        program = [sys.executable, "-u", "-m", BUDGET_PROGRAM, "--budget", options.budget]
        if ranks == 1:
            return [*program, *flags], environment
    if options.num_nodes > 1:
        hostfile.write_text("".join(f"node{n} slots={ranks}\n" for n in range(options.num_nodes)))
        address, port = options.master_addr, options.master_port
        words = [f"--hostfile={hostfile}", "--no_ssh", f"--node_rank={options.node_rank}", f"--master_addr={address}"]
    else:
        address, port = free_port()
        words = [f"--num_gpus={ranks}", *([] if address == "127.0.0.1" else [f"--master_addr={address}"])]  # the default
    if gpus and "CUDA_VISIBLE_DEVICES" in environment:  # DeepSpeed reads only numbers there, and sets it to 0, 1, ... in ranks
        program = ["env", f"CUDA_VISIBLE_DEVICES={environment.pop('CUDA_VISIBLE_DEVICES')}", *program]
    if options.budget or program[0] == "env":
        words += ["--no_python", "--no_local_rank"]
    else:
        program = program[2:]
    beside_python = Path(sys.executable).with_name("deepspeed")
    deepspeed = [str(beside_python)] if beside_python.exists() else [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*deepspeed, "-q", *words, f"--master_port={port}", *program, *flags], environment


def start_command(options: LaunchOptions) -> str:
    """The command that started main.py, or that continues one of the runs of a command, without the script's flags."""
    words = ["python", sys.argv[0] if Path(sys.argv[0]).name == "main.py" else "main.py"]
    for name, value in vars(options).items():
        if value != getattr(LaunchOptions, name):
            words += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join(words)
