"""How long a run will take, from its first seconds: for --dry-run and --budget."""

import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TypeVar

import torch

from cifar10.distributed.world import World

PROBE_SECONDS = 4.0
T = TypeVar("T")


def seconds_each(
    batches: Iterable[T], work: Callable[[T], object], world: World, limit: float = PROBE_SECONDS, *, warm: bool = False
) -> float:
    """Seconds that `work` takes for one of `batches`; 0 if there are none. Unless `warm`, the first half of them is a warmup.

    Collective: all ranks try equally many, as many as fit into `limit` seconds and the one that exceeds it.
    """
    marks = [time.perf_counter()]
    for batch in batches:
        work(batch)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        marks.append(time.perf_counter())
        if world.any_rank(marks[-1] - marks[0] > limit):
            break
    first = len(marks) // 2 if len(marks) > 2 and not warm else 0
    return (marks[-1] - marks[first]) / max(1, len(marks) - 1 - first)


def estimate(step: float, steps: int, evaluation: float, evaluations: int) -> str:
    """A sentence about a run of `steps` steps and `evaluations` passes over held-out images, of these many seconds each."""
    total = timedelta(seconds=round(step * steps + evaluation * evaluations))
    passes = f" and {evaluations:,} evaluations of {evaluation:.3g} s" if evaluation else ""
    return f"time: about {total} (h:mm:ss) on this machine, for {steps:,} steps of {step:.3g} s{passes}"
