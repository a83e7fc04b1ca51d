"""Every precision x ZeRO stage x accumulation at one number of ranks, and fp16's loss scale at every stage.

    torchrun --nproc_per_node=2 tests/workers/matrix.py FOLDER      (or python, for one rank)

Each rank writes its measurements to <folder>/rank_<n>.pt.
"""

import sys
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar10.config import ds_config
from cifar10.distributed import world as distributed
from cifar10.distributed.world import World
from cifar10.engine.engine import Engine, leave
from cifar10.engine.full_state import weights_sha256
from cifar10.models.registry import build_model
from tests.helpers import batch, largest_difference, make_engine, make_loader, one_step

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
STAGES = (0, 1, 2, 3)
GLOBAL_IMAGES = 32
STEPS, NORMS_AT = 12, (0, 1, 11)  # on two global batches


def matrix_engine(world: World, model: str, precision: str, stage: int, accumulation: int = 1, **fp16: Any) -> Engine:
    """From a config with plain switches, as a user writes them."""
    config = ds_config.with_precision({"zero_optimization": {"stage": stage}, "fp16": fp16}, precision)
    return make_engine(world, build_model(model, 0, 10), global_images=GLOBAL_IMAGES, accumulation=accumulation, **config)


# --- training -----------------------------------------------------------------------------------------------------------


def true_norm(world: World, engine: Engine, micro_batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype | None) -> float:
    """The gradient norm of this step by autograd alone, on a plain fp32 copy of the model."""
    copy = build_model("bn_cnn", 0, 10)
    copy.load_state_dict(engine.portable_state())
    copy.train()
    for images, labels in micro_batches:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            logits = copy(images)
        (F.cross_entropy(logits.float(), labels) / len(micro_batches)).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in copy.parameters()])
    return (world.total(gradients) / world.size).norm().item()


def train_cell(world: World, precision: str, stage: int, accumulation: int) -> dict[str, Any]:
    engine = matrix_engine(world, "bn_cnn", precision, stage, accumulation)
    loader = make_loader(world, global_images=GLOBAL_IMAGES, accumulation=accumulation, num_images=2 * GLOBAL_IMAGES)
    seen: dict[str, Any] = {"losses": [], "norms": [], "true norms": [], "skipped": 0.0}
    for step, micro_batches in enumerate(islice(cycle(loader.epoch(0)), STEPS)):
        if step in NORMS_AT:
            seen["true norms"].append(true_norm(world, engine, micro_batches, DTYPES[precision]))
        loss = one_step(engine, micro_batches)
        seen["losses"].append(world.total(loss.float().clone()).item() / world.size)
        seen["skipped"] += engine.skipped.item()
        if step in NORMS_AT:
            seen["norms"].append(engine.grad_norm.item())
    own = {} if stage == 3 else {f"own {name}": p.detach().clone() for name, p in engine.module.named_parameters()}
    return {**seen, "weights": weights_sha256({**engine.portable_state(), **own})}


# --- the loss scale -----------------------------------------------------------------------------------------------------


def scale_of(engine: Engine) -> float:
    """The loss scale of the last backward."""
    scaler = engine.deepspeed.torch_autocast_z0_gradscaler
    return scaler.get_scale() if scaler is not None else engine.deepspeed.optimizer.loss_scaler.cur_scale


def scaled_step(world: World, engine: Engine, number: int, extra: float = 0.0) -> dict[str, Any]:
    """One step on new images, `extra` added to the loss: its scale, and how far the weights moved."""
    before = engine.portable_state()
    images, labels = batch(GLOBAL_IMAGES // world.size, seed=world.size * number + world.rank)
    engine.backward(F.cross_entropy(engine.forward(images).float(), labels) + extra)
    scale = scale_of(engine)
    engine.step()
    after, skipped = engine.portable_state(), engine.skipped.item()
    moved = largest_difference(after, before)
    return {"scale": scale, "skipped": skipped, "moved": moved, "weights": weights_sha256(after)}


def overflows(world: World, stage: int) -> list[dict[str, Any]]:
    """Steps at too large a scale until one is applied; then an infinite loss on the last rank, until one is applied."""
    engine, steps = matrix_engine(world, "smooth_cnn", "fp16", stage, initial_scale_power=24), []
    for extra in (0.0, float("inf") if world.rank == world.size - 1 else 0.0):
        steps.append(scaled_step(world, engine, len(steps), extra))
        while steps[-1]["skipped"] and len(steps) < 20:
            steps.append(scaled_step(world, engine, len(steps)))
    return steps


def scaled_run(world: World, stage: int, **fp16: Any) -> dict[str, Any]:
    """Seven good steps: their loss scales and how they moved the weights."""
    engine = matrix_engine(world, "smooth_cnn", "fp16", stage, **fp16)
    steps = [scaled_step(world, engine, number) for number in range(7)]
    seen = {key: [step[key] for step in steps] for key in ("scale", "skipped", "moved")}
    return {**seen, "weights": engine.portable_state()}


def main() -> None:
    world = distributed.join(threads=1)
    cells = list(product(DTYPES, STAGES, (1, 2)))  # fp32 first: autocast sets flags for the whole process
    measured = {
        "cells": {cell: train_cell(world, *cell) for cell in cells},
        "overflows": {stage: overflows(world, stage) for stage in STAGES},
        "growing scale": {stage: scaled_run(world, stage, initial_scale_power=8, loss_scale_window=2) for stage in STAGES},
        "fixed scale": {stage: scaled_run(world, stage, loss_scale=256) for stage in STAGES},
    }
    torch.save(measured, Path(sys.argv[1]) / f"rank_{world.rank}.pt")
    leave()


if __name__ == "__main__":
    main()
