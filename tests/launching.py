"""Starting the program as a user would, in processes of its own."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SHORT = ("--dataset", "synthetic", "--max-steps", "8", "--log-every-steps", "4", "--test-images", "200", "--threads", "1")
DEADLINE_SECONDS = 600  # a hang becomes a failure


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


COMMANDS = {
    "python": [sys.executable, "cifar10_deepspeed.py"],
    "main.py": [sys.executable, "main.py"],
    "main.py, 2 ranks": [sys.executable, "main.py", "--num-gpus", "2"],
    "deepspeed, 2 ranks": [str(BIN / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}", "cifar10_deepspeed.py"],
    "torchrun, 2 ranks": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", "cifar10_deepspeed.py"],
}


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what would change where and how a run trains, and what it says of its start."""
    ours = ("CIFAR10_STARTED_BY", "CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_RANK")  # world.join sets the last
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("WANDB_", "UV_RUN_"))}
    kept |= {"DS_ACCELERATOR": "cpu", "WANDB_MODE": "disabled", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **more}
    modules = [kept.get("PYTHONPATH", ""), str(PROJECT / "tests" / "empty")]
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, modules))}


def run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's folder to its end."""
    options: dict[str, Any] = {"cwd": PROJECT, "env": environment(**more), "timeout": DEADLINE_SECONDS}
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def has_trained(folder: Path) -> bool:
    """Whether steps.csv has a row: training is under way."""
    steps = folder / "steps.csv"
    return steps.exists() and len(steps.read_text().splitlines()) > 1


def wait_until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} seconds"
        time.sleep(0.1)
