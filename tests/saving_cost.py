"""What checkpoints cost: the time of one save, and of training with one every epoch beside training without.

    python -m tests.saving_cost [--rounds 3] [--steps N] [--threads 1] [--data-dir FOLDER]

bn_cnn in fp32, global batch 64. Each round is an epoch (or N steps) without a save and one with, in turns, so that whatever
else the machine does meets both; the milliseconds are this machine's and this hour's, the ratio can be compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from statistics import median

import torch

from cifar10.data.loader import MicroBatch
from cifar10.distributed.world import World
from cifar10.engine.engine import Engine, prepare
from cifar10.models.registry import build_model
from cifar10.plan import Plan, make_plan
from cifar10.run import checkpoint
from cifar10.run.metric_buffer import MetricBuffer
from cifar10.run.state import RunState
from cifar10_deepspeed import get_cifar10_dataloaders, train_step
from tests.helpers import batch, logged_step, make_engine, one_step
from tests.workers.resumes import in_world

BATCH, SAVES = 64, 20


def seconds_of_saves(here: World, folder: Path, stage: int) -> list[float]:
    """Each of some saves by an engine that has an optimizer state, as a run makes them: two tags are kept."""
    engine, seconds = make_engine(here, build_model("bn_cnn", 0, 10), zero_optimization={"stage": stage}), []
    for step in range(1, SAVES + 1):
        one_step(engine, [batch(32 // here.size, seed=step)])
        here.barrier()
        started = time.perf_counter()
        assert checkpoint.save(folder / f"{here.size}-{stage}", engine, RunState(step=step), here, {}, keep=2) == ""
        here.barrier()
        seconds.append(time.perf_counter() - started)
    return seconds


def trained(plan: Plan, here: World, engine: Engine, batches: Iterator[list[MicroBatch]], steps: int) -> None:
    buffer = MetricBuffer(plan.options.log_every_steps, here.device)
    for micro_batches in islice(batches, steps):
        logged_step(train_step, engine, micro_batches, buffer)
        if buffer.is_full:
            buffer.read(here)
    buffer.read(here)


def rounds_of_training(here: World, folder: Path, plan: Plan, rounds: int, steps: int) -> list[tuple[float, float]]:
    """Seconds without a save and with one, of each round."""
    loader, _ = get_cifar10_dataloaders(plan, here)
    steps = steps or loader.steps_per_epoch
    model = build_model("bn_cnn", 0, 10)
    engine = Engine(prepare().initialize(model=model, model_parameters=model.parameters(), config=plan.ds_config)[0], here)
    batches = (step for epoch in count() for step in loader.epoch(epoch))
    trained(plan, here, engine, batches, 20)  # caches and allocator
    seconds = []
    for number in range(rounds):
        one: dict[bool, float] = {}
        for saves in (False, True) if number % 2 == 0 else (True, False):
            started = time.perf_counter()
            trained(plan, here, engine, batches, steps)
            if saves:
                assert checkpoint.save(folder / "run", engine, RunState(step=number), here, plan.settings, keep=2) == ""
            one[saves] = time.perf_counter() - started
        seconds.append((one[False], one[True]))
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

    def measure(here: World, folder: Path) -> list[tuple[float, float]] | list[float]:
        torch.set_num_threads(options.threads)
        if here.size > 1:
            return seconds_of_saves(here, folder, 2)
        return [*seconds_of_saves(here, folder, 0), *rounds_of_training(here, folder, plan, options.rounds, options.steps)]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for ranks in (1, 2):
            in_world(ranks, "cost", measure, folder)
        one, two = (torch.load(folder / f"cost_{ranks}.rank_0.pt") for ranks in (1, 2))
    saves, training = one[:SAVES], one[SAVES:]
    for what, seconds in (("1 rank, ZeRO 0", saves), ("2 ranks, ZeRO 2", two)):
        low, middle, high = (1000 * value for value in (min(seconds), median(seconds), max(seconds)))
        print(f"one save, bn_cnn fp32, {what}: {middle:.1f} ms, {low:.1f} .. {high:.1f} ({len(seconds)} saves)")
    without, with_saves = (median(column) for column in zip(*training, strict=True))
    each = ", ".join(f"{b / a:.3f}" for a, b in training)
    print(f"epoch without a save {without:.2f} s, with one {with_saves:.2f} s; ratio {with_saves / without:.4f}; rounds {each}")
    print(f"one save is {median(saves) / without:.3%} of an epoch without", file=sys.stdout)


if __name__ == "__main__":
    main()
