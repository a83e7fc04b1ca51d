"""Where a training step's time goes on a CPU, and how near it is to what the machine multiplies matrices with.

    python -m tests.step_profile [--recipe bn_cnn_fast] [--steps 30] [--threads N] [--data-dir FOLDER]

The step is the program's own: loader, DeepSpeed's engine, guard and metric buffer. The limit is a product of two large square
matrices in the same precision on the same threads, measured right before and after; the better of the two counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from itertools import islice

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cifar10.commands.bench import OurLoop
from cifar10.distributed import world
from cifar10.plan import make_plan

MATRIX, TRIES, SHOWN = 2048, 8, 14


def gemm_gflops(dtype: torch.dtype) -> float:
    """The best rate of a few matrix products, in GFLOP/s."""
    a, b = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(TRIES):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * MATRIX**3 / min(seconds) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bn_cnn_fast")
    parser.add_argument("--steps", type=int, default=30)
    known, flags = parser.parse_known_args()
    plan = make_plan([f"--recipe={known.recipe}", *flags], 1, "tests.step_profile")
    here = world.join(plan.options.threads)
    try:
        dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
        loop = OurLoop(plan, here, 3 * known.steps + 2)
        batches = loop.batches()
        for batch in islice(batches, known.steps):  # caches and allocator
            loop.step(batch)
        gemm, seconds = gemm_gflops(dtype), []
        for _ in range(known.steps):
            started = time.perf_counter()
            loop.step(next(batches))
            seconds.append(time.perf_counter() - started)
        gemm = max(gemm, gemm_gflops(dtype))
        with FlopCounterMode(display=False) as flops:
            loop.step(next(batches))
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for batch in islice(batches, known.steps):
                loop.step(batch)
        loop.finish()
    finally:
        world.leave()
    step, work = statistics.median(seconds), flops.get_total_flops() / 1e9
    images = plan.batch.global_images
    print(f"recipe {known.recipe}, {images} images a step, {plan.precision}, {torch.get_num_threads()} threads")
    print(
        f"a step: median {1e3 * step:.2f} ms, min {1e3 * min(seconds):.2f} ms of {known.steps}; {images / step:,.0f} images/s"
    )
    print(
        f"multiplications: {work:.2f} GFLOP a step, {work / step:.0f} GFLOP/s; a matrix product of {MATRIX}: {gemm:.0f} GFLOP/s"
    )
    print(f"so a step takes {step * gemm / work:.2f} times what its multiplications alone would take at that rate")
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print("\nshare of the profiler's own total, by operation:")
    for event in events[:SHOWN]:
        print(f"{100 * event.self_cpu_time_total / total:5.1f}%  {event.key[:60]}")


if __name__ == "__main__":
    sys.exit(main())
