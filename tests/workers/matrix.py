"""Every cell of precision x ZeRO stage x accumulation at one number of ranks: trained, and its gradient norms checked.

    torchrun --nproc_per_node=2 tests/workers/matrix.py FOLDER      (or as a plain process, for one rank)

Each rank writes <folder>/ranks_<world size>_rank_<n>.pt: {(precision, stage, accumulation): what it measured}.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar10 import ds_json, world
from cifar10.engine import Engine
from cifar10.world import World
from cifar10_deepspeed import build_model
from tests.helpers import make_engine, make_loader, one_step

STEPS, NORMS_AT = 30, (0, 1, 15, 29)
GLOBAL_IMAGES = 32
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MODELS = ("bn_cnn", "smooth_cnn")


def true_norm(here: World, model: str, engine: Engine, micro_batches: list[tuple[Tensor, Tensor]], dtype: Any) -> float:
    """The gradient norm of this step by autograd alone: a plain fp32 copy of the model, no DeepSpeed, no loss scale."""
    copy = build_model(model, 0)
    copy.load_state_dict(engine.portable_state())
    copy.train()
    for images, labels in micro_batches:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            logits = copy(images)
        (F.cross_entropy(logits.float(), labels) / len(micro_batches)).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in copy.parameters()])
    return (here.total(gradients) / here.size).norm().item()


def train_cell(here: World, model: str, precision: str, stage: int, accumulation: int) -> dict[str, Any]:
    """One engine from a JSON with plain toggles, over the same images as every other cell."""
    config = ds_json.with_precision({"zero_optimization": {"stage": stage}}, precision)
    engine = make_engine(
        here, build_model(model, 0), global_images=GLOBAL_IMAGES, accumulation=accumulation, gradient_clipping=1.0, **config
    )
    loader = make_loader(here, global_images=GLOBAL_IMAGES, accumulation=accumulation, num_images=GLOBAL_IMAGES * STEPS)
    seen: dict[str, Any] = {"losses": [], "norms": [], "true norms": [], "skipped": 0.0}
    for step, micro_batches in enumerate(loader.epoch(0)):
        if step in NORMS_AT:
            seen["true norms"].append(true_norm(here, model, engine, micro_batches, DTYPES[precision]))
        loss = one_step(engine, micro_batches)
        seen["losses"].append(here.total(loss.float().clone()).item() / here.size)
        seen["skipped"] += engine.skipped.item()
        if step in NORMS_AT:
            seen["norms"].append(engine.grad_norm.item())
    return {**seen, "weights": engine.portable_state()}


def main() -> None:
    here, cells = world.join(threads=1), {}
    for precision in DTYPES:  # fp32 first: autocast sets flags for the whole process
        for stage in (0, 1, 2, 3):
            for accumulation in (1, 2):
                for model in MODELS if precision == "fp32" else MODELS[:1]:
                    cells[model, precision, stage, accumulation] = train_cell(here, model, precision, stage, accumulation)
    torch.save(cells, Path(sys.argv[1]) / f"ranks_{here.size}_rank_{here.rank}.pt")
    world.leave()


if __name__ == "__main__":
    main()
