"""What training asks of a GPU, counted by the stand-in for CUDA: a line of JSON for each case, such as `bn_cnn captured`.

python tests/workers/gpu_counts.py "bn_cnn eager" "bn_cnn eager --set zero_optimization.stage=2"     (see tests/stand_in.py)
"""

import json
import shlex
import sys
from itertools import islice
from typing import Any

import pytest
import stand_in
import torch

from cifar10.commands.bench_levels import engine_step
from cifar10.config.recipe import load
from cifar10.distributed.world import World
from cifar10.engine.engine import leave
from cifar10.plan import make_plan
from cifar10_deepspeed import get_cifar10_dataloaders
from tests.helpers import cut_down, one_rank

STEPS = 6  # that are counted, after three at each size of images
LAUNCHES = ("kernel", "memset", "nccl", "d2d", "h2d_pinned", "d2h_pinned", "h2d_pageable", "d2h_pageable", "graph_launch")
WAITS = ("device_sync", "stream_sync", "event_sync", "memcpy_sync")


def counted(per: int) -> dict[str, float]:
    """Launches, nodes of graphs and waits of the host since the last reset, divided by `per`."""
    report = stand_in.report()
    kinds = {"launches": LAUNCHES, "nodes": ("graph_nodes",), "waits": WAITS}
    return {name: round(sum(report.get(kind, 0) for kind in kinds[name]) / per, 1) for name in kinds}


def count(case: str, world: World) -> dict[str, Any]:
    """Of a step, and of the loader over an epoch of 45,000 images, in all."""
    recipe, level, *flags = shlex.split(case)
    smaller = load(recipe).recipe.first_sizes
    sized = ["--first-epochs", *["1"] * len(smaller)] if smaller else []
    words = ["--recipe", recipe, "--dataset", "synthetic", "--engine-level", level, "--val-images", "0", *sized, *flags]
    plan = make_plan(words, 1, "count")
    step, loader = engine_step(plan, world), get_cifar10_dataloaders(plan, world)[0]
    sizes = len(loader.first_stores)
    for epoch in range(sizes + 1):
        for batches in islice(loader.epoch(epoch), 3):
            step(batches)
    batches = list(islice(loader.epoch(sizes), STEPS))
    torch.cuda.synchronize()
    stand_in.reset()
    for batch in batches:
        step(batch)
    of_step = counted(len(batches))
    stand_in.reset()
    steps = sum(1 for _ in loader.epoch(sizes))
    return {"case": case, **of_step, "loader": counted(steps), "broken": stand_in.trouble()}


if __name__ == "__main__":
    patch = pytest.MonkeyPatch()
    cut_down(patch, 12_000, 200)
    for name in sys.argv[1:]:
        patch.setattr("deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED", False)
        try:
            counts = count(name, one_rank())
        except Exception as error:
            counts = {"case": name, "failed": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(counts), flush=True)
    leave()
