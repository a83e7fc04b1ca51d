"""How fast this program trains beside two loops that anyone would write, in one run: `python -m cifar10 bench`.

(With `--gpu` it is another measurement: see bench_levels.py.)

    plain PyTorch     the loop of the tutorials: torchvision's CIFAR10 and transforms in a DataLoader with two workers,
                      torch's SGD and clipping, `.item()` of the loss and the accuracy at every step
    stock DeepSpeed   exactly the same loop through `deepspeed.initialize`, with the document's JSON as it is
    this program      our loader, engine, step and metric buffer, with the recipe bn_cnn_document
    bn_cnn_fast       the same network in this program as that recipe trains it: bf16 where it is native, batch 500

The same network from the same weights, one process, in rounds A B C D A B C D, so that whatever else the machine does meets
all of them; the first three with batch 32, fp32, and the JSON's learning rate. The stock loop is as good as such a script can
be: the document's also fetches the norm of every single gradient, 12 more synchronizations a step, and that is left out; and
freed memory is kept for the next step in all loops (device.keep_freed_memory), which a script would not do. Images per second
of two runs or machines cannot be compared; the ratios of one run can. The losses show that all of them learn.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cifar10 import UsageError
from cifar10.commands import bench_levels
from cifar10.data.loader import MicroBatch
from cifar10.distributed import world as distributed
from cifar10.distributed.world import World
from cifar10.engine.engine import Engine, own_optimizer, prepare
from cifar10.models.registry import build_model
from cifar10.plan import Plan, make_plan
from cifar10.run import folder as run_folder
from cifar10.run.metric_buffer import MetricBuffer, count_steps
from cifar10.run.state import RunState
from cifar10_deepspeed import (
    CIFAR10CNNEnhanced,
    calculate_accuracy,
    get_cifar10_dataloaders,
    train_step,
)

RECIPE, FAST_RECIPE = "bn_cnn_document", "bn_cnn_fast"
PLAIN, STOCK, OURS, FAST = "plain PyTorch", "stock DeepSpeed", "this program", "bn_cnn_fast"
RATIOS = ((STOCK, PLAIN), (OURS, STOCK), (FAST, STOCK))
WORKERS, PREFETCHED = 2, 2  # of the DataLoader; batches that each worker prepares ahead (torch's default)
LAST_STEPS = 50  # whose mean loss is reported


# --- the two loops of others ------------------------------------------------------------------------------------------


def tutorial_loader(plan: Plan, round_steps: int) -> Iterable[MicroBatch]:
    """What a tutorial reads its images with; one iteration of it is one round.

    A round is so much longer than `round_steps` that its workers are as busy at the last of these as at any before.
    """
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import transforms
    from torchvision.datasets import CIFAR10

    recipe, batch = plan.recipe, plan.batch.global_images
    augment = [transforms.RandomCrop(plan.dataset.size, padding=4), transforms.RandomHorizontalFlip()]  # the document's
    transform = transforms.Compose([*augment, transforms.ToTensor(), transforms.Normalize(recipe.mean, recipe.std)])
    if recipe.dataset == "cifar10":
        dataset = CIFAR10(plan.options.data_dir, train=True, transform=transform)
    else:
        images, dataset = plan.images("train"), CIFAR10.__new__(CIFAR10)  # all but the files is torchvision's own
        vars(dataset).update(data=images.pixels, targets=images.labels.tolist(), transform=transform, target_transform=None)
    shuffled = RandomSampler(dataset, num_samples=(round_steps + WORKERS * PREFETCHED) * batch)
    workers: dict[str, Any] = {"num_workers": WORKERS, "prefetch_factor": PREFETCHED, "persistent_workers": True}
    return DataLoader(dataset, batch, sampler=shuffled, **workers)


class DocumentCNN(CIFAR10CNNEnhanced):
    """The same network with exactly the reference document's forward; its outputs are bitwise equal to ours."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = self.pool(F.relu(self.bn2(self.conv2(x))))
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


def document_model(plan: Plan, world: World) -> nn.Module:
    """The document's network, from the weights that ours starts from."""
    model = DocumentCNN()
    model.load_state_dict(build_model(plan.recipe.model, plan.recipe.seed, len(plan.dataset.classes)).state_dict())
    return model.to(world.device)


class TutorialLoop:
    """One step after another, synchronizing for the loss and the accuracy of each."""

    def __init__(self, loader: Iterable[MicroBatch], device: torch.device, model: nn.Module, update: Callable[[Tensor], None]):
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self._loader, self._device, self._model, self._update = loader, device, model, update

    def batches(self) -> Iterator[MicroBatch]:
        return iter(self._loader)

    def step(self, batch: MicroBatch) -> None:
        images, labels = (part.to(self._device) for part in batch)
        outputs = self._model(images)
        loss = F.cross_entropy(outputs, labels)
        self._update(loss)
        self.losses.append(loss.item())
        self.accuracies.append(calculate_accuracy(outputs, labels))

    def finish(self) -> None:
        """Nothing is pending: every step has synchronized."""


