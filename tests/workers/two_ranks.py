"""Many measurements with two real ranks in one launch. Each rank writes them to <folder>/rank_<n>.pt.

torchrun --nproc_per_node=2 tests/workers/two_ranks.py FOLDER
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from cifar10.config import ds_config
from cifar10.data import pixels, synthetic
from cifar10.data.loader import EvaluationLoader
from cifar10.distributed import world as distributed
from cifar10.distributed.world import World
from cifar10.engine.engine import Engine, leave
from cifar10.models.registry import build_model
from cifar10.run import checkpoint
from cifar10.run.evaluation import evaluate
from cifar10.run.metric_buffer import MetricBuffer, count_steps
from cifar10.run.state import RunState
from tests.helpers import MEAN, SGD, STD, CountOperations, CountReads, batch, make_engine, make_loader, one_step, snapshot

INFINITE, NOT_A_NUMBER = float("inf"), float("nan")


def run_steps(world: World, engine: Engine, steps: int, accumulation: int = 1) -> dict[str, Any]:
    """Train on the shared loader's images; the losses are those of the global batch."""
    losses, norms, skipped = [], [], []
    operations, reads = CountOperations(), CountReads()
    for micro_batches, _ in zip(make_loader(world, accumulation=accumulation).epoch(0), range(steps), strict=False):
        with operations, reads:
            loss = one_step(engine, micro_batches, 0.5)
        losses.append(world.total(loss.detach().clone()).item() / world.size)
        norms.append(engine.grad_norm.item())
        skipped.append(engine.skipped.item())
    scalars = operations.counts["aten._local_scalar_dense.default"]
    seen = {"losses": losses, "norms": norms, "skipped": skipped, "reads": reads.counts.total() + scalars}
    return {**seen, "weights": engine.portable_state()}


def bad_step(world: World, engine: Engine, fault: str, look: Any) -> dict[str, Any]:
    """A step that is bad on rank 1 alone, and a good one after it; `look(engine)` returns what to compare."""
    images, labels = batch(16, seed=world.rank)
    seen = {"before": look(engine)}
    mine = world.rank == 1
    extra = torch.tensor(INFINITE) if mine and fault == "loss" else 0.0
    one_step(engine, [(images * NOT_A_NUMBER if mine and fault == "images" else images, labels)], 0.5, extra)
    seen |= {"after": look(engine), "skipped": engine.skipped.item()}
    one_step(engine, [(images, labels)], 0.5)
    return {**seen, "next": look(engine), "skipped next": engine.skipped.item()}


def bad_steps(world: World, engine: Engine, look: Any) -> dict[str, Any]:
    return {f"bad {fault}": bad_step(world, engine, fault, look) for fault in ("images", "loss")}


