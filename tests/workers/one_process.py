"""`run` many times in one process, as a notebook calls it: in a thread, in an event loop, after errors and Ctrl-C.

    python tests/workers/one_process.py FOLDER

Writes FOLDER/outcomes.json: what each start came to, which is the summary's status and sha256 of the weights, or the error; and
whether the process was left as it was: signal handlers, process groups, locks, variables.
"""

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import small_runs
import torch.distributed as dist
from filelock import FileLock

import cifar10_deepspeed as script
from tests.launching import SHORT, summary

BASE = Path(sys.argv[1])
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "WANDB_SERVICE", "MPLBACKEND")
STEP = script.train_step
ZERO = {"train_batch_size": 64, "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}, "zero_optimization": {"stage": 1}}


def short(name: str, *more: str) -> list[str]:
    return [*SHORT, "--val-images", "100", "--no-tensorboard", "--seed", "3", *more, "--output-dir", str(BASE / name)]


def in_a_thread(argv: list[str]) -> None:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            script.run(argv)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def in_an_event_loop(argv: list[str]) -> None:
    async def cell() -> None:
        script.run(argv)

    asyncio.run(cell())


def failing(act: Callable[[], Any], at: int = 3) -> Callable[[list[str]], None]:
    """A run whose third step does something else first."""

    def start(argv: list[str]) -> None:
        taken = 0

        def step(*given: Any) -> Any:
            nonlocal taken
            taken += 1
            if taken == at:
                act()
            return STEP(*given)

        script.train_step = step
        try:
            script.run(argv)
        finally:
            script.train_step = STEP

    return start


def fault() -> None:
    raise RuntimeError("a fault in the middle")


def ctrl_c_twice() -> None:
    raise KeyboardInterrupt


STARTS: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
    "first": (script.run, short("first")),
    "second": (script.run, short("second")),
    "the same folder again": (script.run, short("first")),
    "in a thread": (in_a_thread, short("thread")),
    "in an event loop": (in_an_event_loop, short("loop")),
    "a command that is refused": (script.run, short("refused", "--lr", "-1")),
    "Jupyter's own arguments": (script.run, ["-f", "/run/user/0/jupyter/kernel-1.json"]),
    "a fault": (failing(fault), short("fault")),
    "after a fault": (script.run, short("fault")),
    "Ctrl-C": (failing(lambda: os.kill(os.getpid(), signal.SIGINT)), short("stopped")),
    "after Ctrl-C": (script.run, short("stopped")),
    "Ctrl-C twice": (failing(ctrl_c_twice), short("interrupted")),
    "after Ctrl-C twice": (script.run, short("interrupted")),
    "another network and ZeRO": (script.run, short("zero", "--recipe", "lenet", "--deepspeed-config", str(BASE / "zero.json"))),
    "after another network": (script.run, short("last")),
}


def outcome(start: Callable[[list[str]], None], argv: list[str]) -> dict[str, Any]:
    before = {name: os.environ.get(name) for name in VARIABLES}
    found: dict[str, Any] = {}
    try:
        start(argv)
    except BaseException as error:
        found["error"] = f"{type(error).__name__}: {error}"
    folder = Path(argv[-1])
    if (folder / "summary.json").exists():
        found |= {key: summary(folder)[key] for key in ("status", "weights_sha256")}
        with FileLock(folder / ".lock", timeout=0):  # another process could train here
            pass
    handlers = signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    found["imported"] = [name for name in ("torch._dynamo", "mlflow") if name in sys.modules]
    clean = all(handlers) and not dist.is_initialized() and before == {name: os.environ.get(name) for name in VARIABLES}
    return {**found, "clean": clean}


if __name__ == "__main__":
    small_runs.shrink_the_data_sets()
    small_runs.stop.TIMED_STEPS, small_runs.stop.SECONDS_BETWEEN_AGREEMENTS = 2, 0.0
    (BASE / "zero.json").write_text(json.dumps(ZERO))
    sys.argv = ["/usr/lib/python3/dist-packages/ipykernel_launcher.py", "-f", "kernel.json"]
    outcomes = {name: outcome(*how) for name, how in STARTS.items()}
    (BASE / "outcomes.json").write_text(json.dumps(outcomes))
