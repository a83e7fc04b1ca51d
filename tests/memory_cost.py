"""What each way to save memory costs in time and saves in memory, as a table in Markdown.

    python -m tests.memory_cost [--rounds 3] [--model resnet18] [--global-batch-size 64] [flags of a run]

One rank on synthetic images. Time is the process's CPU time per step, in rounds that take turns, beside plain training: median,
least and most. Memory is what tensors of the run hold on the GPU, without the data set: between steps, and at most.
"""

import argparse
import gc
import time
from collections.abc import Callable
from statistics import median

import torch

from cifar10.commands.bench_levels import steps_of
from cifar10.data.loader import TrainLoader
from cifar10.distributed import world as distributed
from cifar10.distributed.world import World
from cifar10.engine.engine import Engine, leave, prepare
from cifar10.plan import Plan, make_plan
from cifar10_deepspeed import get_cifar10_dataloaders, initial_model, train_step

OPTIMIZER, PARAMETERS = (f"zero_optimization.offload_{what}.device=cpu" for what in ("optimizer", "param"))
WHOLE = "zero_optimization.stage3_param_persistence_threshold=0"
WAYS = {
    "plain": [],
    "activation_checkpointing": ["activation_checkpointing.cpu_checkpointing=false"],
    "the same, cpu_checkpointing": ["activation_checkpointing.cpu_checkpointing=true"],
    **{f"ZeRO {stage}": [f"zero_optimization.stage={stage}"] for stage in (2, 3)},
    "ZeRO 2, offload_optimizer": ["zero_optimization.stage=2", OPTIMIZER],
    "ZeRO 3, offload_optimizer": ["zero_optimization.stage=3", OPTIMIZER],
    "ZeRO 3, offload_optimizer and offload_param": ["zero_optimization.stage=3", OPTIMIZER, PARAMETERS],
    "the same, stage3_param_persistence_threshold 0": ["zero_optimization.stage=3", OPTIMIZER, PARAMETERS, WHOLE],
}


def mib(world: World, read: Callable[[], int]) -> float:
    gc.collect()
    return read() / 2**20 if world.device.type == "cuda" else float("nan")


def stepping(plan: Plan, world: World, loader: TrainLoader) -> Callable[[], None]:
    """A function that takes the run's next step."""
    config, (model, _) = plan.ds_config, initial_model(plan)
    model = model.to(world.device)
    engine = Engine(prepare().initialize(model=model, model_parameters=model.parameters(), config=config)[0], world)
    engine.train()
    batches = steps_of(loader)

    def step() -> None:
        engine.set_lr(0.1)
        train_step(engine, next(batches), 0.0)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    known, flags = parser.parse_known_args()
    given = ["--dataset", "synthetic", "--model", "resnet18", "--global-batch-size", "64", "--val-images", "0", *flags]
    plans = {name: make_plan([*given, *(["--set", *words] if words else [])], 1, "x") for name, words in WAYS.items()}
    world = distributed.join(plans["plain"].options.threads)
    loader, _ = get_cifar10_dataloaders(plans["plain"], world)
    steps, held, most, seconds = {}, {}, {}, {name: [] for name in WAYS}
    for name, plan in plans.items():
        before = mib(world, torch.cuda.memory_allocated)
        steps[name] = stepping(plan, world, loader)
        steps[name]()
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps[name]()
        held[name] = mib(world, torch.cuda.memory_allocated) - before
        most[name] = mib(world, torch.cuda.max_memory_allocated) - before
    for _ in range(known.rounds):
        for name, step in steps.items():
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    print("| way | images/s, of plain | MiB between steps | at most |\n|---|---:|---:|---:|")
    for name in WAYS:
        ratios = [plain / ours for plain, ours in zip(seconds["plain"], seconds[name], strict=True)]
        speed = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {speed} | {held[name]:.0f} | {most[name]:.0f} |")
    leave()


if __name__ == "__main__":
    main()