def resumed(world: World, engine: Engine, **config: Any) -> dict[str, Any]:
    """The weights of an engine that trains on, and of a new one that resumes from its checkpoint."""
    other = make_engine(world, build_model("smooth_cnn", 1, 10), **config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = world.from_main(lambda: Path(scratch))
        checkpoint.save(folder, engine, RunState(step=5), world, {}, keep=1)
        step = checkpoint.resume(folder, None, other, world, {}).step
        world.barrier()
    for each in (engine, other):
        for number in range(3):
            one_step(each, [batch(16, seed=10 * number + world.rank)], 0.5)
    return {"resumed at": step, "went on": engine.portable_state(), "resumed": other.portable_state()}


def smooth_runs(world: World) -> dict[str, Any]:
    """Each ZeRO stage and accumulation on the same global batches, and a bad step under each stage."""
    runs = {}
    for name, stage, accumulation in [("2 passes", 0, 2), *((f"zero {stage}", stage, 1) for stage in (0, 1, 2, 3))]:
        config = {"zero_optimization": {"stage": stage}, "accumulation": accumulation}
        engine = make_engine(world, build_model("smooth_cnn", 0, 10), **config)
        runs[name] = run_steps(world, engine, 20, accumulation)
        if accumulation == 1:
            runs[name] |= bad_steps(world, engine, Engine.portable_state)
            runs[name] |= resumed(world, engine, **config)
    return runs


def batch_norm_runs(world: World) -> dict[str, Any]:
    """BatchNorm: each rank's own statistics, after a bad step, and while a run is evaluated and saved."""
    engine = make_engine(world, build_model("bn_cnn", 0, 10))
    seen = bad_steps(world, engine, snapshot)  # the very first step is bad
    seen |= {"own before": snapshot(engine), "portable": engine.portable_state(), "own after": snapshot(engine)}

    for name in ("unwatched", "watched"):
        engine = make_engine(world, build_model("bn_cnn", 0, 10))
        for step in range(6):
            one_step(engine, [batch(16, seed=2 * step + world.rank)], 0.5)
            if name == "watched":
                copy = build_model("bn_cnn", 0, 10)
                copy.load_state_dict(engine.portable_state())
                evaluate(copy, evaluation_loader(world.rank, world.size), world)
                engine.full_state()
        seen[name] = snapshot(engine)
    return seen


def evaluation_loader(rank: int, world_size: int) -> EvaluationLoader:
    images = synthetic.synthetic("test", 333, seed=0)
    store = pixels.pack(torch.from_numpy(images.pixels), padding=0)
    normalize = pixels.Normalize(MEAN, STD, torch.device("cpu"))
    return EvaluationLoader(store, torch.from_numpy(images.labels), normalize, rank, world_size, batch_images=50)


def evaluations(world: World) -> dict[str, Any]:
    """One model on one split: over both ranks, and by each rank alone."""
    model, seen = build_model("bn_cnn", 0, 10), {}
    for name, place in (("evaluation", world), ("evaluation on one", World(0, 0, 1, 1, world.device, "none"))):
        result = evaluate(model, evaluation_loader(place.rank, place.size), place)
        seen[name] = (result.loss, result.accuracy, result.images)
    return seen


def buffer_rows(world: World) -> dict[str, Any]:
    """Steps in which each rank has another loss and number of correct images."""
    buffer, state = MetricBuffer(4, world.device), RunState()
    for step, skipped in enumerate((0.0, 1.0, 0.0, 0.0)):
        loss = NOT_A_NUMBER if skipped and world.rank == 1 else 1.0 + world.rank + step
        values = (loss, 10 * (world.rank + 1) + step, 0.25 * (step + 1), skipped)
        buffer.write(*(torch.tensor(value) for value in values))
    rows = buffer.read(world)
    count_steps(rows, state, global_images=64, max_skipped_in_a_row=25)
    return {"rows": rows, "rows read again": buffer.read(world), "state": state.as_dict()}


def lower_precision_runs(world: World) -> dict[str, Any]:
    """The config's bf16 and fp16 switches."""
    runs, changes = {}, {"": {}, ", zero 2": {"zero_optimization": {"stage": 2}}, ", no clipping": {"gradient_clipping": 0.0}}
    for name in ("bf16", "bf16, zero 2", "fp16", "fp16, no clipping"):
        config = {name[:4]: {"enabled": True}, **changes[name[4:]]}
        engine = make_engine(world, build_model("smooth_cnn", 0, 10), **config)
        runs[name] = {**run_steps(world, engine, 20), **bad_steps(world, engine, Engine.portable_state)}
        runs[name] |= resumed(world, engine, **config)
        runs[name]["notes"] = ds_config.resolve({"optimizer": SGD, "train_batch_size": 32, **config}, world.size)[2]
        runs[name]["logits"] = engine.forward(batch(4)[0]).dtype
    return runs


def main() -> None:
    world = distributed.join(threads=1)
    measured: dict[str, Any] = {**smooth_runs(world), "bn": batch_norm_runs(world), **evaluations(world), **buffer_rows(world)}
    measured |= lower_precision_runs(world)  # last: it sets flags for the whole process
    torch.save(measured, Path(sys.argv[1]) / f"rank_{world.rank}.pt")
    leave()


if __name__ == "__main__":
    main()
