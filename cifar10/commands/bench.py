"""`python -m cifar10 bench`: the speed of this program beside two loops that anyone would write, in one run.

    plain PyTorch     the loop of the tutorials: torchvision's CIFAR10 and transforms in a DataLoader with two workers,
                      torch's SGD and clipping, `.item()` of the loss and the accuracy at every step
    stock DeepSpeed   exactly the same loop through `deepspeed.initialize`, with the document's JSON as it is
    this program      our loader, engine, step and metric buffer, with the recipe bn_cnn_document
    bn_cnn_fast       the same network in this program as that recipe trains it: bf16 where it is native, batch 500
    ..., eager        these two without the fused operation, where the recipes have it

The same network from the same weights, in one process, in rounds A B C ... A B C ..., so that other load on the machine
affects all of them; all but bn_cnn_fast with batch 32, fp32, and the JSON's learning rate. Two things make the reference loops
faster than such scripts are: the document's 12 gradient norms per step are left out, and freed memory is kept for the next step
in all loops (device.keep_freed_memory). Only the ratios of one run can be compared. The losses show that all of them learn.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean, median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from cifar10 import UsageError
from cifar10.commands import bench_levels
from cifar10.commands.bench_levels import LAST_STEPS, Loop, Step, engine_step, network, steps_of
from cifar10.commands.common import DataDir, Device, JsonFile, Threads, as_flags, number_table, quotients, settle, span
from cifar10.data.loader import MicroBatch
from cifar10.distributed import world as distributed
from cifar10.distributed.device import count_gpus
from cifar10.distributed.world import World
from cifar10.engine.engine import leave, prepare
from cifar10.engine.levels import Level
from cifar10.plan import Plan, make_plan
from cifar10.run import folder as run_folder
from cifar10_deepspeed import CIFAR10CNNEnhanced, calculate_accuracy, get_cifar10_dataloaders

RECIPE, FAST_RECIPE = "bn_cnn_document", "bn_cnn_fast"
PLAIN, STOCK, OURS, FAST = "plain PyTorch", "stock DeepSpeed", "this program", "bn_cnn_fast"
EAGER = ", eager"  # the same at that engine level
RATIOS = ((STOCK, PLAIN), (OURS, STOCK), (FAST, STOCK), (OURS, OURS + EAGER), (FAST, FAST + EAGER))
WORKERS = 2  # of the DataLoader


# --- the two reference loops ------------------------------------------------------------------------------------------


def tutorial_batches(plan: Plan) -> Iterator[MicroBatch]:
    """A tutorial's DataLoader, without an end."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import transforms
    from torchvision.datasets import CIFAR10

    recipe = plan.recipe
    augment = [transforms.RandomCrop(plan.dataset.size, padding=4), transforms.RandomHorizontalFlip()]  # the document's
    transform = transforms.Compose([*augment, transforms.ToTensor(), transforms.Normalize(recipe.mean, recipe.std)])
    images, dataset = plan.images("train"), CIFAR10.__new__(CIFAR10)  # torchvision's own, except for reading the files
    vars(dataset).update(data=images.pixels, targets=images.labels.tolist(), transform=transform, target_transform=None)
    shuffled = RandomSampler(dataset, num_samples=1 << 40)  # a permutation after another, each made when it is needed
    return iter(DataLoader(dataset, plan.batch.global_images, sampler=shuffled, num_workers=WORKERS))


class DocumentCNN(CIFAR10CNNEnhanced):
    """The same network with exactly the reference document's forward; its outputs are bitwise equal to ours, unless fused."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = self.pool(F.relu(self.bn2(self.conv2(x))))
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


def document_model(plan: Plan, world: World) -> nn.Module:
    """The document's network, with the initial weights of ours."""
    model = DocumentCNN().to(world.device)
    model.load_state_dict(network(plan, world).state_dict())
    return model


def tutorial_step(world: World, model: Callable[[Tensor], Tensor], update: Callable[[Tensor], None]) -> Step:
    """A step that synchronizes for the loss and the accuracy."""

    def step(batch: MicroBatch) -> Tensor:
        images, labels = (part.to(world.device) for part in batch)
        outputs = model(images)
        loss = F.cross_entropy(outputs, labels)
        update(loss)
        loss.item()
        calculate_accuracy(outputs, labels)
        return loss.detach()

    return step


def plain_step(plan: Plan, world: World) -> Step:
    """The tutorial's step in PyTorch alone, with the JSON's optimizer and clipping."""
    config, model = plan.given_config, document_model(plan, world)
    optimizer = torch.optim.SGD(model.parameters(), **config["optimizer"]["params"])

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["gradient_clipping"])
        optimizer.step()

    return tutorial_step(world, model, update)


