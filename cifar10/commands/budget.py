"""The ranks of `main.py --budget 60s`: measure this machine, choose what to train, and train it as an ordinary run.

One rank does all of it in one process, so that what a start costs (DeepSpeed's import above all) is paid once; several ranks
only choose (launch/supervise.py). The probe takes steps of each candidate with the engine, the loader and the images of a run,
in turns, so that other load on the machine affects all of them. It leaves nothing behind: the run is to the bit the one that
its flags alone would give. It opens no test image.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate, count
from pathlib import Path
from statistics import median, stdev

import torch

import cifar10_deepspeed as script
from cifar10 import UsageError, streams
from cifar10.commands.bench_levels import Step, engine_step, network
from cifar10.data.dataset import Images
from cifar10.data.loader import EvaluationLoader, MicroBatch, TrainLoader
from cifar10.distributed import launchers
from cifar10.distributed import world as distributed
from cifar10.distributed.world import World
from cifar10.engine.engine import leave, prepare
from cifar10.launch.budget import Candidate, Choice, Cost, choose, flags_to_check, read_frontier, seconds
from cifar10.launch.command import BUDGET_BEGAN, SCRIPT, split_launch_options
from cifar10.plan import Plan, make_plan
from cifar10.run import folder as run_folder
from cifar10.run import probe

ROUNDS = 5
SHARE_OF_BUDGET, LEAST_SECONDS, MOST_SECONDS = 0.05, 3.0, 10.0  # of timed steps, over all candidates
STEPS = 8  # global batches of images that the probe trains on
EFFICIENCY_GAIN = 4.0  # how many times the arithmetic per second a larger network may reach
CLOSING_SECONDS = 1.0  # the weights, their hash and the predictions are written


@dataclass
class Trial:
    """One candidate on this machine: its steps at each size of its images, and what was measured."""

    candidate: Candidate
    plan: Plan
    step: Step
    batches: list[Iterator[list[MicroBatch]]]  # of each size
    start: float  # seconds to build all of it, with as many images as a run has
    evaluation: float  # seconds for one image
    rounds: list[list[float]]  # of each size, seconds per step

    def take_round(self, world: World, limit: float) -> None:
        for batches, found in zip(self.batches, self.rounds, strict=True):
            found.append(probe.seconds_each(batches, self.step, world, limit, warm=True))

    @property
    def spread(self) -> float:
        """Relative standard error of the seconds per step, where they vary most."""
        return max(stdev(found) / median(found) / len(found) ** 0.5 for found in self.rounds)

    def cost(self, loading: float) -> Cost:
        recipe, dataset, options = self.plan.recipe, self.plan.dataset, self.plan.options
        tested = dataset.test_images if options.test_images is None else options.test_images
        per_epoch = (dataset.train_images - recipe.val_images) // self.plan.batch.global_images
        passes = recipe.val_images * self.evaluation, tested * self.evaluation
        return Cost(loading + self.start + CLOSING_SECONDS, tuple(map(median, self.rounds)), per_epoch, *passes)


def build(candidate: Candidate, plan: Plan, images: Images, world: World) -> Trial:
    """Everything that steps of this candidate need. Collective."""
    began, recipe, batch = time.perf_counter(), plan.recipe, plan.batch
    used = min(len(images.labels), STEPS * batch.global_images)
    pixels, labels, classes = images.pixels[:used], images.labels[:used], len(plan.dataset.classes)
    loader = TrainLoader.of(pixels, labels, recipe, batch, world, bf16=plan.precision == "bf16", classes=classes)
    packing, began = (time.perf_counter() - began) * len(images.labels) / used, time.perf_counter()
    step = engine_step(plan, world)

    def steps_from(epoch: int) -> Iterator[list[MicroBatch]]:
        return (one for _ in count() for one in loader.epoch(epoch))

    batches = [steps_from(epoch) for epoch in (0, *accumulate(recipe.first_epochs))]  # the first epoch of each size
    for each in batches:
        step(next(each))  # libraries prepare themselves for each shape
    start = packing + time.perf_counter() - began
    model = network(plan, world).eval()
    held_out = EvaluationLoader.of(images.pixels[:2000], images.labels[:2000], recipe, world)
    with torch.no_grad():
        one_batch = probe.seconds_each(held_out, lambda batch: model(batch[0]), world)
    evaluation = one_batch * sum(1 for _ in held_out) / len(held_out)
    return Trial(candidate, plan, step, batches, start, evaluation, [[] for _ in batches])


def is_hopeless(candidate: Candidate, plan: Plan, trials: Sequence[Trial], left: float) -> bool:
    """Whether even its shortest known run would not fit, at several times the arithmetic per second of the others."""
    if not trials:
        return False
    rates = (t.candidate.flops * t.plan.batch.global_images / min(min(found) for found in t.rounds) for t in trials)
    images = candidate.points[0].epochs * (plan.dataset.train_images - plan.recipe.val_images)
    return candidate.flops * images / max(rates) / EFFICIENCY_GAIN > left


def measure(budget: str, flags: list[str], world: World, clock: Callable[[], float]) -> tuple[dict[str, Cost], float]:
    """The cost on this machine of each candidate that is worth a try, and the spread of the measurements. Collective."""
    prepare()  # imports DeepSpeed, which the run will not do again
    trials, loading, images = list[Trial](), 0.0, None
    timed = min(MOST_SECONDS, max(LEAST_SECONDS, SHARE_OF_BUDGET * seconds(budget)))
    for candidate in read_frontier():
        try:
            plan = make_plan([*flags, *candidate.flags_for(candidate.settings.epochs)], world.size, "main.py")
        except UsageError:  # for example, these ranks do not divide its batch
            continue
        if images is None:
            began, images = time.perf_counter(), plan.images("train")
            loading = time.perf_counter() - began
        left = world.from_main(lambda: seconds(budget) - clock())
        if is_hopeless(candidate, plan, trials, left):
            continue
        trials.append(build(candidate, plan, images, world))
        trials[-1].take_round(world, timed / ROUNDS / 3)
    sizes = sum(len(trial.batches) for trial in trials)
    for _ in range(ROUNDS - 1):
        for trial in trials:
            trial.take_round(world, timed / ROUNDS / sizes)
    return {trial.candidate.recipe: trial.cost(loading) for trial in trials}, max(trial.spread for trial in trials)


def chosen_flags(budget: str, flags: list[str], began: float) -> list[str] | None:
    """The flags of the ordinary run that this budget comes to; those of an earlier start, if there was one.

    None after a dry run, and on several ranks, which a second launch trains.
    """
    options = make_plan([*flags, *flags_to_check(budget, flags)], launchers.world_size(), "main.py").options
    if not options.dry_run and (choice := Choice.read(options.output_dir, budget)):
        return [*choice.flags, *flags] if launchers.world_size() == 1 else None
    world = distributed.join(options.threads, options.timeout_minutes, deterministic=options.deterministic)

    def clock() -> float:
        return time.time() - began

    try:
        start = clock()
        costs, spread = measure(budget, flags, world, clock)
        again = start if world.size > 1 else 0.0
        choice = world.from_main(lambda: choose(budget, read_frontier(), costs, spread, clock() + again))
    finally:
        leave()
    flags = [*choice.flags, *flags]
    if world.is_main:
        steps = ", ".join(f"{name} {cost.steps[-1]:.3g} s" for name, cost in costs.items())
        print(f"budget {budget}: {start:.1f} s to start, {clock() - start:.1f} s to measure; a step takes, of {steps}")
        if too_long := [one.recipe for one in read_frontier() if one.recipe not in costs]:
            print(f"budget {budget}: not tried, since even its shortest known run would take too long: {', '.join(too_long)}")
        print(f"budget {budget}: chosen {' '.join(choice.flags)}")
        print(f"budget {budget}: expected {choice.expected}; after {choice.seconds:.1f} s in all", flush=True)
    if world.is_main and not options.dry_run:
        command = run_folder.command_to_continue("python main.py", flags, options.output_dir)
        measured = {name: asdict(cost) for name, cost in costs.items()}
        choice.write(options.output_dir, command=command, began=began, started=start, spread=spread, measured=measured)
    return None if options.dry_run or world.size > 1 else flags


def main(argv: list[str]) -> int:
    """Choose, and train; returns the script's exit code, or 2 for a command that cannot be carried out."""
    streams.prepare(lasting=True)
    began = float(os.environ.pop(BUDGET_BEGAN, time.time()))
    try:
        launch, flags = split_launch_options(argv)
        flags_of_run = chosen_flags(launch.budget, flags, began)
    except UsageError as error:
        if distributed.is_local_main():
            print(f"error: {error}", file=sys.stderr)
            with suppress(OSError):
                Path(flags[-1]).rmdir()  # the run's folder, if nothing is in it
        return 2
    if flags_of_run is None:
        return 0
    sys.argv = [str(SCRIPT), *flags_of_run]
    return script.main()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
