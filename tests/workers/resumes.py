"""What engines of every kind save, and how they and others resume from it: on one rank and two, at each ZeRO stage.

    python tests/workers/resumes.py FOLDER

Four worlds, forked one after another when the slow imports are done: one rank trains and saves, then two; one rank resumes
from all checkpoints, then two. Each rank writes its measurements to FOLDER.
"""

import gc
import hashlib
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
from cifar10.distributed import world as distributed
from cifar10.distributed.world import World
from cifar10.engine.engine import Engine, leave, prepare
from cifar10.engine.full_state import loss_scaler, weights_sha256
from cifar10.models.registry import build_model
from cifar10.run import checkpoint
from cifar10.run.state import RunState
from tests.helpers import make_engine, make_loader, one_step
from tests.workers.small_runs import become_rank, ended, forked, free_port

STAGES = (0, 1, 2, 3)
WORLDS = (1, 2)
GLOBAL_IMAGES, MICRO_IMAGES = 32, 16
MORE_STEPS = 5  # after the save
SGD = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}
ADAMW = {"type": "AdamW", "params": {"lr": 0.003}}


class OddCNN(nn.Module):
    """BatchNorm, dropout, and few tensors that two ranks can share evenly."""

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
    """A way to train: saved at a step, and resumed with the same number of ranks and stage or with all others too."""

    stages: tuple[int, ...] = STAGES
    worlds: tuple[int, ...] = WORLDS
    save_at: int = 3  # odd, which would not fit another number of passes a step
    smooth: bool = False  # smooth_cnn, with losses that can be compared between worlds
    everywhere: bool = False
    precision: str = "fp32"
    accumulation: int = 0  # passes a step; 0: as many as the micro-batch makes
    config: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)  # keys of zero_optimization beside the stage
    bad_step: int = -1  # whose loss is NaN, on the last rank alone

    def engine(self, world: World, stage: int) -> Engine:
        config = {"zero_optimization": {"stage": stage, **self.zero}, "optimizer": SGD, **self.config}
        config = ds_config.with_precision(config, self.precision)
        model = build_model("smooth_cnn", 0, 10) if self.smooth else odd_cnn()
        return make_engine(world, model, global_images=GLOBAL_IMAGES, accumulation=self.passes(world), **config)

    def passes(self, world: World) -> int:
        return self.accumulation or GLOBAL_IMAGES // MICRO_IMAGES // world.size


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
    **{name: optimizer(name) for name in ("Adadelta", "Adamax", "ASGD", "Rprop", "Adagrad", "NAdam", "RAdam")},
}
SCHEDULERS = {
    "WarmupLR": scheduler("WarmupLR", warmup_max_lr=0.05, warmup_num_steps=6),
    "WarmupCosineLR": scheduler("WarmupCosineLR", total_num_steps=9, warmup_num_steps=2),
    "OneCycle": scheduler("OneCycle", cycle_min_lr=0.01, cycle_max_lr=0.1, cycle_first_step_size=4),
    "LRRangeTest": scheduler("LRRangeTest", lr_range_test_min_lr=0.01, lr_range_test_step_size=2),
}
TORCH_SCHEDULERS = {  # not supported by DeepSpeed under ZeRO
    "OneCycleLR": scheduler("OneCycleLR", max_lr=0.1, total_steps=9),
    "CyclicLR": scheduler("CyclicLR", base_lr=0.01, max_lr=0.1, step_size_up=3),
    "CosineAnnealingLR": scheduler("CosineAnnealingLR", T_max=9),
    "StepLR": scheduler("StepLR", step_size=2),
}
CPU = {"device": "cpu"}
STAGE_3 = {  # nothing stays whole or is fetched early, and the optimizer works in several groups
    **dict.fromkeys(("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"), 0),
    **dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"), 0),
    **{"sub_group_size": 20_000, "stage3_module_granularity_threshold": 1000},
    **dict.fromkeys(("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential"), True),
}
CLIPPED = {"optimizer": ADAMW, "gradient_clipping": 0.2}
MEMORY = {  # what saves memory, and must change nothing else: compared with the first
    name: Case(stages, smooth=True, bad_step=1, config=CLIPPED, zero=zero)
    for name, stages, zero in (
        ("clipped", (0,), {}),
        ("optimizer offloaded", (1, 2, 3), {"offload_optimizer": CPU}),
        ("all offloaded", (3,), {"offload_optimizer": CPU, "offload_param": CPU}),
        ("stage 3 thresholds", (3,), STAGE_3),
        ("parameters offloaded, thresholds", (3,), {"offload_param": CPU, **STAGE_3}),
    )
}
GROWING = {"fp16": {"initial_scale_power": 8, "loss_scale_window": 2}}
CASES = {
    "portable, SGD": Case(smooth=True, everywhere=True),
    "portable, AdamW": Case(smooth=True, everywhere=True, config={"optimizer": ADAMW}),
    "buffers": Case(stages=BOTH, everywhere=True),
    **{f"fp32, {passes}": Case(accumulation=passes) for passes in (1, 2)},
    **{f"step 0, {name}": Case(save_at=0, config={"optimizer": one}) for name, one in (("SGD", SGD), ("AdamW", ADAMW))},
    **{name: Case(stages=BOTH, worlds=ONE, config=config) for name, config in OPTIMIZERS.items()},
    "Adafactor": Case(
        stages=(0,), worlds=ONE, config=optimizer("Adafactor")
    ),  # not under ZeRO, which flattens its rows and columns
    **{name: Case(stages=BOTH, worlds=ONE, config=config) for name, config in SCHEDULERS.items()},
    **{name: Case(stages=(0,), worlds=ONE, config=config) for name, config in TORCH_SCHEDULERS.items()},
    **MEMORY,
    # lower precisions last: autocast sets flags for the whole process
    **{f"bf16, {passes}": Case(accumulation=passes, precision="bf16") for passes in (1, 2)},
    "portable, bf16": Case(stages=BOTH, smooth=True, everywhere=True, precision="bf16"),
    **{  # in the middle of a window, and where the scale is about to double
        f"fp16, growing, {at}": Case(BOTH, WORLDS, at, smooth=True, everywhere=True, precision="fp16", config=GROWING)
        for at in (3, 4)
    },
    # not everywhere: with several passes a step, a scale twice as large fits
    "fp16, overflown": Case(BOTH, save_at=9, smooth=True, precision="fp16", config={"fp16": {"initial_scale_power": 24}}),
    "fp16, fixed": Case(BOTH, precision="fp16", config={"fp16": {"loss_scale": 256}}),
}