def stock_step(plan: Plan, world: World) -> Step:
    """The same step through DeepSpeed with the JSON as it is: neither `ds_config.resolve` nor `Engine`."""
    model = document_model(plan, world)
    engine = prepare().initialize(model=model, model_parameters=model.parameters(), config=plan.given_config)[0]

    def update(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return tutorial_step(world, engine, update)


def at_level(plan: Plan, level: Level) -> Plan:
    return replace(plan, options=replace(plan.options, engine_level=level))


def measure(plan: Plan, fast: Plan, world: World, console: Console, *, rounds: int, warmup_steps: int, steps: int) -> Any:
    """Images per second of every loop in every round, and its final loss; rounds have about the same number of images."""
    tutorial, images, fast_images = tutorial_batches(plan), plan.batch.global_images, fast.batch.global_images
    (ours, _), (fast_loader, _) = (get_cifar10_dataloaders(either, world) for either in (plan, fast))
    fast_steps = max(2, steps * images // fast_images)
    loops = {
        PLAIN: Loop(plain_step(plan, world), tutorial, images, warmup_steps, steps),
        STOCK: Loop(stock_step(plan, world), tutorial, images, warmup_steps, steps),
        OURS: Loop(engine_step(plan, world), steps_of(ours), images, warmup_steps, steps),
        FAST: Loop(engine_step(fast, world), steps_of(fast_loader), fast_images, 2, fast_steps),
    }
    if plan.options.engine_level == "fused":
        eager, fast_eager = (engine_step(at_level(either, "eager"), world) for either in (plan, fast))
        loops[OURS + EAGER] = Loop(eager, steps_of(ours), images, warmup_steps, steps)
        loops[FAST + EAGER] = Loop(fast_eager, steps_of(fast_loader), fast_images, 2, fast_steps)
    for number in range(1, rounds + 1):
        for loop in loops.values():
            loop.take_round()
        speeds = ", ".join(f"{name} {loop.speeds[-1]:,.0f}" for name, loop in loops.items())
        console.print(f"round {number}/{rounds}: {speeds}")
    rows = {}
    for name, loop in loops.items():
        learned = {"steps": len(loop.losses), "final_loss": fmean(loop.losses[-LAST_STEPS:])}
        rows[name] = {"images_per_second": loop.speeds, "median": median(loop.speeds), **learned}
    return rows


def compare(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Each of RATIOS: the quotient of the medians, and those of the rounds."""
    of = {name: (row["median"], row["images_per_second"]) for name, row in rows.items()}
    return [
        {"of": name, "to": base, "ratio": of[name][0] / of[base][0], "per_round": quotients(of[name][1], of[base][1])}
        for name, base in RATIOS
        if base in of
    ]


def show(rows: dict[str, Any], ratios: list[dict[str, Any]], console: Console) -> None:
    speeds = number_table("loop", "images/s, median", "min .. max", f"loss, last {LAST_STEPS} steps")
    for name, row in rows.items():
        speeds.add_row(name, f"{row['median']:,.0f}", span(row["images_per_second"], ",.0f"), f"{row['final_loss']:.4f}")
    console.print(speeds)
    times = number_table("times as fast", "of the medians", "min .. max of the rounds")
    for row in ratios:
        times.add_row(f"{row['of']} / {row['to']}", f"{row['ratio']:.2f}", span(row["per_round"]))
    console.print(times)


@contextmanager
def measuring(threads: int | None, console: Console) -> Iterator[tuple[World, dict[str, Any]]]:
    """This process as a world of one for the time of a measurement, and its environment, which is printed."""
    world = distributed.join(threads)
    try:
        environment = run_folder.environment(["python", "-m", "cifar10", *sys.argv[1:]], world.facts)
        environment["load"] = [round(load, 2) for load in os.getloadavg()]
        console.print("\n".join(f"{key}: {value}" for key, value in environment.items()), soft_wrap=True)
        yield world, environment
    finally:
        leave()


def run(
    dataset: Literal["cifar10", "synthetic"] = "cifar10",
    data_dir: DataDir = None,
    rounds: int = 5,
    steps: int = 200,
    warmup_steps: int = 20,
    threads: Threads = None,
    json_file: JsonFile = None,
    gpu: bool = False,
    device: Device = "auto",
) -> None:
    """Images per second of this program beside a plain PyTorch loop and a stock DeepSpeed one, and the ratios.

    Args:
        dataset: The images: the real data set, or synthetic ones that need no download.
        rounds: How often each loop is timed, in turns.
        steps: Steps that are timed, per loop and round.
        warmup_steps: Steps before them that are not timed.
        gpu: On a GPU, in place of the above: the engine's levels beside plain PyTorch's step, in fp32 and bf16, at batches of
            64 and 512 images.
    """
    if min(rounds, steps, warmup_steps + 1) < 1:
        raise UsageError("--rounds and --steps must be whole numbers from 1 up, --warmup-steps from 0 up")
    settle(device)
    images, console = {"--dataset": dataset, "--data-dir": data_dir}, Console(highlight=False)
    sizes = {"rounds": rounds, "steps": steps, "warmup_steps": warmup_steps}
    if gpu:
        if not count_gpus():
            raise UsageError("--gpu needs a GPU, and PyTorch sees none on this machine; leave it out to measure the CPU")
        settings = {"recipe": bench_levels.RECIPE, "dataset": dataset, **sizes}
        with measuring(threads, console) as (world, environment):

            def write(cells: dict[str, bench_levels.Rows]) -> None:
                if json_file is not None:
                    run_folder.write_json(json_file, {"environment": environment, "settings": settings, "cells": cells})

            cells = bench_levels.measure(images, world, after_each=write, **sizes)
        bench_levels.show("the engine's levels beside plain PyTorch", cells, console)
        return
    flags = as_flags({**images, "--threads": threads})
    plan, fast = (make_plan([*flags, f"--recipe={name}"], 1, "bench") for name in (RECIPE, FAST_RECIPE))
    with measuring(threads, console) as (world, environment):
        rows = measure(plan, fast, world, console, **sizes)
    ratios = compare(rows)
    show(rows, ratios, console)
    if json_file is not None:
        sizes = {"batch_images": plan.batch.global_images, **sizes}
        settings = {"recipe": RECIPE, "dataset": dataset, "data_loader_workers": WORKERS, **sizes}
        run_folder.write_json(json_file, {"environment": environment, "settings": settings, "rows": rows, "ratios": ratios})
