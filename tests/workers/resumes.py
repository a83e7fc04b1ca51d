"""What engines of every kind save, and what they and others go on to from it: one rank and two, each ZeRO stage.

    python tests/workers/resumes.py FOLDER

Four worlds, one after another, forked when the slow imports are done: one rank trains and saves, then two ranks do; one rank
goes on from what both have saved, then two ranks do. Each rank writes what it has measured to FOLDER.
"""

from __future__ import annotations

import gc
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar10.config import ds_config
from cifar10.data.loader import MicroBatch
from cifar10.distributed import world
from cifar10.distributed.world import World
from cifar10.engine.engine import Engine, prepare
from cifar10.engine.full_state import loss_scaler, weights_sha256
from cifar10.models.registry import build_model
from cifar10.run import checkpoint
from cifar10.run.state import RunState
from tests.helpers import make_engine, make_loader, one_step
from tests.workers.small_runs import free_port

STAGES = (0, 1, 2, 3)
WORLDS = (1, 2)
GLOBAL_IMAGES, MICRO_IMAGES = 32, 16
MORE_STEPS = 5  # after the save
SGD = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}
ADAMW = {"type": "AdamW", "params": {"lr": 0.003}}


class OddCNN(nn.Module):
    """BatchNorm, dropout, and no tensor that two ranks share evenly but the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, kernel_size=3)
        self.bn = nn.BatchNorm2d(5)
        self.pool = nn.AvgPool2d(5)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(5 * 6 * 6, 10)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 3, 32, 32] -> logits [B, 10]."""
        x = self.pool(torch.relu(self.bn(self.conv(images))))  # [B, 5, 6, 6]
        return self.fc(self.drop(torch.flatten(x, 1)))  # [B, 10]


def odd_cnn() -> nn.Module:
    torch.manual_seed(0)
    return OddCNN()


@dataclass(frozen=True)
class Case:
    """A way to train: what is saved at a step and gone on from, by the same number of ranks and stage, or by all others too."""

    stages: tuple[int, ...] = STAGES
    worlds: tuple[int, ...] = WORLDS
    save_at: int = 3  # odd, so that a count of passes would not fit another number of passes a step
    smooth: bool = False  # smooth_cnn, whose losses can be compared between worlds
    everywhere: bool = False
    precision: str = "fp32"
    accumulation: int = 0  # passes a step; 0: as many as the micro-batch makes
    config: dict[str, Any] = field(default_factory=dict)

    def engine(self, here: World, stage: int) -> Engine:
        config = ds_config.with_precision(
            {"zero_optimization": {"stage": stage}, "optimizer": SGD, **self.config}, self.precision
        )
        model = build_model("smooth_cnn", 0, 10) if self.smooth else odd_cnn()
        return make_engine(here, model, global_images=GLOBAL_IMAGES, accumulation=self.passes(here), **config)

    def passes(self, here: World) -> int:
        return self.accumulation or GLOBAL_IMAGES // MICRO_IMAGES // here.size


