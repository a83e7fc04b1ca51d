"""Where a training step's time goes on a CPU, and how close it comes to the machine's rate of matrix multiplication.

    python -m tests.step_profile [--recipe bn_cnn_fast] [--steps 30] [--threads N] [--data-dir FOLDER]

The step is the script's own: loader, DeepSpeed's engine, guard and metric buffer. The limit is the product of two large square
matrices in the same precision on the same threads, measured right before and after; the better of the two counts.
"""

import argparse
import time
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cifar10.commands.bench_levels import engine_step, steps_of
from cifar10.distributed import world as distributed
from cifar10.engine.engine import leave
from cifar10.plan import make_plan
from cifar10_deepspeed import get_cifar10_dataloaders

MATRIX, TRIES, SHOWN = 2048, 8, 14


def seconds(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def gemm_gflops(dtype: torch.dtype) -> float:
    """The best rate of a few matrix products, in GFLOP/s."""
    a, b = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
    return 2 * MATRIX**3 / min(seconds(torch.matmul, a, b) for _ in range(TRIES)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bn_cnn_fast")
    parser.add_argument("--steps", type=int, default=30)
    known, flags = parser.parse_known_args()
    plan = make_plan([f"--recipe={known.recipe}", *flags], 1, "tests.step_profile")
    world = distributed.join(plan.options.threads)
    try:
        dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
        take_step, batches = engine_step(plan, world), steps_of(get_cifar10_dataloaders(plan, world)[0])
        for _ in range(known.steps):  # caches and allocator
            take_step(next(batches))
        gemm = gemm_gflops(dtype)
        times = [seconds(lambda: take_step(next(batches))) for _ in range(known.steps)]
        gemm = max(gemm, gemm_gflops(dtype))
        with FlopCounterMode(display=False) as flops:
            take_step(next(batches))
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(known.steps):
                take_step(next(batches))
    finally:
        leave()
    step, work, images = median(times), flops.get_total_flops() / 1e9, plan.batch.global_images
    print(f"recipe {known.recipe}, {images} images a step, {plan.precision}, {torch.get_num_threads()} threads")
    print(f"a step: median {1e3 * step:.2f} ms, min {1e3 * min(times):.2f} ms of {known.steps}; {images / step:,.0f} images/s")
    rates = f"{work / step:.0f} GFLOP/s; a matrix product of {MATRIX}: {gemm:.0f} GFLOP/s"
    print(f"multiplications: {work:.2f} GFLOP a step, {rates}")
    print(f"so a step takes {step * gemm / work:.2f} times what its multiplications alone would take at that rate")
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print("\nshare of the profiler's own total, by operation:")
    for event in events[:SHOWN]:
        print(f"{100 * event.self_cpu_time_total / total:5.1f}%  {event.key[:60]}")


if __name__ == "__main__":
    main()
