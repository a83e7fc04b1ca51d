"""Every cell of precision x ZeRO stage x accumulation at one number of ranks, and fp16's loss scale at every stage.

    torchrun --nproc_per_node=2 tests/workers/matrix.py FOLDER      (or as a plain process, for one rank)

Each rank writes what it has measured to <folder>/rank_<n>.pt.
"""

from __future__ import annotations

import sys
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar10.config import ds_config
from cifar10.distributed import world
from cifar10.distributed.world import World
from cifar10.engine.engine import Engine
from cifar10.engine.full_state import weights_sha256
from cifar10.models.registry import build_model
from tests.helpers import batch, largest_difference, make_engine, make_loader, one_step

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
STAGES = (0, 1, 2, 3)
GLOBAL_IMAGES = 32
STEPS, NORMS_AT = 12, (0, 1, 11)  # two global batches, learnt by heart
SMOOTH_STEPS = 30


def matrix_engine(here: World, model: str, precision: str, stage: int, accumulation: int = 1, **fp16: Any) -> Engine:
    """From a JSON with plain toggles, as a user writes them."""
    config = ds_config.with_precision({"zero_optimization": {"stage": stage}, "fp16": fp16}, precision)
    return make_engine(here, build_model(model, 0, 10), global_images=GLOBAL_IMAGES, accumulation=accumulation, **config)


# --- training -----------------------------------------------------------------------------------------------------------


def true_norm(here: World, engine: Engine, micro_batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype | None) -> float:
    """The gradient norm of this step by autograd alone: a plain fp32 copy of the model, no DeepSpeed, no loss scale."""
    copy = build_model("bn_cnn", 0, 10)
    copy.load_state_dict(engine.portable_state())
    copy.train()
    for images, labels in micro_batches:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            logits = copy(images)
        (F.cross_entropy(logits.float(), labels) / len(micro_batches)).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in copy.parameters()])
    return (here.total(gradients) / here.size).norm().item()


def train_cell(here: World, precision: str, stage: int, accumulation: int) -> dict[str, Any]:
    """bn_cnn over the same images as every other cell."""
    engine = matrix_engine(here, "bn_cnn", precision, stage, accumulation)
    loader = make_loader(here, global_images=GLOBAL_IMAGES, accumulation=accumulation, num_images=2 * GLOBAL_IMAGES)
    seen: dict[str, Any] = {"losses": [], "norms": [], "true norms": [], "skipped": 0.0}
    for step, micro_batches in enumerate(islice(cycle(loader.epoch(0)), STEPS)):
        if step in NORMS_AT:
            seen["true norms"].append(true_norm(here, engine, micro_batches, DTYPES[precision]))
        loss = one_step(engine, micro_batches)
        seen["losses"].append(here.total(loss.float().clone()).item() / here.size)
        seen["skipped"] += engine.skipped.item()
        if step in NORMS_AT:
            seen["norms"].append(engine.grad_norm.item())
    own = {} if stage == 3 else {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    return {**seen, "weights": weights_sha256({**engine.portable_state(), **{f"own {name}": p for name, p in own.items()}})}


def smooth_cell(here: World, stage: int) -> list[float]:
    """The losses of smooth_cnn in fp32, each step on images of its own."""
    engine = matrix_engine(here, "smooth_cnn", "fp32", stage)
    loader = make_loader(here, global_images=GLOBAL_IMAGES, num_images=SMOOTH_STEPS * GLOBAL_IMAGES)
    return [here.total(one_step(engine, micro_batches)).item() / here.size for micro_batches in loader.epoch(0)]


# --- the loss scale -----------------------------------------------------------------------------------------------------


def scale_of(engine: Engine) -> float:
    """The loss scale that the last backward has used."""
    scaler = engine.deepspeed.torch_autocast_z0_gradscaler
    return scaler.get_scale() if scaler is not None else engine.deepspeed.optimizer.loss_scaler.cur_scale


def scaled_step(here: World, engine: Engine, number: int, extra: float = 0.0) -> dict[str, Any]:
    """One step of its own images, `extra` added to the loss: the scale it used, and what it did to the weights."""
    before = engine.portable_state()
    images, labels = batch(GLOBAL_IMAGES // here.size, seed=here.size * number + here.rank)
    engine.backward(F.cross_entropy(engine.forward(images).float(), labels) + extra)
    scale = scale_of(engine)
    engine.step()
    after = engine.portable_state()
    moved = largest_difference(after, before)
    return {"scale": scale, "skipped": engine.skipped.item(), "moved": moved, "weights": weights_sha256(after)}


def overflows(here: World, stage: int) -> list[dict[str, Any]]:
    """Steps at a scale far too large until one fits; then one whose loss is infinite on the last rank, and until one fits."""
    engine, steps = matrix_engine(here, "smooth_cnn", "fp16", stage, initial_scale_power=24), []
    for extra in (0.0, float("inf") if here.rank == here.size - 1 else 0.0):
        steps.append(scaled_step(here, engine, len(steps), extra))
        while steps[-1]["skipped"] and len(steps) < 20:
            steps.append(scaled_step(here, engine, len(steps)))
    return steps


def scaled_run(here: World, stage: int, **fp16: Any) -> dict[str, Any]:
    """Seven good steps: their loss scales, how far they moved the weights, and where to."""
    engine = matrix_engine(here, "smooth_cnn", "fp16", stage, **fp16)
    steps = [scaled_step(here, engine, number) for number in range(7)]
    seen = {key: [step[key] for step in steps] for key in ("scale", "skipped", "moved")}
    return {**seen, "weights": engine.portable_state()}


def main() -> None:
    here = world.join(threads=1)
    smooth = {stage: smooth_cell(here, stage) for stage in STAGES}
    cells = {}
    for precision in DTYPES:  # fp32 first: autocast sets flags for the whole process
        for stage in STAGES:
            for accumulation in (1, 2):
                cells[precision, stage, accumulation] = train_cell(here, precision, stage, accumulation)
    measured = {
        "smooth": smooth,
        "cells": cells,
        "overflows": {stage: overflows(here, stage) for stage in STAGES},
        "growing scale": {stage: scaled_run(here, stage, initial_scale_power=8, loss_scale_window=2) for stage in STAGES},
        "fixed scale": {stage: scaled_run(here, stage, loss_scale=256) for stage in STAGES},
    }
    torch.save(measured, Path(sys.argv[1]) / f"rank_{here.rank}.pt")
    world.leave()


if __name__ == "__main__":
    main()
