"""How a step is executed, `--engine-level`, and which configs each level supports, checked before any rank starts.

    eager      the script's step, one operation after another: the reference that the others are tested against
    fused      on a CPU, BatchNorm, pooling and ReLU in one operation that reads and writes less memory (cifar10/ops)
    compile    DeepSpeed's engine.compile(): forward and backward as kernels from PyTorch's Inductor
    graph      forward and backward as two CUDA graphs; gradient averaging and the update stay eager
    captured   the whole step as one CUDA graph, without any Python

The levels change the speed, not the results, except that compiled dropout uses other random numbers, still by seed and step,
and that fused and compiled steps round differently. `auto` is the level that the recipe asks for, where that is supported, else
eager; a run that is resumed keeps to eager or fused, so that its bits do not depend on where it was stopped.
"""

from typing import Any, Literal, get_args

from cifar10 import UsageError
from cifar10.config.ds_check import look_up
from cifar10.distributed import device
from cifar10.ops import build

Level = Literal["eager", "fused", "compile", "graph", "captured"]
LEVELS: tuple[Level, ...] = get_args(Level)
CAPTURED_OPTIMIZERS = ("SGD", "MuonWithSGD")  # they read the learning rate, and skip a step, on the device
TIMERS = ("wall_clock_breakdown", "flops_profiler", "timers.throughput")  # DeepSpeed's, around each forward


def resolve_level(
    wanted: str, config: dict[str, Any], world_size: int, *, sync_bn: bool = False, asked: Level = "eager"
) -> Level:
    """The level for --engine-level `wanted` and a config from `ds_config.resolve`. Raises UsageError if it is not supported.

    `auto` is the level that the recipe has `asked` for, or eager where that is not supported.
    """
    if wanted == "auto":
        return "eager" if asked == "eager" or why_not(asked, config, world_size, sync_bn) else asked
    level: Level = wanted
    reason = None if level == "eager" else why_not(level, config, world_size, sync_bn)
    if reason:
        raise UsageError(f"--engine-level {level} {reason}")
    return level


def is_timed(config: dict[str, Any], key: str) -> bool:
    """Whether one of TIMERS is on."""
    value = look_up(config, key, False)
    return bool(value.get("enabled", False) if isinstance(value, dict) else value)


def why_not(level: Level, config: dict[str, Any], world_size: int, sync_bn: bool) -> str | None:
    """Why a level is not supported, as the end of a sentence about it; None if it is."""
    stage, passes = config.get("zero_optimization", {}).get("stage", 0), config["gradient_accumulation_steps"]
    if sync_bn and world_size > 1:
        return "is not supported with --sync-bn on several ranks; use --engine-level eager"
    if look_up(config, "pipeline.stages", 1) > 1:
        return "is not supported with --pipeline-stages; use --engine-level eager"
    if stage == 3:
        return "is not supported with ZeRO stage 3, whose forward gathers weights; use stage 2, or --engine-level eager"
    if timed := [key for key in TIMERS if is_timed(config, key)]:
        return f"is not supported with DeepSpeed's {timed[0]}; remove it from the JSON, or use --engine-level eager"
    if level == "compile":
        missing = device.missing_for_compiling()
        return f"needs {missing}; or use --engine-level eager" if missing else None
    if level == "fused":
        if device.count_gpus():
            return "is for CPUs; use --engine-level eager"
        try:
            build.library()
        except UsageError as error:
            return f"needs {error}; or use --engine-level eager"
        return None
    if not device.count_gpus():
        return "needs a GPU, for CUDA graphs; use --engine-level eager, or compile"
    if passes > 1:
        images = config["train_micro_batch_size_per_gpu"] * passes
        return f"is not supported with gradient accumulation, here {passes} passes a step; use --micro-batch-size {images}"
    return _why_not_captured(config, world_size, stage) if level == "captured" else None


def _why_not_captured(config: dict[str, Any], world_size: int, stage: int) -> str | None:
    optimizer, autocast = config["optimizer"], config.get("torch_autocast", {})
    if world_size > 1:
        return f"is not supported on {world_size} ranks, only on one; use --engine-level graph"
    if stage:
        return f"is not supported with ZeRO stage {stage}, which synchronizes; set zero_optimization.stage to 0"
    if autocast.get("enabled") and autocast.get("dtype") == "float16":
        return "is not supported with fp16, whose loss scale the host keeps; use --precision bf16, or --engine-level graph"
    if config.get("scheduler"):
        return "is not supported with a scheduler in the JSON; remove it, or use --engine-level graph"
    name = {name.lower(): name for name in CAPTURED_OPTIMIZERS}.get(optimizer["type"].lower())
    if name is None:
        supported = " and ".join(CAPTURED_OPTIMIZERS)
        return f"is not supported with {optimizer['type']}, only with {supported}; use --engine-level graph"
    params = optimizer.get("params", {})
    if name == "SGD" and (not params.get("fused") or params.get("dampening")):
        return 'needs SGD with "fused": true and no dampening; use --engine-level graph'
    return None
