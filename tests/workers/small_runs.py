"""The program itself on 600 synthetic training images instead of 50,000: whole runs of several epochs in seconds.

    python tests/workers/small_runs.py STARTS.json

STARTS.json lists the starts, carried out one after another: {"ranks": 2, "flags": ["--epochs", "2"], "keep_summary":
"PATH"}, and optionally "stop_after": N, which sends SIGTERM to a rank after the N-th step that it trains, "code": the exit code
that is due in place of 0, and "stderr": a file for what the ranks say there. Each rank of each start is a process of its own,
forked when the slow imports are done and before anything else is; afterwards the run's summary.json is copied to keep_summary.
No rank may leave before rank 0 has written there how the run has ended.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

import cifar10_deepspeed as script
from cifar10.data.registry import DATASETS
from cifar10.data.synthetic import Generated
from cifar10.engine.engine import prepare
from cifar10.run import stop

ENDS = ("finished", "stopped")


def shrink_the_data_sets() -> None:
    """Those that are drawn: for the whole process, so no test may import this and call it."""
    for name, dataset in DATASETS.items():
        if isinstance(dataset, Generated):
            small = dataclasses.replace(dataset.description, train_images=600, test_images=200)
            DATASETS[name] = dataclasses.replace(dataset, description=small)


def stop_after(steps: int) -> None:
    """Let the script's training step send the signal when it has been taken so often; several ranks agree on it at once."""
    stop.TIMED_STEPS, stop.SECONDS_BETWEEN_AGREEMENTS = 2, 0.0
    train_step, taken = script.train_step, 0

    def counted(*args: Any) -> Any:
        nonlocal taken
        measured = train_step(*args)
        taken += 1
        if taken == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return measured

    script.train_step = counted


def write_the_end_late() -> None:
    """Delay the last summary.json on rank 0, as a slow disk would."""
    write_summary = script.write_summary

    def late(run: Any, state: Any, status: str, *tested: Any, **known: Any) -> Any:
        if run.world.is_main and status in ENDS:
            time.sleep(1)
        return write_summary(run, state, status, *tested, **known)

    script.write_summary = late


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_rank(start: dict[str, Any], rank: int, port: int) -> int:
    """One rank, from its environment to its exit code."""
    if start["ranks"] > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(start["ranks"]))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    if "stop_after" in start:
        stop_after(start["stop_after"])
    if start["ranks"] > 1:
        write_the_end_late()
    if "stderr" in start:
        os.dup2(os.open(start["stderr"], os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    sys.argv[1:] = start["flags"]
    code = script.main()
    if "code" in start:
        return int(code != start["code"])
    status = json.loads((run_folder_of(start) / "summary.json").read_text())["status"]
    assert status in ENDS, f"rank {rank} has left while the run is still {status}: its launcher would call that a failure"
    return code


def run_folder_of(start: dict[str, Any]) -> Path:
    return Path(start["flags"][start["flags"].index("--output-dir") + 1])


def carry_out(start: dict[str, Any]) -> None:
    """All ranks of one start, to their end; raises if one of them fails."""
    port, children = free_port(), []
    for rank in range(start["ranks"]):
        child = os.fork()
        if not child:
            code = 1
            try:
                code = run_rank(start, rank, port)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"{start} ended with {codes}")
    shutil.copy(run_folder_of(start) / "summary.json", start["keep_summary"])


if __name__ == "__main__":
    shrink_the_data_sets()
    prepare()
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # for its first optimizer PyTorch imports its compiler
    for one in json.loads(Path(sys.argv[1]).read_text()):
        carry_out(one)
