"""Mixture of experts, measured with one rank and then with two. Each rank writes to <folder>/<ranks>_<rank>.pt.

torchrun --nproc_per_node=2 tests/workers/experts.py FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar10.distributed import world as distributed
from cifar10.distributed.world import World
from cifar10.engine.engine import Engine, leave, prepare
from cifar10.engine.experts import divide
from cifar10.models.registry import build_model
from tests.helpers import make_engine, make_loader, one_step, snapshot

STEPS, CLIP = 30, 0.5
CASES = {  # what it is -> the number of ranks, top_k, ranks over which the experts are divided, ZeRO stage
    "top-1": (1, 1, 1, 0),
    "top-2": (1, 2, 1, 0),
    "top-1 copied": (2, 1, 1, 0),
    "top-1 divided": (2, 1, 2, 0),
    "top-2 divided": (2, 2, 2, 0),
    "top-1 divided, zero 1": (2, 1, 2, 1),
    "top-2 divided, zero 2": (2, 2, 2, 2),
    "top-1 copied, zero 2": (2, 1, 1, 2),
}


def engine_of(
    world: World, top_k: int, size: int, stage: int, seed: int = 0, *, capacity_factor: float = 0.0, bf16: bool = False
) -> Engine:
    model = build_model("moe_cnn", seed, 10, top_k=top_k, capacity_factor=capacity_factor)
    divide(model, world, size)
    config = {"gradient_clipping": CLIP, "zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}}
    engine = make_engine(world, model, **config)
    engine.train()
    return engine


def batches(world: World) -> list[Any]:
    return [batch for batch, _ in zip(make_loader(world, num_images=32 * STEPS).epoch(0), range(STEPS), strict=False)]


def run_steps(world: World, engine: Engine, steps: list[Any]) -> dict[str, Any]:
    """The losses, norms and counts of the global batch, and the weights of the whole model."""
    losses, norms, routed = [], [], []
    for micro_batches in steps:
        loss = one_step(engine, micro_batches, 0.5)
        losses.append(world.total(loss.detach().clone()).item() / world.size)
        norms.append(engine.grad_norm.item())
        routed.append(world.total(engine.routed.clone()).tolist())
    return {"losses": losses, "norms": norms, "routed": routed, "weights": engine.portable_state()}


def plain_run(world: World, top_k: int) -> dict[str, Any]:
    """The same in plain PyTorch with the plain layer: cross-entropy and the auxiliary loss of the whole batch."""
    model = build_model("moe_cnn", 0, 10, top_k=top_k)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    probabilities: list[Tensor] = []
    model.moe.gate.register_forward_hook(lambda _, __, logits: probabilities.append(logits.flatten(0, 1).softmax(dim=1)))
    losses, norms = [], []
    for ((images, labels),) in batches(world):
        probabilities.clear()
        loss = F.cross_entropy(model(images), labels)
        (each,) = probabilities
        share = F.one_hot(each.argmax(dim=1), 4).float().mean(dim=0)
        optimizer.zero_grad()
        (loss + 0.01 * 4 * (each.mean(dim=0) * share).sum()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "weights": model.state_dict()}


def bad_step(world: World, engine: Engine) -> dict[str, Any]:
    """A step whose loss is infinite on the last rank alone."""
    (micro_batches, *_), before = batches(world), snapshot(engine)
    one_step(engine, micro_batches, 0.5, torch.tensor(float("inf")) if world.rank == world.size - 1 else 0.0)
    return {"before": before, "after": snapshot(engine), "skipped": engine.skipped.item()}


def resumed(world: World, engine: Engine, others: dict[str, Engine]) -> dict[str, Any]:
    """Steps of an engine that trains on, and of others that continue from its state."""
    saved = engine.full_state()
    for other in others.values():
        other.restore(saved)
    steps = batches(world)[:3]
    return {"saved": saved, **{name: run_steps(world, each, steps) for name, each in {"went on": engine, **others}.items()}}


def main() -> None:
    world = distributed.join(threads=1)
    folder = Path(sys.argv[1])
    prepare()
    measured: dict[str, Any] = {}
    for name, (ranks, *how) in CASES.items():
        if ranks != world.size:
            continue
        engine = engine_of(world, *how)
        measured[name] = {"initial": engine.portable_state(), **run_steps(world, engine, batches(world))}
        (layer,) = engine.experts.layers
        measured[name]["auxiliary"] = layer.balance.item(), layer.deepspeed.deepspeed_moe.l_aux.item()
        measured[name] |= {"bad": bad_step(world, engine), "own": list(engine.experts.own)}
        measured[name]["resumed"] = resumed(world, engine, {"again": engine_of(world, *how, seed=1)})
    if world.size == 1:
        measured["plain"] = {k: plain_run(world, k) for k in (1, 2)}
    else:  # from one rank to two, and from one way to another
        alone = torch.load(folder / "1_0.pt")["top-1"]["resumed"]["saved"]
        ways = {"copied": (1, 0), "divided": (2, 0), "zero 1": (2, 1), "zero 2": (2, 2)}
        engines = {name: engine_of(world, 1, *way, seed=1) for name, way in ways.items()}
        for engine in engines.values():
            engine.restore(alone)
        measured["from one rank"] = {name: run_steps(world, engine, batches(world)[:3]) for name, engine in engines.items()}
        others = {name: engine_of(world, 1, *way, seed=1) for name, way in ways.items()}
        measured["from zero 2"] = resumed(world, engines["zero 2"], others)
    full = engine_of(world, 2, world.size, 0, capacity_factor=0.5)
    measured["full"] = run_steps(world, full, batches(world)[:5])
    measured["full again"] = run_steps(world, engine_of(world, 2, world.size, 0, capacity_factor=0.5), batches(world)[:5])
    for stage in (0, 2):  # last: it sets flags for the whole process
        measured[f"bf16, zero {stage}"] = run_steps(
            world, engine_of(world, 1, world.size, stage, bf16=True), batches(world)[:5]
        )
    torch.save(measured, folder / f"{world.size}_{world.rank}.pt")
    leave()


if __name__ == "__main__":
    main()
