"""The cost of checkpoints: the time of one save, beside that of an epoch.

    python -m tests.saving_cost [--rounds 3] [--steps N] [--threads 1] [--data-dir FOLDER]

bn_cnn in fp32, global batch 64; only the ratio can be compared with other machines.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from cifar10.commands.bench_levels import engine_step, steps_of
from cifar10.distributed.world import World
from cifar10.engine.engine import prepare
from cifar10.models.registry import build_model
from cifar10.plan import Plan, make_plan
from cifar10.run import checkpoint
from cifar10.run.state import RunState
from cifar10_deepspeed import get_cifar10_dataloaders
from tests.helpers import batch, make_engine, one_step
from tests.workers.resumes import in_world

BATCH, SAVES = 64, 20


def seconds_of_saves(world: World, folder: Path, stage: int) -> list[float]:
    """The time of each of some saves by an engine with an optimizer state, as a run makes them: two tags are kept."""
    engine, seconds = make_engine(world, build_model("bn_cnn", 0, 10), zero_optimization={"stage": stage}), []
    for step in range(1, SAVES + 1):
        one_step(engine, [batch(32 // world.size, seed=step)])
        world.barrier()
        started = time.perf_counter()
        assert checkpoint.save(folder / f"{world.size}-{stage}", engine, RunState(step=step), world, {}, keep=2) == ""
        world.barrier()
        seconds.append(time.perf_counter() - started)
    return seconds


def seconds_of_training(world: World, plan: Plan, rounds: int, steps: int) -> list[float]:
    """The time of an epoch (or `steps` steps) without a save, of each round."""
    loader, _ = get_cifar10_dataloaders(plan, world)
    take_step, batches, seconds = engine_step(plan, world), steps_of(loader), []
    for _ in range(20):  # caches and allocator
        take_step(next(batches))
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(steps or loader.steps_per_epoch):
            take_step(next(batches))
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="in place of a whole epoch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir")
    options = parser.parse_args()
    data = [f"--data-dir={options.data_dir}"] if options.data_dir else []
    plan = make_plan([*data, "--precision=fp32", f"--global-batch-size={BATCH}"], 1, "saving_cost")
    prepare()

    def measure(world: World, folder: Path) -> list[float]:
        torch.set_num_threads(options.threads)
        saves = seconds_of_saves(world, folder, 2 if world.size > 1 else 0)
        return saves if world.size > 1 else saves + seconds_of_training(world, plan, options.rounds, options.steps)

    with tempfile.TemporaryDirectory() as name:
        for ranks in (1, 2):
            in_world(ranks, "cost", measure, Path(name))
        one, two = (torch.load(Path(name) / f"cost_{ranks}.rank_0.pt") for ranks in (1, 2))
    for what, seconds in (("1 rank, ZeRO 0", one[:SAVES]), ("2 ranks, ZeRO 2", two)):
        low, middle, high = (1000 * value for value in (min(seconds), median(seconds), max(seconds)))
        print(f"one save, bn_cnn fp32, {what}: {middle:.1f} ms, {low:.1f} .. {high:.1f} ({len(seconds)} saves)")
    epoch = median(one[SAVES:])
    print(f"an epoch without a save takes {epoch:.2f} s; one save is {median(one[:SAVES]) / epoch:.3%} of that")


if __name__ == "__main__":
    main()