def optimizer(name: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": name, "params": {"lr": 0.01, **params}}}


def scheduler(name: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": name, "params": params}}


ONE, BOTH = (1,), (0, 2)
OPTIMIZERS = {
    "Adam": optimizer("Adam", adam_w_mode=False),
    "Adam, amsgrad": optimizer("Adam", amsgrad=True),
    "RMSprop": optimizer("RMSprop", momentum=0.9, centered=True),
    "SGD, dampening": optimizer("SGD", momentum=0.9, dampening=0.5),
    "SGD, nesterov": optimizer("SGD", momentum=0.9, nesterov=True),
    "SGD, no momentum": optimizer("SGD"),
    "NAdam": optimizer("NAdam"),
    "RAdam": optimizer("RAdam"),
    "Adadelta": optimizer("Adadelta"),
    "Adamax": optimizer("Adamax"),
    "ASGD": optimizer("ASGD"),
    "Rprop": optimizer("Rprop"),
    "Adagrad": optimizer("Adagrad"),
}
SCHEDULERS = {
    "WarmupLR": scheduler("WarmupLR", warmup_max_lr=0.05, warmup_num_steps=6),
    "WarmupCosineLR": scheduler("WarmupCosineLR", total_num_steps=9, warmup_num_steps=2),
    "OneCycle": scheduler("OneCycle", cycle_min_lr=0.01, cycle_max_lr=0.1, cycle_first_step_size=4),
    "LRRangeTest": scheduler("LRRangeTest", lr_range_test_min_lr=0.01, lr_range_test_step_size=2),
}
TORCH_SCHEDULERS = {  # which DeepSpeed cannot make under ZeRO
    "OneCycleLR": scheduler("OneCycleLR", max_lr=0.1, total_steps=9),
    "CyclicLR": scheduler("CyclicLR", base_lr=0.01, max_lr=0.1, step_size_up=3),
    "CosineAnnealingLR": scheduler("CosineAnnealingLR", T_max=9),
    "StepLR": scheduler("StepLR", step_size=2),
}
CASES = {
    "portable, SGD": Case(smooth=True, everywhere=True),
    "portable, AdamW": Case(smooth=True, everywhere=True, config={"optimizer": ADAMW}),
    "buffers": Case(stages=BOTH, everywhere=True),
    **{f"fp32, {passes}": Case(accumulation=passes) for passes in (1, 2)},
    **{f"step 0, {name}": Case(save_at=0, config={"optimizer": one}) for name, one in (("SGD", SGD), ("AdamW", ADAMW))},
    **{name: Case(stages=BOTH, worlds=ONE, config=config) for name, config in OPTIMIZERS.items()},
    "Adafactor": Case(stages=(0,), worlds=ONE, config=optimizer("Adafactor")),  # knows rows and columns, which ZeRO flattens
    **{name: Case(stages=BOTH, worlds=ONE, config=config) for name, config in SCHEDULERS.items()},
    **{name: Case(stages=(0,), worlds=ONE, config=config) for name, config in TORCH_SCHEDULERS.items()},
    # lower precisions last: autocast sets flags for the whole process
    **{f"bf16, {passes}": Case(accumulation=passes, precision="bf16") for passes in (1, 2)},
    "portable, bf16": Case(stages=BOTH, smooth=True, everywhere=True, precision="bf16"),
    **{
        f"fp16, growing, {at}": Case(
            stages=BOTH,
            save_at=at,
            smooth=True,
            everywhere=True,
            precision="fp16",
            config={"fp16": {"initial_scale_power": 8, "loss_scale_window": 2}},
        )
        for at in (3, 4)  # in the middle of a window, and where the scale is about to double
    },
    # not everywhere: where a step's loss is divided by its passes before backward, a scale twice as large fits
    "fp16, overflown": Case(
        stages=BOTH, save_at=9, smooth=True, precision="fp16", config={"fp16": {"initial_scale_power": 24}}
    ),
    "fp16, fixed": Case(stages=BOTH, precision="fp16", config={"fp16": {"loss_scale": 256}}),
}


# --- measuring ----------------------------------------------------------------------------------------------------------


def fingerprint(value: Any) -> str:
    """Of tensors and plain values, however nested: equal only if all types and bits are."""
    digest = hashlib.sha256()
    if isinstance(value, Tensor):
        digest.update(weights_sha256({"": value.detach()}).encode())
    elif isinstance(value, dict):
        digest.update("".join(f"{key}: {fingerprint(value[key])}\n" for key in sorted(value)).encode())
    elif isinstance(value, (list, tuple)):
        digest.update("\n".join(map(fingerprint, value)).encode())
    else:
        digest.update(f"{type(value).__name__} {value!r}".encode())
    return digest.hexdigest()


def fingerprints(state: dict[str, Any]) -> dict[str, str]:
    """One for each part of a full state, so that a difference has a name."""
    return {key: fingerprint(value) for key, value in state.items()}


def look(engine: Engine) -> dict[str, Any]:
    """All that the engine holds, and this rank's own buffers."""
    state = engine.full_state()
    own = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    weights = weights_sha256(engine.portable_state())
    return {"state": fingerprints(state), "weights": weights, "buffers": own, "scale": state["loss_scale"]}


def steps(here: World, engine: Engine, batches: list[list[MicroBatch]]) -> dict[str, Any]:
    """The losses of the global batch, the learning rates, and the loss scale after each step."""
    losses, lrs, scales, skipped = [], [], [], []
    for number, micro_batches in enumerate(batches):
        loss = one_step(engine, micro_batches, 1.0 - 0.05 * number)
        losses.append(here.total(loss.float().clone()).item() / here.size)
        lrs.append(engine.lr)
        scaler = loss_scaler(engine)
        scales.append(scaler and scaler.state_dict()["scale"])
        skipped.append(engine.skipped.item())
    return {"losses": losses, "lrs": lrs, "scales": scales, "skipped": skipped}


def batches_of(here: World, case: Case) -> list[list[MicroBatch]]:
    count = case.save_at + MORE_STEPS
    loader = make_loader(here, accumulation=case.passes(here), num_images=count * GLOBAL_IMAGES)
    return list(islice(loader.epoch(0), count))


def saves(here: World, folder: Path) -> dict[Any, Any]:
    """{(case, stage): what was saved, and what its engine went on to}."""
    seen = {}
    for name, case in CASES.items():
        for stage in case.stages if here.size in case.worlds else ():
            batches, engine = batches_of(here, case), case.engine(here, stage)
            before = steps(here, engine, batches[: case.save_at])
            tag = folder / name / f"{here.size}-{stage}"
            failure = checkpoint.save(tag, engine, RunState(step=case.save_at), here, {}, keep=1)
            assert failure == "", failure
            seen[name, stage] = {"before": before, "saved": look(engine)}
            seen[name, stage] |= {**steps(here, engine, batches[case.save_at :]), "end": look(engine)}
    return seen


def sources(case: Case, num_ranks: int, stage: int) -> list[tuple[int, int]]:
    """The (ranks, stage) whose checkpoints an engine of this case goes on from."""
    return [(ranks, at) for ranks in case.worlds for at in case.stages] if case.everywhere else [(num_ranks, stage)]


def resumes(here: World, folder: Path) -> dict[Any, Any]:
    """{(case, stage, (ranks, stage) of the source): what was loaded, and what this engine went on to}."""
    seen = {}
    for name, case in CASES.items():
        for stage in case.stages if here.size in case.worlds else ():
            batches = batches_of(here, case)[case.save_at :]
            for source in sources(case, here.size, stage):
                engine = case.engine(here, stage)
                checkpoint.resume(folder / name / "{}-{}".format(*source), None, engine, here, {})
                seen[name, stage, source] = {"loaded": look(engine), **steps(here, engine, batches)}
                if source == (here.size, stage):
                    seen[name, stage, source]["end"] = look(engine)
    return seen


# --- four worlds -----------------------------------------------------------------------------------------------------------


def in_world(num_ranks: int, name: str, measure: Callable[[World, Path], Any], folder: Path) -> None:
    """Fork so many ranks, wait for them, and leave what each has measured in <name>_<ranks>.rank_<n>.pt."""
    port, children = free_port(), []
    for rank in range(num_ranks):
        child = os.fork()
        if not child:
            code = 1
            try:
                if num_ranks > 1:
                    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(num_ranks))
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
                here = world.join(threads=1)
                torch.save(measure(here, folder), folder / f"{name}_{num_ranks}.rank_{rank}.pt")
                world.leave()
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"{name} of {num_ranks} ranks ended with {codes}")


if __name__ == "__main__":
    prepare()
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # for its first optimizer PyTorch imports its compiler
    gc.freeze()  # every engine of stage 3 collects garbage, and would look for it among all that is imported
    for doing in (saves, resumes):
        for ranks in WORLDS:
            in_world(ranks, doing.__name__, doing, Path(sys.argv[1]))