def plain_loop(plan: Plan, world: World, loader: Iterable[MicroBatch]) -> TutorialLoop:
    """The tutorial's loop in PyTorch alone, with the JSON's optimizer and clipping."""
    config = plan.given_config
    model = document_model(plan, world)
    optimizer = torch.optim.SGD(model.parameters(), **config["optimizer"]["params"])

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["gradient_clipping"])
        optimizer.step()

    return TutorialLoop(loader, world.device, model, update)


def deepspeed_engine(model: nn.Module, config: dict[str, Any]) -> Any:
    return prepare().initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def stock_loop(plan: Plan, world: World, loader: Iterable[MicroBatch]) -> TutorialLoop:
    """The same loop through DeepSpeed, and the JSON as it stands: none of `ds_config.resolve`, none of `Engine`."""
    engine = deepspeed_engine(document_model(plan, world), plan.given_config)

    def update(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return TutorialLoop(loader, world.device, engine, update)


# --- ours -------------------------------------------------------------------------------------------------------------


class OurLoop:
    """What `train_one_epoch` does: nothing is read back from the device until the metric buffer is full."""

    def __init__(self, plan: Plan, world: World, round_steps: int) -> None:
        self.losses: list[float] = []
        self._recipe, self._world, self._round_steps = plan.recipe, world, round_steps
        loader, _ = get_cifar10_dataloaders(plan, world)
        self._global_images, self._stream = loader.global_images, (step for epoch in count() for step in loader.epoch(epoch))
        model = build_model(plan.recipe.model, plan.recipe.seed, len(plan.dataset.classes)).to(world.device)
        given = {"model_parameters": model.parameters(), "optimizer": own_optimizer(model, plan.ds_config)}
        self._engine = Engine(prepare().initialize(model=model, config=plan.ds_config, **given)[0], world)
        self._buffer, self._state = MetricBuffer(plan.options.log_every_steps, world.device), RunState()

    def batches(self) -> Iterator[list[MicroBatch]]:
        return islice(self._stream, self._round_steps)

    def step(self, batch: list[MicroBatch]) -> None:
        self._engine.set_lr(1.0)
        loss, correct = train_step(self._engine, batch, self._recipe.label_smoothing)
        self._buffer.write(loss, correct, self._engine.grad_norm, self._engine.skipped)
        if self._buffer.is_full:
            self.finish()

    def finish(self) -> None:
        """Synchronize, and count the steps since the last read."""
        rows, limit = self._buffer.read(self._world), self._recipe.max_skipped_in_a_row
        count_steps(rows, self._state, global_images=self._global_images, max_skipped_in_a_row=limit)
        self.losses.extend(row[0] for row in rows)


# --- the measurement --------------------------------------------------------------------------------------------------


def seconds_per_round(loop: TutorialLoop | OurLoop, warmup_steps: int, steps: int) -> float:
    """The wall time of `steps` steps, once `warmup_steps` have brought workers, caches and allocator to their usual state."""
    batches = loop.batches()
    for batch in islice(batches, warmup_steps):
        loop.step(batch)
    loop.finish()
    started = time.perf_counter()
    for batch in islice(batches, steps):
        loop.step(batch)
    loop.finish()
    seconds = time.perf_counter() - started
    deque(batches, maxlen=0)  # take what the workers prepared ahead: with nothing left to do, they sleep in others' rounds
    return seconds


def measure(
    plan: Plan, fast: Plan, world: World, rounds: int, warmup_steps: int, steps: int, console: Console
) -> dict[str, Any]:
    """Images per second of every loop in every round, and the loss that each came to; a round's images are about as many."""
    loader, ours = tutorial_loader(plan, warmup_steps + steps), OurLoop(plan, world, warmup_steps + steps)
    images, fast_images = plan.batch.global_images, fast.batch.global_images
    fast_steps = max(2, steps * images // fast_images)
    loops = {
        PLAIN: (plain_loop(plan, world, loader), images, warmup_steps, steps),
        STOCK: (stock_loop(plan, world, loader), images, warmup_steps, steps),
        OURS: (ours, images, warmup_steps, steps),
        FAST: (OurLoop(fast, world, 2 + fast_steps), fast_images, 2, fast_steps),
    }
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(1, rounds + 1):
        for name, (loop, batch, warmup, timed) in loops.items():
            speeds[name].append(timed * batch / seconds_per_round(loop, warmup, timed))
        console.print(f"round {number}/{rounds}: " + ", ".join(f"{name} {speeds[name][-1]:,.0f}" for name in loops))
    rows = {}
    for name, (loop, *_) in loops.items():
        learned = {"steps": len(loop.losses), "final_loss": fmean(loop.losses[-LAST_STEPS:])}
        rows[name] = {"images_per_second": speeds[name], "median": median(speeds[name]), **learned}
    return rows


def compare(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Each of RATIOS: the quotient of the medians, and those of the rounds."""
    quotients = []
    for name, base in RATIOS:
        rounds = zip(rows[name]["images_per_second"], rows[base]["images_per_second"], strict=True)
        ratio = rows[name]["median"] / rows[base]["median"]
        quotients.append({"of": name, "to": base, "ratio": ratio, "per_round": [this / that for this, that in rounds]})
    return quotients


def show(rows: dict[str, Any], ratios: list[dict[str, Any]], console: Console) -> None:
    """How fast, how well, and how many times as fast."""

    def spread(values: list[float], spec: str) -> str:
        return f"{min(values):{spec}} .. {max(values):{spec}}"

    speeds = Table("loop", "images/s, median", "min .. max", f"loss, last {LAST_STEPS} steps")
    for name, row in rows.items():
        speeds.add_row(name, f"{row['median']:,.0f}", spread(row["images_per_second"], ",.0f"), f"{row['final_loss']:.4f}")
    times = Table("times as fast", "of the medians", "min .. max of the rounds")
    for row in ratios:
        times.add_row(f"{row['of']} / {row['to']}", f"{row['ratio']:.2f}", spread(row["per_round"], ".2f"))
    for table in (speeds, times):
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)


# --- the command ------------------------------------------------------------------------------------------------------


@contextmanager
def measuring(threads: int | None, console: Console) -> Iterator[tuple[World, dict[str, Any]]]:
    """This process as a world of one, for as long as something is measured; and on what, which is printed."""
    world = distributed.join(threads)
    try:
        facts = {"cores": distributed.cores(), "threads": torch.get_num_threads(), "device": world.device_name}
        environment = run_folder.environment(["python", "-m", "cifar10", *sys.argv[1:]], facts)
        environment["load"] = [round(load, 2) for load in os.getloadavg()]
        console.print("\n".join(f"{key}: {value}" for key, value in environment.items()), soft_wrap=True)
        yield world, environment
    finally:
        distributed.leave()


def run(
    dataset: Literal["cifar10", "synthetic"] = "cifar10",
    data_dir: Path | None = None,
    rounds: int = 5,
    steps: int = 200,
    warmup_steps: int = 20,
    threads: int | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    gpu: bool = False,
) -> None:
    """Images per second of this program beside a plain PyTorch loop and a stock DeepSpeed one, and the ratios.

    Args:
        dataset: The images: the real data set, or synthetic ones that need no download.
        data_dir: Where CIFAR-10 lies, or is downloaded to (default: $CIFAR10_DIR, else data/).
        rounds: How often each loop is timed, in turns.
        steps: Steps that are timed, per loop and round.
        warmup_steps: Steps before them that are not.
        threads: CPU threads of the training process (default: cores of this machine).
        json_file: Where to write the numbers of every round.
        gpu: On a GPU, in place of the above: the engine's levels beside plain PyTorch's step, in fp32 and bf16, at batches of
            64 and 512 images.
    """
    if min(rounds, steps, warmup_steps + 1) < 1:
        raise UsageError("--rounds and --steps must be whole numbers from 1 up, --warmup-steps from 0 up")
    images, sizes = (
        {"--dataset": dataset, "--data-dir": data_dir},
        {"rounds": rounds, "steps": steps, "warmup_steps": warmup_steps},
    )
    console = Console(highlight=False)
    if gpu:
        bench_levels.refuse_without_gpu()
        with measuring(threads, console) as (world, environment):
            cells = bench_levels.measure(images, world, **sizes)
        bench_levels.show("the engine's levels beside plain PyTorch", cells, console)
        if json_file is not None:
            settings = {"recipe": bench_levels.RECIPE, "dataset": dataset, **sizes}
            run_folder.write_json(json_file, {"environment": environment, "settings": settings, "cells": cells})
        return
    flags = {**images, "--threads": threads}
    words = [f"{flag}={value}" for flag, value in flags.items() if value is not None]
    plan, fast = (make_plan([*words, f"--recipe={name}"], 1, "bench") for name in (RECIPE, FAST_RECIPE))
    with measuring(threads, console) as (world, environment):
        rows = measure(plan, fast, world, rounds, warmup_steps, steps, console)
    ratios = compare(rows)
    show(rows, ratios, console)
    if json_file is not None:
        sizes = {"batch_images": plan.batch.global_images, **sizes}
        settings = {"recipe": RECIPE, "dataset": dataset, "data_loader_workers": WORKERS, **sizes}
        run_folder.write_json(json_file, {"environment": environment, "settings": settings, "rows": rows, "ratios": ratios})
