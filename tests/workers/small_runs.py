"""The program on 600 synthetic training images instead of 50,000: whole runs of several epochs in seconds.

    python tests/workers/small_runs.py STARTS.json

STARTS.json lists the starts: {"ranks": 2, "flags": ["--epochs", "2"], "keep_summary": "PATH"}, and optionally "stop_after": N
(SIGTERM to each rank after its N-th step), "code": the expected exit code if it is not 0, and "stderr": a file. Each rank of a
start is forked when the slow imports are done; then the run's summary.json is copied to keep_summary. No rank may exit before
rank 0 has written there how the run ended.
"""

import dataclasses
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import cifar10_deepspeed as script
from cifar10.data.registry import DATASETS
from cifar10.data.synthetic import Generated
from cifar10.engine.engine import prepare
from cifar10.run import stop
from cifar10.trainer.run import Run

ENDS = ("finished", "stopped")


def shrink_the_data_sets() -> None:
    """The generated ones, for the whole process: no test may call this."""
    for name, dataset in DATASETS.items():
        if isinstance(dataset, Generated):
            small = dataclasses.replace(dataset.description, train_images=600, test_images=200)
            DATASETS[name] = dataclasses.replace(dataset, description=small)


def stop_after(steps: int) -> None:
    """Let the script's training step, or that of pipelines, send SIGTERM after so many steps; ranks agree on it at once."""
    stop.TIMED_STEPS, stop.SECONDS_BETWEEN_AGREEMENTS = 2, 0.0
    taken = 0

    def counted(step: Callable[..., Any], *args: Any) -> Any:
        nonlocal taken
        measured = step(*args)
        taken += 1
        if taken == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return measured

    script.train_step = partial(counted, script.train_step)
    script.pipeline.train_step = partial(counted, script.pipeline.train_step)


def write_the_end_late() -> None:
    """Delay the last summary.json on rank 0, as a slow disk would."""
    write_summary = Run.write_summary

    def late(run: Run, state: Any, status: str, *tested: Any, **known: Any) -> Any:
        if run.world.is_main and status in ENDS:
            time.sleep(1)
        return write_summary(run, state, status, *tested, **known)

    Run.write_summary = late


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def forked(work: Callable[..., int], *arguments: Any) -> int:
    """A forked process that exits with the code `work` returns, or with 1 if it raises; returns its number."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        code = work(*arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def become_rank(rank: int, ranks: int, port: int) -> None:
    """Set the environment of a rank as torchrun does; one rank has none."""
    if ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))


def run_rank(start: dict[str, Any], rank: int, port: int) -> int:
    become_rank(rank, start["ranks"], port)
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
    assert status in ENDS, f"rank {rank} exited while the run is still {status}, which its launcher would take for a failure"
    return code


def run_folder_of(start: dict[str, Any]) -> Path:
    return Path(start["flags"][start["flags"].index("--output-dir") + 1])


def carry_out(start: dict[str, Any]) -> None:
    port = free_port()
    codes = ended([forked(run_rank, start, rank, port) for rank in range(start["ranks"])])
    if any(codes):
        sys.exit(f"{start} ended with {codes}")
    shutil.copy(run_folder_of(start) / "summary.json", start["keep_summary"])


if __name__ == "__main__":
    shrink_the_data_sets()
    prepare()
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # for its first optimizer PyTorch imports its compiler
    for one in json.loads(Path(sys.argv[1]).read_text()):
        carry_out(one)