# --- measuring ----------------------------------------------------------------------------------------------------------


def fingerprint(value: Any) -> str:
    """Of nested tensors and plain values: equal only if all types and bits are."""
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


def look(engine: Engine) -> dict[str, Any]:
    """The full state as fingerprints, and this rank's own buffers."""
    state = engine.full_state()
    own = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    prints, weights = {key: fingerprint(value) for key, value in state.items()}, weights_sha256(engine.portable_state())
    return {"state": prints, "weights": weights, "buffers": own, "scale": state["loss_scale"]}


def steps(world: World, engine: Engine, batches: list[list[MicroBatch]], bad_step: int = -1) -> dict[str, Any]:
    """The losses of the global batch, the learning rates, gradient norms, and the loss scale after each step."""
    losses, lrs, norms, scales, skipped = [], [], [], [], []
    for number, micro_batches in enumerate(batches):
        is_bad = number == bad_step and world.rank == world.size - 1
        loss = one_step(engine, micro_batches, 1.0 - 0.05 * number, extra=float("nan") if is_bad else 0.0)
        losses.append(world.total(loss.float().clone()).item() / world.size)
        lrs.append(engine.lr)
        norms.append(engine.grad_norm.item())
        scaler = loss_scaler(engine)
        scales.append(scaler and scaler.state_dict()["scale"])
        skipped.append(engine.skipped.item())
    return {"losses": losses, "lrs": lrs, "norms": norms, "scales": scales, "skipped": skipped}


def batches_of(world: World, case: Case) -> list[list[MicroBatch]]:
    count = case.save_at + MORE_STEPS
    loader = make_loader(world, accumulation=case.passes(world), num_images=count * GLOBAL_IMAGES)
    return list(islice(loader.epoch(0), count))


def saves(world: World, folder: Path) -> dict[Any, Any]:
    """{(case, stage): what was saved, and how its engine trained on}."""
    seen = {}
    for name, case in CASES.items():
        for stage in case.stages if world.size in case.worlds else ():
            batches, engine = batches_of(world, case), case.engine(world, stage)
            before = steps(world, engine, batches[: case.save_at], case.bad_step)
            tag = folder / name / f"{world.size}-{stage}"
            assert checkpoint.save(tag, engine, RunState(step=case.save_at), world, {}, keep=1) == ""
            seen[name, stage] = {"before": before, "saved": look(engine)}
            seen[name, stage] |= {**steps(world, engine, batches[case.save_at :]), "end": look(engine)}
    return seen


def sources(case: Case, num_ranks: int, stage: int) -> list[tuple[int, int]]:
    """The (ranks, stage) whose checkpoints an engine of this case resumes from."""
    return [(ranks, at) for ranks in case.worlds for at in case.stages] if case.everywhere else [(num_ranks, stage)]


def resumes(world: World, folder: Path) -> dict[Any, Any]:
    """{(case, stage, (ranks, stage) of the source): what was loaded, and how this engine trained on}."""
    seen = {}
    for name, case in CASES.items():
        for stage in case.stages if world.size in case.worlds else ():
            batches = batches_of(world, case)[case.save_at :]
            for source in sources(case, world.size, stage):
                engine = case.engine(world, stage)
                checkpoint.resume(folder / name / "{}-{}".format(*source), None, engine, world, {})
                seen[name, stage, source] = {"loaded": look(engine), **steps(world, engine, batches)}
                if source == (world.size, stage):
                    seen[name, stage, source]["end"] = look(engine)
    return seen


# --- four worlds -----------------------------------------------------------------------------------------------------------


def in_world(num_ranks: int, name: str, measure: Callable[[World, Path], Any], folder: Path) -> None:
    """Fork the ranks and wait for them; each writes its measurements to <name>_<ranks>.rank_<n>.pt."""
    port = free_port()

    def one(rank: int) -> int:
        become_rank(rank, num_ranks, port)
        world = distributed.join(threads=1)
        torch.save(measure(world, folder), folder / f"{name}_{num_ranks}.rank_{rank}.pt")
        leave()
        return 0

    codes = ended([forked(one, rank) for rank in range(num_ranks)])
    if any(codes):
        sys.exit(f"{name} of {num_ranks} ranks ended with {codes}")


if __name__ == "__main__":
    prepare()
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # for its first optimizer PyTorch imports its compiler
    gc.freeze()  # every stage-3 engine collects garbage, which would scan all that is imported
    for doing in (saves, resumes):
        for ranks in WORLDS:
            in_world(ranks, doing.__name__, doing, Path(sys.argv[1]))
